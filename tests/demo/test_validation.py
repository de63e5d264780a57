"""Calls of the demo's handlers: whatever else browsers send is refused with a message."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import PHOTOS, load_script

pytest.importorskip("gradio")

from timm_bcos import InputError
from timm_bcos.demo.app import App
from timm_bcos.demo.validation import CallValidator, data_url, index_below, list_of, one_of, server_state

HAT = load_script("demo_load").data_url(PHOTOS / "clothes" / "hat.jpg")
FILE_DATA = {"path": "http://127.0.0.1/x", "url": "http://127.0.0.1/x", "meta": {"_type": "gradio.FileData"}}
FUNCTIONS = {
    0: [
        ("the prediction", server_state), ("the class", index_below(10, or_none=True)),
        ("the list", list_of(one_of(["ig"]))),
    ],
    2: [("the model", one_of(["clothes"])), ("the photo", data_url)],
}  # fmt: skip
GOOD = {"data": ["clothes", "data:,x"], "event_data": {}, "fn_index": 2, "trigger_id": 5, "session_hash": "abc"}


def test_valid_calls_are_rebuilt() -> None:
    checked = json.loads(CallValidator(FUNCTIONS).join(json.dumps(GOOD).encode()))
    assert checked == {"data": ["clothes", "data:,x"], "fn_index": 2, "session_hash": "abc"}
    assert json.loads(CallValidator(FUNCTIONS).cancel(b'{"fn_index": 0, "event_id": "a1", "session_hash": "abc"}')) == {
        "fn_index": 0, "event_id": "a1", "session_hash": "abc",
    }  # fmt: skip


HOSTILE: dict[str, list[Any]] = {
    "not the index of a function": [
        {**GOOD, "fn_index": value} for value in (None, 3, -1, 2.0, True, "2", [2], 10**30, {"path": "x"})
    ],
    "not a list of 2 arguments": [
        {**GOOD, "data": value} for value in (None, [], ["clothes"], ["a"] * 3, "ab", {"0": 1})
    ],
    "not one of the 1 choices": [
        {**GOOD, "data": [value, None]} for value in (None, "", "x", 0, ["clothes"], FILE_DATA)
    ],
    "is not a photo": [
        {**GOOD, "data": ["clothes", value]} for value in (0, [], FILE_DATA, [FILE_DATA], {"a": [FILE_DATA]}, "ä", True)
    ],
    "is state of the server": [{**GOOD, "fn_index": 0, "data": [value, 0, []]} for value in (0, FILE_DATA, "x", [])],
    "integer from 0 to 9": [
        {**GOOD, "fn_index": 0, "data": [None, value, []]} for value in (10, -1, 1.0, True, "1", [1], FILE_DATA)
    ],
    "is not a list": [
        {**GOOD, "fn_index": 0, "data": [None, 0, value]} for value in (None, "ig", 0, {"ig": 1}, FILE_DATA)
    ],
    "has an item that": [
        {**GOOD, "fn_index": 0, "data": [None, 0, value]} for value in (["bcos"], [None], [["ig"]], [FILE_DATA])
    ],
    "an item twice": [{**GOOD, "fn_index": 0, "data": [None, 0, ["ig", "ig"]]}],
    "must be empty": [{**GOOD, "event_data": FILE_DATA}, {**GOOD, "event_data": [1]}, {**GOOD, "event_id": "x"}],
    "session_hash is not a name": [
        {**GOOD, "session_hash": value} for value in (None, "", "a" * 65, "a/b", "a<gradio-sep>b", "ä", 3, ["a"])
    ],
    "is not an object of": [
        [GOOD], 3, None, {**GOOD, "batched": True}, {**GOOD, "simple_format": True}, {**GOOD, "oauth_token": "x"},
    ],
    "is not the number of a component": [{**GOOD, "trigger_id": value} for value in ("5", 1.5, [5])],
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), [(s, call) for s, calls in HOSTILE.items() for call in calls])
def test_invalid_calls_get_a_message(message: str, call: Any) -> None:
    with pytest.raises(InputError, match=message) as error:
        CallValidator(FUNCTIONS).join(json.dumps(call).encode())
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
def test_invalid_json_gets_a_message(body: bytes) -> None:
    with pytest.raises(InputError, match="the request is not"):
        CallValidator(FUNCTIONS).join(body)


def test_too_many_values_are_refused() -> None:
    for body in (b"[" * 100_000, b'{"data": [' + b"[]," * 1_000_000 + b"0]}"):
        with pytest.raises(InputError, match="too many values"):
            CallValidator(FUNCTIONS).join(body)


def test_layers_of_another_model_get_a_message(client: Any) -> None:
    """The validation knows all models, but not which one a client has selected."""
    small = next(choice for choice in client.config["components"] if choice["props"].get("elem_id") == "model")
    cifar = next(value for _, value in small["props"]["choices"] if "cifar" in value)
    client.call("change_photo", cifar, HAT)
    shown = client.call("show_units", None, "blocks.4")["output"]["data"][0]
    assert "no layer" in shown and "blocks.4" in shown


def test_every_handler_is_validated(app: App) -> None:
    functions: dict[int, Callable[..., Any]] = {i: one.fn for i, one in app.fns.items() if one.fn is not None}
    assert app.validator.functions.keys() == functions.keys()
    assert not app.api_open and not any(one.preprocess for one in app.fns.values() if one.fn is not None)
