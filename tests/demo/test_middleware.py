"""Requests to the demo, over loopback: only those of its own page reach Gradio."""

import http.client
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import PHOTOS

pytest.importorskip("gradio")

from timm_bcos.demo import middleware
from timm_bcos.demo.app import App
from timm_bcos.demo.limits import MAX_SESSIONS, UNREAD_SESSIONS
from timm_bcos.demo.middleware import find_route


def routes_of(router: Any) -> Iterator[tuple[str, str]]:
    """Methods and paths of an app, including those of its routers."""
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from routes_of(included)
        elif getattr(route, "path", None) is not None:
            for method in getattr(route, "methods", None) or ["GET"]:
                yield method, route.path


def filled(path: str) -> str:
    """A route's path with its parameters filled in."""
    return re.sub(r"\{[^}]*\}", "x", path)


SERVED = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/assets/x"), ("GET", "/static/x"), ("GET", "/theme.css"),
    ("GET", "/gradio_api/theme.css"), ("GET", "/favicon.ico"), ("GET", "/robots.txt"), ("GET", "/manifest.json"),
    ("GET", "/gradio_api/app_id"), ("GET", "/gradio_api/app_id/"), ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/heartbeat/x"), ("GET", "/gradio_api/queue/data"), ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/cancel"), ("GET", "/config"),
}  # fmt: skip


def test_routes_that_are_not_listed_are_not_found(app: App, client: Any) -> None:
    routes = {(method, filled(path)) for method, path in routes_of(app.app)}
    assert len(routes) > 60, "Gradio keeps its routes elsewhere now"
    assert ("GET", "/gradio_api/deep_link") in routes and ("POST", "/gradio_api/upload") in routes
    assert {route for route in routes if find_route(*route)} == SERVED
    for method, path in sorted(routes - SERVED):
        body = b"" if method in ("GET", "HEAD") else b"{}"
        assert client.request(method, path, body or None)[0] == 404, f"{method} {path}"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/deep_link?session_hash=x", "/gradio_api//upload", "/gradio_api/upload/", "/gradio_api/%75pload",
        "/gradio_api/%2575pload", "//gradio_api/upload", "/GRADIO_API/upload", "/gradio_api/queue/join/../../upload",
        "/assets/../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/static/.hidden",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/", "/config/?deep_link=x", "/gradio_api/info", "/monitoring",
        "/gradio_api/queue/join;x", "/gradio_api/run/predict", "/gradio_api/api/change_photo",
        "/gradio_api/call/compare",
        "/gradio_api/heartbeat/a/b", "/gradio_api/queue/status", "/docs", "/openapi.json", "/gradio_api/openapi.json",
    ],
)  # fmt: skip
def test_other_paths_are_not_found(client: Any, method: str, path: str) -> None:
    status, _ = client.request(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None)
    assert status == 404


def test_query_parameters_are_dropped(client: Any) -> None:
    _, plain = client.request("GET", "/")
    for query in ("deep_link=" + "a" * 43, "page=nowhere", "__theme=dark&deep_link=../x", "all_endpoints=1"):
        status, page = client.request("GET", f"/?{query}")
        assert status == 200 and page == plain
    assert client.request("GET", "/config?deep_link=x")[1] == client.request("GET", "/config")[1]


def test_web_sockets_are_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        lines = [
            "GET /gradio_api/queue/join HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", "",
        ]  # fmt: skip
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(1000).split()[1] in (b"403", b"404")


@pytest.mark.parametrize("host", ["127.0.0.1", "demo.example"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_no_other_origin_is_allowed(client: Any, host: str, origin: str) -> None:
    """Browsers send JSON across origins only after a preflight request that allows it."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for method, path, status in [
        ("OPTIONS", "/gradio_api/queue/join", 404), ("OPTIONS", "/nowhere", 404), ("GET", "/config", 200),
    ]:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        connection.request(method, path, headers={"Host": host, "Origin": origin, **asked})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        granted = [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
        assert (answer.status, granted) == (status, [])


def test_the_address_cannot_be_changed_by_headers(client: Any) -> None:
    """Browsers send photos to the root that the page contains."""
    for path in ("/", "/config"):
        _, page = client.request("GET", path, **{"X-Gradio-Server": "https://evil.example", "Host": "demo.example"})
        assert b'"root":"http://demo.example"' in page and b"evil.example" not in page


def test_other_parameters_of_a_stream_are_dropped(client: Any) -> None:
    many = "&".join(f"a{number}=1" for number in range(50))
    assert client.request("GET", f"/gradio_api/queue/data?{many}")[0] == 422
    assert client.request("GET", f"/gradio_api/queue/data?{many}&session_hash=nobody")[0] == 200


def test_large_requests_are_refused(port: int, client: Any) -> None:
    json_kind = {"Content-Type": "application/json"}
    assert client.request("POST", "/gradio_api/cancel", bytes(2_000), **json_kind)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/gradio_api/queue/join", iter([bytes(1_000_000)] * 40), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked", **json_kind})  # fmt: skip
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionError):
        pass  # it hangs up while the flood still comes
    finally:
        connection.close()
    assert client.request("GET", "/gradio_api/startup-events", b"x" * 100)[0] == 413
    assert client.request("POST", "/gradio_api/queue/join", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert client.request("GET", "/")[0] == 200


def start_request(port: int, size: int) -> socket.socket:
    """Send a part of a request."""
    head = [
        "POST /gradio_api/queue/join HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        "Content-Length: 900000",
    ]
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall("\r\n".join([*head, "", ""]).encode() + bytes(size))
    return connection


def test_requests_that_never_end_do_not_block_others(port: int, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BUFFERED_BYTES", 1_000_000)
    slow: list[socket.socket] = []
    try:
        for number in range(3):
            slow.append(start_request(port, 800_000))
            if number:
                assert slow[number - 1].recv(1000).split()[1] == b"503", "the older one gives way"
        monkeypatch.setattr(middleware, "BUFFERED_BYTES", 850_000)
        assert client.change_photo(PHOTOS / "coffee.jpg")["success"]
        assert slow[-1].recv(1000).split()[1] == b"503"
    finally:
        for connection in slow:
            connection.close()


def test_gradio_keeps_no_more_than_the_limits(app: App, port: int) -> None:
    kept, events = app._queue.pending_messages_per_session, app._queue.pending_event_ids_session
    app.handlers.connected.add("heard")
    kept["heard"], events["heard"] = None, {"its call"}
    for number in range(UNREAD_SESSIONS + 5):
        kept[f"session {number}"], events[f"session {number}"] = None, {"a call"}
    assert "heard" in kept and kept.keys() == events.keys() and len(kept) == UNREAD_SESSIONS + 1
    app.handlers.connected.remove("heard")
    kept["one more"] = None
    assert "heard" not in kept and len(kept) == UNREAD_SESSIONS
    kept["session 0"].put_nowait("an answer to somebody who has been forgotten")
    assert "session 0" not in kept
    for session in list(kept):
        del kept[session]
    assert not events
    assert app.app.state_holder.capacity == MAX_SESSIONS
