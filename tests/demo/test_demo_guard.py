"""What strangers may send to the page, over loopback. Nothing of it is stored or fetched, no traceback is logged."""

import http.client
import json
import logging
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import PHOTOS, load_script

pytest.importorskip("gradio")

from timm_bcos import InputError
from timm_bcos.demo import guard, log
from timm_bcos.demo.app import App, build_app, serving
from timm_bcos.demo.calls import Calls, a_photo, one_of, several_of, the_visit, whole_number_below
from timm_bcos.demo.guard import find_route
from timm_bcos.demo.limits import LINES_A_MINUTE, REMEMBERED, UNHEARD
from timm_bcos.demo.visits import embedded_networks
from timm_bcos.models.class_names import read_class_names

load = load_script("demo_load")
HAT = load.address_of(PHOTOS / "clothes" / "hat.jpg")
FILE_DATA = {
    "path": "http://127.0.0.1:{port}/x",
    "url": "http://127.0.0.1:{port}/x",
    "meta": {"_type": "gradio.FileData"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[App]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        yield build_app(embedded_networks()[1:])


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    port = load.free_port()
    with serving(app, port):
        yield port


@pytest.fixture
def visitor(port: int) -> Any:
    return load.Visitor(port)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- requests -------------------------------------------------------------------------------------------------------


def routes_of(router: Any) -> Iterator[tuple[str, str]]:
    """Methods and paths of all that an app answers; included routers hold their own."""
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from routes_of(included)
        elif getattr(route, "path", None) is not None:
            for method in getattr(route, "methods", None) or ["GET"]:
                yield method, route.path


def filled(path: str) -> str:
    """A route's path with something in the place of its parameters."""
    return re.sub(r"\{[^}]*\}", "x", path)


SERVED = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/assets/x"), ("GET", "/static/x"), ("GET", "/theme.css"),
    ("GET", "/gradio_api/theme.css"), ("GET", "/favicon.ico"), ("GET", "/robots.txt"), ("GET", "/manifest.json"),
    ("GET", "/gradio_api/app_id"), ("GET", "/gradio_api/app_id/"), ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/heartbeat/x"), ("GET", "/gradio_api/queue/data"), ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/cancel"), ("GET", "/config"),
}  # fmt: skip


def test_every_route_of_the_running_app_is_in_the_table_or_not_there(app: App, visitor: Any) -> None:
    routes = {(method, filled(path)) for method, path in routes_of(app.app)}
    assert len(routes) > 60, "Gradio keeps its routes elsewhere now"
    assert ("GET", "/gradio_api/deep_link") in routes and ("POST", "/gradio_api/upload") in routes
    assert {route for route in routes if find_route(*route)} == SERVED
    for method, path in sorted(routes - SERVED):
        body = b"" if method in ("GET", "HEAD") else b"{}"
        assert visitor.request(method, path, body or None)[0] == 404, f"{method} {path}"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/deep_link?session_hash=x", "/gradio_api//upload", "/gradio_api/upload/", "/gradio_api/%75pload",
        "/gradio_api/%2575pload", "//gradio_api/upload", "/GRADIO_API/upload", "/gradio_api/queue/join/../../upload",
        "/assets/../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/static/.hidden",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/", "/config/?deep_link=x", "/gradio_api/info", "/monitoring",
        "/gradio_api/queue/join;x", "/gradio_api/run/predict", "/gradio_api/api/take_photo", "/gradio_api/call/compare",
        "/gradio_api/heartbeat/a/b", "/gradio_api/queue/status", "/docs", "/openapi.json", "/gradio_api/openapi.json",
    ],
)  # fmt: skip
def test_nothing_else_is_there(visitor: Any, method: str, path: str) -> None:
    status, _ = visitor.request(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None)
    assert status == 404


