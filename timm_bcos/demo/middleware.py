"""ASGI middleware in front of Gradio: an allow-list of requests. All other requests are answered here."""

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from ..errors import InputError
from .limits import BODY_SECONDS, BUFFERED_BYTES, MAX_CONNECTIONS, MAX_REQUEST_BYTES
from .scheduler import CLOSING
from .sessions import ConnectedSessions
from .validation import NAME

__all__ = ["ROUTES", "RequestFilter", "Route", "find_route"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Validate = Callable[[bytes], bytes]

FILE = r"(?:[A-Za-z0-9_@-][A-Za-z0-9_.@-]*/)*[A-Za-z0-9_@-][A-Za-z0-9_.@-]*"  # no part of the path begins with a dot

# Gradio trusts these headers: any site that is named as the origin could call the demo, and any address would be
# written into the page as its own, to which browsers would then send photos.
DROPPED_HEADERS = {b"origin", b"x-gradio-server"}

BUSY = "the demo is busy: try again in a minute"
POLL_SECONDS = 0.2  # interval at which streams check whether the demo is shutting down

_logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """A request that the demo's own page makes.

    Attributes:
        method: HTTP method.
        path: Regular expression for the whole path.
        max_bytes: Largest body.
        query: Query parameters that Gradio gets; all others are dropped.
        is_stream: Whether the response goes on until the browser disconnects.
    """

    method: str
    path: str
    max_bytes: int = 0
    query: tuple[str, ...] = ()
    is_stream: bool = False


# Routes of Gradio that are not listed get 404, including routes that a later version adds. Left out on purpose:
# /upload, /process_recording, /component_server and /deep_link write files; /file, /proxy and /stream read files or
# fetch URLs; /run, /api and /call bypass the queue or `timm_bcos.demo.validation`.
ROUTES = (
    Route("GET", "/"),
    Route("HEAD", "/"),
    Route("GET", rf"/(?:assets|static)/{FILE}"),
    Route("GET", r"(?:/gradio_api)?/theme\.css"),
    Route("GET", r"/favicon\.ico"),
    Route("GET", r"/robots\.txt"),
    Route("GET", r"/manifest\.json"),
    Route("GET", "/config"),  # also contained in `/`; clients that are programs read it here
    Route("GET", "/gradio_api/app_id/?"),  # shows the browser that the demo has been restarted
    Route("GET", "/gradio_api/startup-events"),  # requested once, when Gradio starts
    Route("GET", rf"/gradio_api/heartbeat/{NAME}", is_stream=True),
    Route("GET", "/gradio_api/queue/data", query=("session_hash",), is_stream=True),
    Route("POST", "/gradio_api/queue/join", max_bytes=MAX_REQUEST_BYTES),
    Route("POST", "/gradio_api/cancel", max_bytes=1_000),
)


def find_route(method: str, path: str) -> Route | None:
    """The route that allows a request; None if there is none."""
    return next((route for route in ROUTES if route.method == method and re.fullmatch(route.path, path)), None)


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status of the response.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestFilter:
    """Middleware around an ASGI app: an allow-list of requests, validation of bodies, and shutdown of streams.

    Args:
        app: The app, including Gradio's own middleware, which answers some requests by itself.
        validators: Functions by path that return the body to hand on, or raise `InputError`.
        connected: Sessions that listen for results; kept up to date.
        closing: Event of the shutdown: new requests are refused, and streams end with a message.
    """

    def __init__(
        self, app: App, validators: Mapping[str, Validate], connected: ConnectedSessions, closing: threading.Event
    ) -> None:
        self.app, self.validators, self.connected, self.closing = app, validators, connected, closing
        self.buffered = self.connections = 0
        self.receiving: list[_BodyBuffer] = []  # oldest first

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        response = _Response(send)
        self.connections += 1
        try:
            await self._handle(scope, receive, response)
        except RequestError as error:
            if error.status != 404:
                _log(f"refused {scope['method']} {scope['path'][:100]!r}: {error}")
            await _send_error(response, error.status, str(error))
        except Exception as error:  # from Gradio, for instance for a stream of an unknown session
            _log(f"{scope['method']} {scope['path'][:100]!r} failed: {type(error).__name__}: {error}"[:300])
            await _send_error(response, 500, "internal error of the demo")
        finally:
            self.connections -= 1

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        route = find_route(scope["method"], scope["path"])
        if route is None:
            raise RequestError(404, "not found")
        if self.closing.is_set():
            raise RequestError(503, CLOSING)
        if self.connections > MAX_CONNECTIONS:
            raise RequestError(503, BUSY)
        scope, query = _filtered(scope, route)
        if route.is_stream:
            return await self._stream(scope, receive, send, query.get("session_hash"))
        if not route.max_bytes:
            _refuse_body(scope)
            return await self.app(scope, receive, send)
        if not dict(scope["headers"]).get(b"content-type", b"").lower().startswith(b"application/json"):
            raise RequestError(415, "send JSON")  # browsers send other types across origins without a preflight
        with _BodyBuffer(self) as buffer:
            body = await self._read(scope, receive, route.max_bytes, buffer)
            try:
                body = await asyncio.to_thread(self.validators[scope["path"]], body)
            except InputError as error:
                raise RequestError(422, str(error)) from None
            await self.app(_with_json(scope, body), _replay(body, receive), send)

    async def _read(self, scope: Message, receive: Receive, max_bytes: int, buffer: "_BodyBuffer") -> bytes:
        """Receive the whole body before the app sees any of it."""
        if _content_length(scope) > max_bytes:
            raise RequestError(413, "the request is too large")
        body = bytearray()
        end = time.monotonic() + BODY_SECONDS
        while time.monotonic() < end:
            buffer.resize(len(body))
            try:
                message = await asyncio.wait_for(receive(), POLL_SECONDS)
            except asyncio.TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the request was aborted")
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise RequestError(413, "the request is too large")
            if not message.get("more_body"):
                buffer.resize(len(body))
                self.receiving.remove(buffer)
                return bytes(body)
        raise RequestError(408, "the request took too long")

    async def _stream(self, scope: Message, receive: Receive, send: Send, session: str | None) -> None:
        """Pass a stream on until it ends or the demo shuts down."""
        _refuse_body(scope)
        if session:
            self.connected.add(session)
        task = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not task.done() and not self.closing.is_set():
                await asyncio.wait({task}, timeout=POLL_SECONDS)
            if task.done():
                return task.result()
        finally:
            if session:
                self.connected.remove(session)
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=POLL_SECONDS)
        return await _send_last_event(send, session)


