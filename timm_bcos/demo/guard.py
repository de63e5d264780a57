"""What reaches Gradio: the few requests that the page itself makes. Everything else is answered here."""

import asyncio
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from ..errors import InputError
from .calls import NAME
from .limits import CONNECTIONS, HELD, LARGEST_CALL, SECONDS_OF_A_BODY
from .work import CLOSING

__all__ = ["ROUTES", "Guard", "Listeners", "Route", "find_route"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
ExactnessReport = Callable[[bytes], bytes]

FILE = r"(?:[A-Za-z0-9_@-][A-Za-z0-9_.@-]*/)*[A-Za-z0-9_@-][A-Za-z0-9_.@-]*"  # no part of it begins with a dot

# What Gradio would heed: it lets any site call the page if that site is named as the origin, and writes any address
# into the page as its own, to which photos would then be sent.
HIDDEN = {b"origin", b"x-gradio-server"}

BUSY = "the page is busy: try again in a minute"
POLL = 0.2  # seconds between two looks at whether the page is being closed

_logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """A request that the page makes.

    Attributes:
        method: Of HTTP.
        path: A regular expression for the whole of it.
        largest: Bytes of its body.
        query: The parameters that Gradio gets to see; all others are left out.
        is_stream: Whether its answer goes on until the browser hangs up.
    """

    method: str
    path: str
    largest: int = 0
    query: tuple[str, ...] = ()
    is_stream: bool = False


# A route of Gradio's that is not here is answered by 404, also one that a later version adds. Left out on purpose:
# /upload, /process_recording, /component_server and /deep_link write files; /file, /proxy and /stream read them, or
# fetch addresses; /run, /api and /call go around the queue or the checks of `timm_bcos.demo.calls`.
ROUTES = (
    Route("GET", "/"),
    Route("HEAD", "/"),
    Route("GET", rf"/(?:assets|static)/{FILE}"),
    Route("GET", r"(?:/gradio_api)?/theme\.css"),
    Route("GET", r"/favicon\.ico"),
    Route("GET", r"/robots\.txt"),
    Route("GET", r"/manifest\.json"),
    Route("GET", "/config"),  # what `/` holds too, for programs
    Route("GET", "/gradio_api/app_id/?"),  # by which a browser notices that the page has been started again
    Route("GET", "/gradio_api/startup-events"),  # asked for once, by Gradio's own start
    Route("GET", rf"/gradio_api/heartbeat/{NAME}", is_stream=True),
    Route("GET", "/gradio_api/queue/data", query=("session_hash",), is_stream=True),
    Route("POST", "/gradio_api/queue/join", largest=LARGEST_CALL),
    Route("POST", "/gradio_api/cancel", largest=1_000),
)


def find_route(method: str, path: str) -> Route | None:
    """The row of the table that allows a request; None if there is none."""
    return next((route for route in ROUTES if route.method == method and re.fullmatch(route.path, path)), None)


class Listeners:
    """The visitors who listen for answers now."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, session: str) -> bool:
        return self._streams[session] > 0

    def change(self, session: str, by: int) -> None:
        """One stream more, or one less."""
        with self._lock:
            self._streams[session] += by
            if not self._streams[session]:
                del self._streams[session]


class Refused(Exception):  # noqa: N818  (an answer, not an error)
    """A request that is answered by a sentence.

    Attributes:
        status: Of HTTP.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Guard:
    """Around an ASGI app: an allow-list of requests, checks of their bodies, and an end for streams.

    Args:
        app: What it guards, Gradio's middleware included: some of it answers by itself.
        checks: By path, what makes of a body the one that Gradio reads; it raises `InputError` for one that it refuses.
        listeners: Told of every stream of answers.
        closing: Set when the page is being closed: then nothing new begins, and streams end with a sentence.
    """

    def __init__(
        self, app: App, checks: Mapping[str, ExactnessReport], listeners: Listeners, closing: threading.Event
    ) -> None:
        self.app, self.checks, self.listeners, self.closing = app, checks, listeners, closing
        self.held = self.connections = 0
        self.reading: list[_Held] = []  # the oldest first

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        started = _Started(send)
        self.connections += 1
        try:
            await self._answer(scope, receive, started)
        except Refused as refusal:
            if refusal.status != 404:
                _tell(f"refused {scope['method']} {scope['path'][:100]!r}: {refusal}")
            await _reply(started, refusal.status, str(refusal))
        except Exception as error:  # Gradio's, for instance of a stream that nobody has asked for
            _tell(f"{scope['method']} {scope['path'][:100]!r} failed: {type(error).__name__}: {error}"[:300])
            await _reply(started, 500, "the page failed here")
        finally:
            self.connections -= 1

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        route = find_route(scope["method"], scope["path"])
        if route is None:
            raise Refused(404, "the page has no such address")
        if self.closing.is_set():
            raise Refused(503, CLOSING)
        if self.connections > CONNECTIONS:
            raise Refused(503, BUSY)
        asked = parse_qsl(scope["query_string"].decode("latin-1")) if route.query else []
        query = {name: value for name, value in asked if name in route.query}
        scope = dict(scope, query_string="&".join(f"{name}={value}" for name, value in query.items()).encode())
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in HIDDEN]
        if not all(re.fullmatch(NAME, value) for value in query.values()) or len(query) < len(route.query):
            raise Refused(422, "a session's name is 1 to 64 letters and digits")
        if route.is_stream:
            return await self._stream(scope, receive, send, query.get("session_hash"))
        if not route.largest:
            _refuse_body(scope)
            return await self.app(scope, receive, send)
        if not dict(scope["headers"]).get(b"content-type", b"").lower().startswith(b"application/json"):
            raise Refused(415, "send JSON")  # other sites' pages may send other kinds without asking
        with _Held(self) as held:
            body = await self._read(scope, receive, route.largest, held)
            try:
                body = await asyncio.to_thread(self.checks[scope["path"]], body)
            except InputError as error:
                raise Refused(422, str(error)) from None
            await self.app(_with_json(scope, body), _replayed(body, receive), send)

    async def _read(self, scope: Message, receive: Receive, largest: int, held: "_Held") -> bytes:
        """A request's body, before anybody else sees a byte of it."""
        if _stated_length(scope) > largest:
            raise Refused(413, "the request is too large")
        parts = bytearray()
        end = time.monotonic() + SECONDS_OF_A_BODY
        while time.monotonic() < end:
            held.hold(len(parts))
            try:
                message = await asyncio.wait_for(receive(), POLL)
            except asyncio.TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                raise Refused(400, "the request was broken off")
            parts += message.get("body", b"")
            if len(parts) > largest:
                raise Refused(413, "the request is too large")
            if not message.get("more_body"):
                held.hold(len(parts))
                self.reading.remove(held)
                return bytes(parts)
        raise Refused(408, "the request takes too long")

    async def _stream(self, scope: Message, receive: Receive, send: Send, session: str | None) -> None:
        """Hand a stream on until it ends, or the page does."""
        _refuse_body(scope)
        if session:
            self.listeners.change(session, +1)
        task = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not task.done() and not self.closing.is_set():
                await asyncio.wait({task}, timeout=POLL)
            if task.done():
                return task.result()
        finally:
            if session:
                self.listeners.change(session, -1)
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=POLL)
        return await _last_event(send, session)


