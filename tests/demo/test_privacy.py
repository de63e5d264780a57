"""Photos stay in memory: the demo writes no files and contacts no other host."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import PHOTOS, load_script

pytest.importorskip("gradio")

load = load_script("demo_load")
HAT = load.data_url(PHOTOS / "clothes" / "hat.jpg")
FILE_DATA = {
    "path": "http://127.0.0.1:{port}/x",
    "url": "http://127.0.0.1:{port}/x",
    "meta": {"_type": "gradio.FileData"},
}


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


_connections: list[tuple[Any, ...]] = []
_watched_threads: set[int] = set()


def _note_connections(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and threading.get_ident() not in _watched_threads:
        _connections.append(arguments)


@pytest.fixture
def connections() -> Iterator[list[tuple[Any, ...]]]:
    """Connections that the server opens: those of other threads than the test's."""
    if not getattr(sys, "_timm_bcos_audited", False):
        sys.addaudithook(_note_connections)
        sys._timm_bcos_audited = True  # type: ignore[attr-defined]
    _watched_threads.add(threading.get_ident())
    _connections.clear()
    yield _connections
    _watched_threads.clear()


def nested(value: Any) -> list[Any]:
    return [value, [value], {"a": {"b": [value]}}, {"value": value, "__type__": "update"}, [[[value]]]]


def test_urls_are_not_fetched(client: Any, folder: Path, connections: list[Any]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        text = json.dumps(FILE_DATA).replace("{port}", str(listener.getsockname()[1]))
        hostile = [*nested(json.loads(text)), text, json.loads(text)["path"], "data:" + text]
        for value in hostile:
            for arguments in ([client.model, value], [value, value]):
                status, _ = client.join("change_photo", *arguments)
                assert status == 422 or isinstance(value, str)
            assert client.join("compare", value, 0, [])[0] == 422
            if not isinstance(value, str):
                assert client.join("change_photo", client.model, HAT, event_data=value)[0] == 422
        assert client.change_photo(PHOTOS / "clothes" / "hat.jpg")["success"]
        with pytest.raises(TimeoutError):
            listener.accept()
    assert not connections
    assert not files_in(folder)


def recordings(client: Any) -> Iterator[int]:
    """Requests that write files in Gradio."""
    boundary = "x"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'.encode()
    form = part + bytes(10_000) + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for path in ("process_recording", "upload", "component_server", "process_recording/", "upload?upload_id=1"):
        yield client.request("POST", f"/gradio_api/{path}", form, **kind)[0]
    yield client.request("GET", f"/gradio_api/deep_link?session_hash={client.session}")[0]


def test_nothing_reaches_the_disk(client: Any, folder: Path) -> None:
    client.change_photo(PHOTOS / "clothes" / "hat.jpg")
    assert set(recordings(client)) == {404}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.request("POST", "/gradio_api/queue/join", b"--x\r\n\r\n--x--", **form)[0] == 415
    assert not files_in(folder)


def test_nothing_is_left_after_the_end(tmp_path: Path) -> None:
    with load.demo(TMPDIR=str(tmp_path), GRADIO_TEMP_DIR=str(tmp_path / "gradio"), OMP_NUM_THREADS="1") as (_, port):
        client = load.Client(port)
        assert client.change_photo(PHOTOS / "coffee.jpg")["success"]
        assert client.call("compare", None, 3, ["input_x_gradient"])["success"]
        assert client.call("show_units", None, "blocks.4")["success"]
        assert set(recordings(client)) == {404}
        assert not files_in(tmp_path)
    assert not files_in(tmp_path)
