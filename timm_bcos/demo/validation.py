"""Validation of everything that browsers send, before Gradio or Pillow read it: calls and photos."""

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from PIL import Image

from ..data.photos import open_photo
from ..errors import InputError
from ..files import first_line
from .limits import MAX_JSON_VALUES, MAX_PHOTO_BYTES, MAX_REQUEST_BYTES

__all__ = [
    "NAME",
    "CallValidator",
    "Check",
    "data_url",
    "decode_photo",
    "index_below",
    "list_of",
    "one_of",
    "server_state",
]

# Calls.

Check = Callable[[object], str]  # returns the problem of a value, a phrase that follows its name; "" if there is none

JOIN = {"data", "event_data", "event_id", "fn_index", "session_hash", "trigger_id"}
CANCEL = {"event_id", "fn_index", "session_hash"}
NAME = r"[A-Za-z0-9_-]{1,64}"  # of sessions and events, as Gradio generates them


def server_state(value: object) -> str:
    """Check an argument that the server fills in by itself: clients send null."""
    return "" if value is None else "is state of the server: send null"


def data_url(value: object) -> str:
    """Check that a value may be a data URL; `decode_photo` checks the photo in it."""
    is_text = value is None or (isinstance(value, str) and len(value) <= MAX_REQUEST_BYTES and value.isascii())
    return "" if is_text else "is not a photo: send it as a data URL"


def one_of(names: Collection[str], or_none: bool = False) -> Check:
    """A check for one of several names."""

    def check(value: object) -> str:
        is_known = (or_none and value is None) or (isinstance(value, str) and value in names)
        return "" if is_known else f"is not one of the {len(names)} choices"

    return check


def index_below(count: int, or_none: bool = False) -> Check:
    """A check for an integer from 0 to count - 1."""

    def check(value: object) -> str:
        is_known = (or_none and value is None) or (type(value) is int and 0 <= value < count)
        return "" if is_known else f"is not an integer from 0 to {count - 1}"

    return check


def list_of(item: Check) -> Check:
    """A check for a list of distinct values."""

    def check(value: object) -> str:
        if not isinstance(value, list):
            return "is not a list"
        problem = next(filter(None, map(item, value)), "")
        if problem:
            return f"has an item that {problem}"
        return "" if len(set(value)) == len(value) else "has an item twice"

    return check


class CallValidator:
    """Validates the bodies of Gradio's two POST requests.

    Args:
        functions: Name and check of each argument, by the index that Gradio gives the function.
    """

    def __init__(self, functions: Mapping[int, Sequence[tuple[str, Check]]]) -> None:
        self.functions = functions

    def join(self, body: bytes) -> bytes:
        """Validate a call of a function, and rebuild it from what has been checked.

        Raises:
            InputError: If it is not a valid call.
        """
        call = _parse(body, JOIN)
        index, arguments, trigger = call.get("fn_index"), call.get("data"), call.get("trigger_id")
        checks = self.functions.get(index) if type(index) is int else None
        if checks is None:
            raise InputError("fn_index is not the index of a function")
        if not isinstance(arguments, list) or len(arguments) != len(checks):
            raise InputError(f"data is not a list of {len(checks)} arguments")
        for (name, check), value in zip(checks, arguments, strict=True):
            if problem := check(value):
                raise InputError(f"{name} {problem}")
        if trigger is not None and type(trigger) is not int:
            raise InputError("trigger_id is not the number of a component")
        if call.get("event_data") or call.get("event_id"):
            raise InputError("event_data and event_id must be empty")
        checked = {"data": arguments, "fn_index": index}
        return json.dumps({**checked, "session_hash": _name(call, "session_hash")}).encode()

    def cancel(self, body: bytes) -> bytes:
        """Validate the cancellation of a call.

        Raises:
            InputError: If it is not valid.
        """
        call = _parse(body, CANCEL)
        index = call.get("fn_index")
        if type(index) is not int or index not in self.functions:
            raise InputError("fn_index is not the index of a function")
        names = {name: _name(call, name) for name in ("session_hash", "event_id")}
        return json.dumps({"fn_index": index, **names}).encode()


def _parse(body: bytes, known: set[str]) -> dict[str, Any]:
    """Parse a JSON object that has only known keys."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise InputError("the request has too many values")
    try:
        call = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError("the request is not JSON") from None
    if not isinstance(call, dict) or not known >= call.keys():
        raise InputError(f"the request is not an object of {', '.join(sorted(known))}")
    return call


def _name(call: Mapping[str, Any], key: str) -> str:
    """The name of a session or event."""
    value = call.get(key)
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise InputError(f"{key} is not a name of 1 to 64 letters and digits")
    return value


# Photos.

MAX_PIXELS = 60_000_000  # above what phones take; 180 MB decoded
# Pillow supports formats that start other programs (EPS), or that few browsers can show.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMAT_NAMES = "a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file"
MAX_SCANS = 50  # of a progressive JPEG: encoders write about ten, and decoding takes the time of all pixels for each
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # JPEG markers followed by a segment's length, and the end
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"


def decode_photo(url: object, mode: str = "RGB") -> Image.Image:
    """Decode a photo that a browser has sent; the value may be anything.

    Args:
        url: Data URL ("data:image/png;base64,…").
        mode: Mode of the Pillow image: 'RGB', or 'L' for gray.

    Raises:
        InputError: If the value is not a photo, is broken, or is too large.
    """
    data = _decode(url)
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    _check_header(data, formats)
    return open_photo(io.BytesIO(data), mode, formats)


def _decode(url: object) -> bytes:
    if not url:
        raise InputError("no photo yet: drop one on the page, paste it, or choose a file")
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url[:200]:
        raise InputError(f"this is not a photo: send {FORMAT_NAMES}")
    text = url[url.index(",") + 1 :]
    size = len(text) * 3 // 4
    if size > MAX_PHOTO_BYTES:
        limit = f"the limit is {MAX_PHOTO_BYTES / 1e6:.0f} MB"
        raise InputError(f"the file has {size / 1e6:.0f} MB, {limit}: send a smaller one")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the photo arrived damaged ({error}): send it again") from error


def _check_header(data: bytes, formats: tuple[str, ...]) -> None:
    """Check size and format by the header, before decoding takes memory and time."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            pixels, is_jpeg = image.width * image.height, image.format in ("JPEG", "MPO")
    except Image.DecompressionBombError as error:
        raise InputError(f"too many pixels ({first_line(error)}): send a smaller photo") from error
    except Exception as error:  # decoders raise errors of every family
        raise InputError(f"the image cannot be read: send {FORMAT_NAMES}") from error
    if pixels > MAX_PIXELS:
        limit = f"the limit is {MAX_PIXELS / 1e6:.0f} million"
        raise InputError(f"the photo has {pixels / 1e6:.0f} million pixels, {limit}: send a smaller one")
    if is_jpeg and (scans := _jpeg_scans(data)) > MAX_SCANS:
        raise InputError(f"the JPEG has {scans} scans, the limit is {MAX_SCANS}: save it as a baseline JPEG")


def _jpeg_scans(data: bytes) -> int:
    """Number of scans of a JPEG. Segments are skipped by their length, since they may contain any bytes."""
    scans, position = 0, 2
    while (marker := MARKER.search(data, position)) and marker[0] != JPEG_END:
        scans += marker[0] == JPEG_SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans
