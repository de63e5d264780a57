"""What no request to the page may do: send more than a photo, or leave a file behind."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Guard"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

FILES = "/upload"  # Gradio's address for files, which it would write to disk; nothing on the page uses it


class Guard:
    """ASGI middleware.

    Args:
        app: What it guards.
        largest: Bytes of a request's body.
    """

    def __init__(self, app: App, largest: int) -> None:
        self.app, self.largest = app, largest

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].endswith(FILES):
            return await _refuse(send, 403, b"this page takes no files")
        received, refused = 0, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            refused = received > self.largest
            return {"type": "http.disconnect"} if refused else message

        if _stated_length(scope) > self.largest:
            return await _refuse(send, 413, b"the request is too large")
        await self.app(scope, counted, send)


def _stated_length(scope: Message) -> int:
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    return int(stated) if stated.isdigit() else 0


async def _refuse(send: Send, status: int, sentence: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(sentence)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence})
