"""Photos and pictures as data addresses ("data:image/png;base64,…"): between browser and page nothing is a file."""

import base64
import binascii
import io
import mimetypes
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.photos import open_photo
from ..errors import InputError

__all__ = ["LARGEST", "decode_photo", "encode_file", "encode_picture"]

LARGEST = 20_000_000  # bytes of an upload
MOST_PIXELS = 60_000_000  # of an upload: more than phones take, and 180 MB once decoded
# what strangers may send; Pillow knows formats that start other programs (EPS), or that few browsers could show anyway
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


def decode_photo(address: object, mode: str = "RGB") -> Image.Image:
    """A photo from a browser, whatever has been sent in its place.

    Args:
        address: A data address.
        mode: Pillow's: 'RGB', or 'L' for grey.

    Raises:
        InputError: For what is no photo, is broken, or is larger than a photo is.
    """
    data = _decode(address)
    _refuse_strange(data)
    return open_photo(io.BytesIO(data), mode)


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
        raise InputError("this is no photo: send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file")
    text = address[address.index(",") + 1 :]
    if len(text) * 3 // 4 > LARGEST:
        raise InputError(f"the file has {len(text) * 3 / 4e6:.0f} MB, the page takes {LARGEST / 1e6:.0f}: send a smaller one")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the photo arrived damaged ({error}): send it again") from error


def _refuse_strange(data: bytes) -> None:
    """By what the file's first bytes say, before its pixels take memory; what says nothing is for `open_photo`."""
    Image.init()
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise InputError("the photo has too many pixels: send a smaller one") from None
    except Exception:  # decoders raise errors of every family
        raise InputError("not an image that the page can read: send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file") from None
    if width * height > MOST_PIXELS:
        raise InputError(
            f"the photo has {width} × {height} pixels, the page takes {MOST_PIXELS // 1_000_000} million: send a smaller one"
        )