def test_the_page_itself_takes_no_parameters(visitor: Any) -> None:
    _, plain = visitor.request("GET", "/")
    for query in ("deep_link=" + "a" * 43, "page=nowhere", "__theme=dark&deep_link=../x", "all_endpoints=1"):
        status, page = visitor.request("GET", f"/?{query}")
        assert status == 200 and page == plain
    assert visitor.request("GET", "/config?deep_link=x")[1] == visitor.request("GET", "/config")[1]


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
def test_other_sites_may_not_call(visitor: Any, host: str, origin: str) -> None:
    """A browser asks first for leave to send JSON to another site; without headers that grant it, it sends nothing."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for method, path, status in [
        ("OPTIONS", "/gradio_api/queue/join", 404), ("OPTIONS", "/nowhere", 404), ("GET", "/config", 200),
    ]:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", visitor.port, timeout=30)
        connection.request(method, path, headers={"Host": host, "Origin": origin, **asked})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        granted = [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
        assert (answer.status, granted) == (status, [])


def test_the_page_is_told_no_other_address_of_its_own(visitor: Any) -> None:
    """What the page holds as its root is where a browser sends the photo."""
    for path in ("/", "/config"):
        _, page = visitor.request("GET", path, **{"X-Gradio-Server": "https://evil.example", "Host": "demo.example"})
        assert b'"root":"http://demo.example"' in page and b"evil.example" not in page


def test_other_parameters_of_a_stream_are_left_out(visitor: Any) -> None:
    many = "&".join(f"a{number}=1" for number in range(50))
    assert visitor.request("GET", f"/gradio_api/queue/data?{many}")[0] == 422
    assert visitor.request("GET", f"/gradio_api/queue/data?{many}&session_hash=nobody")[0] == 200


def test_large_requests_are_cut_off_whatever_they_state(port: int, visitor: Any) -> None:
    json_kind = {"Content-Type": "application/json"}
    assert visitor.request("POST", "/gradio_api/cancel", bytes(2_000), **json_kind)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/gradio_api/queue/join", iter([bytes(1_000_000)] * 40), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked", **json_kind})  # fmt: skip
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionError):
        pass  # it hangs up while the flood still comes
    finally:
        connection.close()
    assert visitor.request("GET", "/gradio_api/startup-events", b"x" * 100)[0] == 413
    assert visitor.request("POST", "/gradio_api/queue/join", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert visitor.request("GET", "/")[0] == 200


def begun(port: int, size: int) -> socket.socket:
    """A request that does not go on."""
    head = [
        "POST /gradio_api/queue/join HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        "Content-Length: 900000",
    ]
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall("\r\n".join([*head, "", ""]).encode() + bytes(size))
    return connection


def test_requests_that_never_end_keep_nobody_out(port: int, visitor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HELD", 1_000_000)
    slow: list[socket.socket] = []
    try:
        for number in range(3):
            slow.append(begun(port, 800_000))
            if number:
                assert slow[number - 1].recv(1000).split()[1] == b"503", "the older one gives way"
        monkeypatch.setattr(guard, "HELD", 850_000)
        assert visitor.take_photo(PHOTOS / "coffee.jpg")["success"]
        assert slow[-1].recv(1000).split()[1] == b"503"
    finally:
        for connection in slow:
            connection.close()


# ---- calls ----------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    0: [
        ("the visit", the_visit), ("the class", whole_number_below(10, or_none=True)),
        ("the list", several_of(one_of(["ig"]))),
    ],
    2: [("the network", one_of(["clothes"])), ("the photo", a_photo)],
}  # fmt: skip
GOOD = {"data": ["clothes", "data:,x"], "event_data": {}, "fn_index": 2, "trigger_id": 5, "session_hash": "abc"}


def test_a_call_is_handed_on_without_what_nobody_reads() -> None:
    checked = json.loads(Calls(FUNCTIONS).join(json.dumps(GOOD).encode()))
    assert checked == {"data": ["clothes", "data:,x"], "fn_index": 2, "session_hash": "abc"}
    assert json.loads(Calls(FUNCTIONS).cancel(b'{"fn_index": 0, "event_id": "a1", "session_hash": "abc"}')) == {
        "fn_index": 0, "event_id": "a1", "session_hash": "abc",
    }  # fmt: skip


HOSTILE: dict[str, list[Any]] = {
    "no number of a function": [
        {**GOOD, "fn_index": value} for value in (None, 3, -1, 2.0, True, "2", [2], 10**30, {"path": "x"})
    ],
    "no list of 2 arguments": [{**GOOD, "data": value} for value in (None, [], ["clothes"], ["a"] * 3, "ab", {"0": 1})],
    "none of the 1 choices": [{**GOOD, "data": [value, None]} for value in (None, "", "x", 0, ["clothes"], FILE_DATA)],
    "is no photo": [
        {**GOOD, "data": ["clothes", value]} for value in (0, [], FILE_DATA, [FILE_DATA], {"a": [FILE_DATA]}, "ä", True)
    ],
    "is kept by the page": [{**GOOD, "fn_index": 0, "data": [value, 0, []]} for value in (0, FILE_DATA, "x", [])],
    "whole number from 0 to 9": [
        {**GOOD, "fn_index": 0, "data": [None, value, []]} for value in (10, -1, 1.0, True, "1", [1], FILE_DATA)
    ],
    "is no list": [
        {**GOOD, "fn_index": 0, "data": [None, 0, value]} for value in (None, "ig", 0, {"ig": 1}, FILE_DATA)
    ],
    "holds what": [
        {**GOOD, "fn_index": 0, "data": [None, 0, value]} for value in (["bcos"], [None], [["ig"]], [FILE_DATA])
    ],
    "something twice": [{**GOOD, "fn_index": 0, "data": [None, 0, ["ig", "ig"]]}],
    "stay empty": [{**GOOD, "event_data": FILE_DATA}, {**GOOD, "event_data": [1]}, {**GOOD, "event_id": "x"}],
    "session_hash is no name": [
        {**GOOD, "session_hash": value} for value in (None, "", "a" * 65, "a/b", "a<gradio-sep>b", "ä", 3, ["a"])
    ],
    "is no object of": [
        [GOOD], 3, None, {**GOOD, "batched": True}, {**GOOD, "simple_format": True}, {**GOOD, "oauth_token": "x"},
    ],
    "is no number of a component": [{**GOOD, "trigger_id": value} for value in ("5", 1.5, [5])],
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "call"), [(s, call) for s, calls in HOSTILE.items() for call in calls])
def test_other_calls_get_a_sentence(sentence: str, call: Any) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        Calls(FUNCTIONS).join(json.dumps(call).encode())
    assert len(str(error.value)) < 120


NO_JSON = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 1_500,
    b'{"data": ' + b"9" * 5_000 + b"}",
    b'{"a": "\\ud8"}',
    "{}".encode("utf-16"),
]


@pytest.mark.parametrize("body", NO_JSON)
def test_what_is_no_json_gets_a_sentence(body: bytes) -> None:
    with pytest.raises(InputError, match="the request is no"):
        Calls(FUNCTIONS).join(body)


def test_many_values_are_refused_before_they_take_memory() -> None:
    for body in (b"[" * 100_000, b'{"data": [' + b"[]," * 1_000_000 + b"0]}"):
        with pytest.raises(InputError, match="too many values"):
            Calls(FUNCTIONS).join(body)


def test_hostile_calls_are_a_line_each_in_the_log_and_few_lines_in_all(
    visitor: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    take, compare = visitor.functions["take_photo"], visitor.functions["compare"]
    calls: list[tuple[int, list[Any]]] = [
        (take, [None, None]), (take, []), (take, [visitor.network, {"path": "x"}]), (99, []), (-1, []),
        (compare, [None, 0, "rise"]), (compare, [None, "Egyptian cat", []]), (compare, [None, 0, None]),
        (compare, [None, 0, ["no\nmethod"]]),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for number, arguments in calls * 5:
            status, answer = visitor.join(number, *arguments)
            assert status == 422 and 10 < len(answer["detail"]) < 120, answer
        status, _ = visitor.request("GET", "/gradio_api/queue/data?session_hash=nobody")
    assert status == 200
    lines = [record.getMessage() for record in caplog.records]
    assert 0 < len(lines) <= LINES_A_MINUTE and not any("\n" in line for line in lines)
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said + caplog.text


def test_what_is_no_http_does_not_fill_the_log(port: int, visitor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * LINES_A_MINUTE):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                assert connection.recv(1000).split()[1] == b"400"
        assert visitor.request("POST", "/gradio_api/cancel", {})[0] == 422
    ours = [record for record in caplog.records if record.name.startswith(("uvicorn", "timm_bcos.demo"))]
    assert len(ours) <= 2 * LINES_A_MINUTE, "a minute may end meanwhile"


def test_few_lines_of_several_loggers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    one, other = logging.getLogger("one of ours"), logging.getLogger("another of ours")
    with log.FewLines().on(one.name, other.name):
        for minute in range(2):
            now = 60.0 * minute + 1
            for number in range(LINES_A_MINUTE):
                (one, other)[number % 2].error("line %d", number)
                other.error("again", exc_info=ValueError("with a traceback"))
    other.error("free again")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 * LINES_A_MINUTE + 1 and told[-1] == "free again"
    assert [i for i, line in enumerate(told, 1) if line == log.MORE] == [LINES_A_MINUTE, 2 * LINES_A_MINUTE]
    assert caplog.records[LINES_A_MINUTE - 1].exc_info is None


def test_wrong_classes_and_layers_for_a_network_get_a_sentence(visitor: Any) -> None:
    """The door knows the classes of all networks, not which one this visitor has chosen."""
    small = next(choice for choice in visitor.config["components"] if choice["props"].get("elem_id") == "network")
    cifar = next(value for _, value in small["props"]["choices"] if "cifar" in value)
    visitor.call("take_photo", cifar, HAT)
    shown = visitor.call("show_neurons", None, "blocks.4")["output"]["data"][0]
    assert "no layer" in shown and "blocks.4" in shown


# ---- disk and network -----------------------------------------------------------------------------------------------

_connections: list[tuple[Any, ...]] = []
_watched_threads: set[int] = set()


def _note_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and threading.get_ident() not in _watched_threads:
        _connections.append(arguments)


@pytest.fixture
def connections() -> Iterator[list[tuple[Any, ...]]]:
    """Those that other threads of this process than the test's own open: the server's."""
    if not getattr(sys, "_timm_bcos_audited", False):
        sys.addaudithook(_note_connections)
        sys._timm_bcos_audited = True  # type: ignore[attr-defined]
    _watched_threads.add(threading.get_ident())
    _connections.clear()
    yield _connections
    _watched_threads.clear()


def nested(value: Any) -> list[Any]:
    return [value, [value], {"a": {"b": [value]}}, {"value": value, "__type__": "update"}, [[[value]]]]


def test_addresses_are_not_fetched(visitor: Any, folder: Path, connections: list[Any]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        text = json.dumps(FILE_DATA).replace("{port}", str(listener.getsockname()[1]))
        hostile = [*nested(json.loads(text)), text, json.loads(text)["path"], "data:" + text]
        for value in hostile:
            for arguments in ([visitor.network, value], [value, value]):
                status, _ = visitor.join("take_photo", *arguments)
                assert status == 422 or isinstance(value, str)
            assert visitor.join("compare", value, 0, [])[0] == 422
            if not isinstance(value, str):
                assert visitor.join("take_photo", visitor.network, HAT, event_data=value)[0] == 422
        assert visitor.take_photo(PHOTOS / "clothes" / "hat.jpg")["success"]
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not connections
    assert not files_in(folder)


def recordings(visitor: Any) -> Iterator[int]:
    """What has written files, or might."""
    boundary = "x"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'.encode()
    form = part + bytes(10_000) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for path in ("process_recording", "upload", "component_server", "process_recording/", "upload?upload_id=1"):
        yield visitor.request("POST", f"/gradio_api/{path}", form, **kind)[0]
    yield visitor.request("GET", f"/gradio_api/deep_link?session_hash={visitor.session}")[0]


def test_nothing_reaches_the_disk(visitor: Any, folder: Path) -> None:
    visitor.take_photo(PHOTOS / "clothes" / "hat.jpg")
    assert set(recordings(visitor)) == {404}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert visitor.request("POST", "/gradio_api/queue/join", b"--x\r\n\r\n--x--", **form)[0] == 415
    assert not files_in(folder)


def test_nothing_is_left_after_the_end(tmp_path: Path) -> None:
    with load.demo(TMPDIR=str(tmp_path), GRADIO_TEMP_DIR=str(tmp_path / "gradio"), OMP_NUM_THREADS="1") as (_, port):
        visitor = load.Visitor(port)
        assert visitor.take_photo(PHOTOS / "coffee.jpg")["success"]
        assert visitor.call("compare", None, 3, ["ixg"])["success"]
        assert visitor.call("show_neurons", None, "blocks.4")["success"]
        assert set(recordings(visitor)) == {404}
        assert not files_in(tmp_path)
    assert not files_in(tmp_path)


# ---- names of classes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n"])
def test_names_of_classes_end_at_line_feeds_only(tmp_path: Path, end: str) -> None:
    names = ["one\u2028two", "three\x0bfour\x0c", "\x1cfive\x85", "six\rseven", ""]
    file = tmp_path / "names.txt"
    file.write_bytes(("\n".join(names) + (end or "\n")).encode())
    assert read_class_names(file, 5) == names
    file.write_bytes(b"a\r\nb\r\n")
    assert read_class_names(file, 2) == ["a", "b"]


def test_a_door_for_every_function(app: App) -> None:
    functions: dict[int, Callable[..., Any]] = {i: one.fn for i, one in app.fns.items() if one.fn is not None}
    assert app.calls.functions.keys() == functions.keys()
    assert not app.api_open and not any(one.preprocess for one in app.fns.values() if one.fn is not None)


def test_gradio_keeps_no_more_than_the_limits(app: App, port: int) -> None:
    kept, events = app._queue.pending_messages_per_session, app._queue.pending_event_ids_session
    app.answers.listeners.change("heard", +1)
    kept["heard"], events["heard"] = None, {"its call"}
    for number in range(UNHEARD + 5):
        kept[f"session {number}"], events[f"session {number}"] = None, {"a call"}
    assert "heard" in kept and kept.keys() == events.keys() and len(kept) == UNHEARD + 1
    app.answers.listeners.change("heard", -1)
    kept["one more"] = None
    assert "heard" not in kept and len(kept) == UNHEARD
    kept["session 0"].put_nowait("an answer to somebody who has been forgotten")
    assert "session 0" not in kept
    for session in list(kept):
        del kept[session]
    assert not events
    assert app.app.state_holder.capacity == REMEMBERED
