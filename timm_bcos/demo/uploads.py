"""Photos and pictures as data addresses ("data:image/png;base64,…"): between browser and page nothing is a file."""

import base64
import binascii
import io
import mimetypes
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.photos import open_photo
from ..errors import InputError
from ..files import first_line
from .limits import LARGEST_PHOTO

__all__ = ["decode_photo", "encode_file", "encode_picture"]

MOST_PIXELS = 60_000_000  # of an upload: more than phones take, and 180 MB once decoded
# what strangers may send; Pillow knows formats that start other programs (EPS), or that few browsers could show anyway
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MOST_SCANS = 50  # of a JPEG; programs write about ten, and each takes the time of all pixels
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # those that a segment with a length follows, and the end
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
KINDS = "a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file"


def decode_photo(address: object, mode: str = "RGB") -> Image.Image:
    """A photo from a browser, whatever has been sent in its place.

    Args:
        address: A data address.
        mode: Pillow's: 'RGB', or 'L' for gray.

    Raises:
        InputError: For what is no photo, is broken, or is larger than a photo is.
    """
    data = _decode(address)
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    _refuse_strange(data, formats)
    return open_photo(io.BytesIO(data), mode, formats)


def encode_file(path: Path) -> str:
    """An image file as it is."""
    kind, _ = mimetypes.guess_type(path.name)
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def encode_picture(picture: Tensor) -> str:
    """A picture (H, W, 3 or 4) in [0, 1], as PNG."""
    array = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _decode(address: object) -> bytes:
    if not address:
        raise InputError("no photo yet: drop one on the page, paste it, or choose a file")
    if not isinstance(address, str) or not address.startswith("data:") or ";base64," not in address[:200]:
        raise InputError(f"this is no photo: send {KINDS}")
    text = address[address.index(",") + 1 :]
    size = len(text) * 3 // 4
    if size > LARGEST_PHOTO:
        raise InputError(
            f"the file has {size / 1e6:.0f} MB, the page takes {LARGEST_PHOTO / 1e6:.0f}: send a smaller one"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the photo arrived damaged ({error}): send it again") from error


def _refuse_strange(data: bytes, formats: tuple[str, ...]) -> None:
    """By what the file says of itself, before its pixels take memory and time."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            pixels, is_jpeg = image.width * image.height, image.format in ("JPEG", "MPO")
    except Image.DecompressionBombError as error:
        raise InputError(f"too many pixels ({first_line(error)}): send a smaller photo") from error
    except Exception as error:  # decoders raise errors of every family
        raise InputError(f"not an image that the page can read: send {KINDS}") from error
    if pixels > MOST_PIXELS:
        millions = f"{pixels / 1e6:.0f} million pixels, the page takes {MOST_PIXELS / 1e6:.0f}"
        raise InputError(f"the photo has {millions}: send a smaller one")
    if is_jpeg and (scans := _jpeg_scans(data)) > MOST_SCANS:
        raise InputError(f"the photo comes in {scans} passes, the page takes {MOST_SCANS}: save it as a plain JPEG")


def _jpeg_scans(data: bytes) -> int:
    """How often a JPEG's decoder goes over the pixels: segments are skipped, since anything may stand in them."""
    scans, place = 0, 2
    while (marker := MARKER.search(data, place)) and marker[0] != JPEG_END:
        scans += marker[0] == JPEG_SCAN
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans
