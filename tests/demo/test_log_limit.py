"""The demo's log: a line per invalid request, and a limited number of lines in all."""

import logging
import socket
from typing import Any

import pytest

pytest.importorskip("gradio")

from timm_bcos.demo import limits
from timm_bcos.demo.limits import LOG_LINES_PER_MINUTE


def test_invalid_calls_write_one_line_each(
    client: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    take, compare = client.functions["change_photo"], client.functions["compare"]
    calls: list[tuple[int, list[Any]]] = [
        (take, [None, None]), (take, []), (take, [client.model, {"path": "x"}]), (99, []), (-1, []),
        (compare, [None, 0, "rise"]), (compare, [None, "Egyptian cat", []]), (compare, [None, 0, None]),
        (compare, [None, 0, ["no\nmethod"]]),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        for number, arguments in calls * 5:
            status, answer = client.join(number, *arguments)
            assert status == 422 and 10 < len(answer["detail"]) < 120, answer
        status, _ = client.request("GET", "/gradio_api/queue/data?session_hash=nobody")
    assert status == 200
    lines = [record.getMessage() for record in caplog.records]
    assert 0 < len(lines) <= LOG_LINES_PER_MINUTE and not any("\n" in line for line in lines)
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said + caplog.text


def test_invalid_http_does_not_fill_the_log(port: int, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * LOG_LINES_PER_MINUTE):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                assert connection.recv(1000).split()[1] == b"400"
        assert client.request("POST", "/gradio_api/cancel", {})[0] == 422
    ours = [record for record in caplog.records if record.name.startswith(("uvicorn", "timm_bcos.demo"))]
    assert len(ours) <= 2 * LOG_LINES_PER_MINUTE, "a minute may end meanwhile"


def test_the_limit_holds_for_several_loggers_together(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(limits.time, "monotonic", lambda: now)
    one, other = logging.getLogger("one of ours"), logging.getLogger("another of ours")
    with limits.LogLimit().on(one.name, other.name):
        for minute in range(2):
            now = 60.0 * minute + 1
            for number in range(LOG_LINES_PER_MINUTE):
                (one, other)[number % 2].error("line %d", number)
                other.error("again", exc_info=ValueError("with a traceback"))
    other.error("free again")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 * LOG_LINES_PER_MINUTE + 1 and messages[-1] == "free again"
    assert [i for i, line in enumerate(messages, 1) if line == limits.LogLimit.MESSAGE] == [
        LOG_LINES_PER_MINUTE,
        2 * LOG_LINES_PER_MINUTE,
    ]
    assert caplog.records[LOG_LINES_PER_MINUTE - 1].exc_info is None