class _Held:
    """The bytes that one request holds of what all may hold together.

    If that is too much, the oldest that is still being sent gives way: a few that never end would keep all others out.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard, self.size, self.gives_way = guard, 0, False

    def __enter__(self) -> "_Held":
        self.guard.reading.append(self)
        return self

    def hold(self, size: int) -> None:
        if not self.gives_way:
            self.guard.held += size - self.size
            self.size = size
        while self.guard.held > HELD and self.guard.reading:
            self.guard.reading[0].give_way()
        if self.gives_way:
            raise Refused(503, BUSY)

    def give_way(self) -> None:
        self.gives_way = True
        self._release()

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self.guard.held -= self.size
        self.size = 0
        if self in self.guard.reading:
            self.guard.reading.remove(self)


class _Started:
    """`send` that knows whether the answer has begun, and whether it has ended."""

    def __init__(self, send: Send) -> None:
        self.send, self.has_begun, self.has_ended = send, False, False

    async def __call__(self, message: Message) -> None:
        if self.has_ended:
            return
        self.has_begun = True
        self.has_ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send(message)


def _tell(line: str) -> None:
    _logger.warning("%s", " ".join(line.split()))


def _refuse_body(scope: Message) -> None:
    if _stated_length(scope) or b"transfer-encoding" in dict(scope["headers"]):
        raise Refused(413, "this request has no body")


def _stated_length(scope: Message) -> int:
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    return int(stated[:20]) if stated.isdigit() else 0


def _with_json(scope: Message, body: bytes) -> Message:
    """A request whose headers say what its body is now."""
    old = {b"content-length", b"content-type", b"transfer-encoding", b"content-encoding"}
    headers = [(name, value) for name, value in scope["headers"] if name not in old]
    new = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return dict(scope, headers=headers + new)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A request's body once more, in one piece."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pieces.pop() if pieces else await receive()

    return replay


async def _last_event(send: Send, session: str | None) -> None:
    """The end of a stream, as Gradio's pages understand it."""
    event = {"msg": "unexpected_error", "message": CLOSING, "session_not_found": False, "success": False}
    body = f"data: {json.dumps(event)}\n\n".encode() if session else b""
    if isinstance(send, _Started) and not send.has_begun:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _reply(send: _Started, status: int, sentence: str) -> None:
    """A sentence as the whole answer; nothing where the answer has begun."""
    if send.has_begun:
        return await send({"type": "http.response.body", "body": b""})
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
