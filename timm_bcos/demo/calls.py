"""One check of everything that a call to the page holds, before Gradio reads any of it."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..errors import InputError
from .limits import LARGEST_CALL, VALUES

__all__ = ["NAME", "Calls", "Kind", "a_photo", "one_of", "several_of", "the_visit", "whole_number_below"]

Kind = Callable[[object], str]  # what is wrong with a value, in words that follow its name; nothing if it is right

JOIN = {"data", "event_data", "event_id", "fn_index", "session_hash", "trigger_id"}
CANCEL = {"event_id", "fn_index", "session_hash"}
NAME = r"[A-Za-z0-9_-]{1,64}"  # of sessions and events, as Gradio makes them


def the_visit(value: object) -> str:
    """What the page remembers of a visit: never sent."""
    return "" if value is None else "is kept by the page: send null"


def a_photo(value: object) -> str:
    """A data address; whether it is a photo is for `decode_photo` to say."""
    is_text = value is None or (isinstance(value, str) and len(value) <= LARGEST_CALL and value.isascii())
    return "" if is_text else "is no photo: send one as a data address"


def one_of(names: Collection[str], or_none: bool = False) -> Kind:
    """A choice of names."""

    def check(value: object) -> str:
        is_known = (or_none and value is None) or (isinstance(value, str) and value in names)
        return "" if is_known else f"is none of the {len(names)} choices"

    return check


def whole_number_below(count: int, or_none: bool = False) -> Kind:
    """A number from 0."""

    def check(value: object) -> str:
        is_known = (or_none and value is None) or (type(value) is int and 0 <= value < count)
        return "" if is_known else f"is no whole number from 0 to {count - 1}"

    return check


def several_of(one: Kind) -> Kind:
    """A list of different values."""

    def check(value: object) -> str:
        if not isinstance(value, list):
            return "is no list"
        problem = next(filter(None, map(one, value)), "")
        if problem:
            return f"holds what {problem}"
        return "" if len(set(value)) == len(value) else "holds something twice"

    return check


class Calls:
    """The calls that a page answers.

    Args:
        functions: By the numbers that Gradio gives them, what their arguments are called and what they may be.
    """

    def __init__(self, functions: Mapping[int, Sequence[tuple[str, Kind]]]) -> None:
        self.functions = functions

    def join(self, body: bytes) -> bytes:
        """A call of a function, with nothing in it but what has been checked.

        Raises:
            InputError: For any other.
        """
        call = _parse(body, JOIN)
        number, arguments, trigger = call.get("fn_index"), call.get("data"), call.get("trigger_id")
        kinds = self.functions.get(number) if type(number) is int else None
        if kinds is None:
            raise InputError("fn_index is no number of a function")
        if not isinstance(arguments, list) or len(arguments) != len(kinds):
            raise InputError(f"data is no list of {len(kinds)} arguments")
        for (name, kind), value in zip(kinds, arguments, strict=True):
            if problem := kind(value):
                raise InputError(f"{name} {problem}")
        if trigger is not None and type(trigger) is not int:
            raise InputError("trigger_id is no number of a component")
        if call.get("event_data") or call.get("event_id"):
            raise InputError("event_data and event_id stay empty")
        checked = {"data": arguments, "fn_index": number}
        return json.dumps({**checked, "session_hash": _name(call, "session_hash")}).encode()

    def cancel(self, body: bytes) -> bytes:
        """A call that is no longer waited for.

        Raises:
            InputError: If it is none.
        """
        call = _parse(body, CANCEL)
        number = call.get("fn_index")
        if type(number) is not int or number not in self.functions:
            raise InputError("fn_index is no number of a function")
        names = {name: _name(call, name) for name in ("session_hash", "event_id")}
        return json.dumps({"fn_index": number, **names}).encode()


def _parse(body: bytes, known: set[str]) -> dict[str, Any]:
    """A JSON object without unknown names."""
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
        raise InputError("the request holds too many values")
    try:
        call = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError("the request is no JSON") from None
    if not isinstance(call, dict) or not known >= call.keys():
        raise InputError(f"the request is no object of {', '.join(sorted(known))}")
    return call


def _name(call: Mapping[str, Any], key: str) -> str:
    """A session or an event, as Gradio names them."""
    value = call.get(key)
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise InputError(f"{key} is no name of 1 to 64 letters and digits")
    return value