def _filtered(scope: Message, route: Route) -> tuple[Message, dict[str, str]]:
    """The request with the headers and query parameters that Gradio may see, and these parameters."""
    given = parse_qsl(scope["query_string"].decode("latin-1")) if route.query else []
    query = {name: value for name, value in given if name in route.query}
    if not all(re.fullmatch(NAME, value) for value in query.values()) or len(query) < len(route.query):
        raise RequestError(422, "the name of a session has 1 to 64 letters and digits")
    query_string = "&".join(f"{name}={value}" for name, value in query.items()).encode()
    headers = [(name, value) for name, value in scope["headers"] if name not in DROPPED_HEADERS]
    return dict(scope, query_string=query_string, headers=headers), query


class _BodyBuffer:
    """The bytes of one request's body, counted against the limit of all.

    Beyond the limit, the oldest request that is still being received is refused; otherwise a few clients that never
    finish would block all others.
    """

    def __init__(self, owner: RequestFilter) -> None:
        self.owner, self.size, self.is_refused = owner, 0, False

    def __enter__(self) -> "_BodyBuffer":
        self.owner.receiving.append(self)
        return self

    def resize(self, size: int) -> None:
        if not self.is_refused:
            self.owner.buffered += size - self.size
            self.size = size
        while self.owner.buffered > BUFFERED_BYTES and self.owner.receiving:
            self.owner.receiving[0].refuse()
        if self.is_refused:
            raise RequestError(503, BUSY)

    def refuse(self) -> None:
        self.is_refused = True
        self._release()

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self.owner.buffered -= self.size
        self.size = 0
        if self in self.owner.receiving:
            self.owner.receiving.remove(self)


class _Response:
    """An ASGI `send` that knows whether the response has started and ended."""

    def __init__(self, send: Send) -> None:
        self.send, self.has_started, self.has_ended = send, False, False

    async def __call__(self, message: Message) -> None:
        if self.has_ended:
            return
        self.has_started = True
        self.has_ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send(message)


def _log(line: str) -> None:
    _logger.warning("%s", " ".join(line.split()))


def _refuse_body(scope: Message) -> None:
    if _content_length(scope) or b"transfer-encoding" in dict(scope["headers"]):
        raise RequestError(413, "this request has no body")


def _content_length(scope: Message) -> int:
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    return int(stated[:20]) if stated.isdigit() else 0


def _with_json(scope: Message, body: bytes) -> Message:
    """The request with the headers of its new body."""
    old = {b"content-length", b"content-type", b"transfer-encoding", b"content-encoding"}
    headers = [(name, value) for name, value in scope["headers"] if name not in old]
    new = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return dict(scope, headers=headers + new)


def _replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that returns the body, in one piece, before further messages."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pieces.pop() if pieces else await receive()

    return replay


async def _send_last_event(send: Send, session: str | None) -> None:
    """End a stream with an event that Gradio's client shows."""
    event = {"msg": "unexpected_error", "message": CLOSING, "session_not_found": False, "success": False}
    body = f"data: {json.dumps(event)}\n\n".encode() if session else b""
    if isinstance(send, _Response) and not send.has_started:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_error(response: _Response, status: int, message: str) -> None:
    """Respond with an error message; only end the response if it has started."""
    if response.has_started:
        return await response({"type": "http.response.body", "body": b""})
    body = json.dumps({"detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await response({"type": "http.response.start", "status": status, "headers": headers})
    await response({"type": "http.response.body", "body": body})
