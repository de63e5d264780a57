"""Photos in every form that users have them in: files, directories, Pillow images, arrays and tensors."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .photos import find_photos, open_photo, to_photo

__all__ = ["NamedPhoto", "PhotoInput", "Photos", "read_photos"]

PhotoInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | BinaryIO
Photos = PhotoInput | Iterable[PhotoInput]

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)
WHITES = {"u2": 65535, "b1": 1}  # of arrays of whole numbers and booleans, by kind and size
FORMS = "give a path, a Pillow image, an array (H, W, 3), a tensor (3, H, W), or a list of them"


@dataclass(frozen=True, eq=False)
class NamedPhoto:
    """An upright photo.

    Attributes:
        image: The photo in 8 bits per channel.
        name: Name of its file; empty if it has none.
        label: Name for error messages.
    """

    image: Image.Image
    name: str
    label: str


def read_photos(photos: Photos) -> list[NamedPhoto]:
    """Read a photo, or several.

    Args:
        photos: Path of an image file or a directory of them, open file, Pillow image of any mode; NumPy array (H, W, 3)
            or (H, W), tensor (3, H, W) or (1, H, W), of uint8 or of floating-point numbers in [0, 1]; array or tensor
            of N of them; or an iterable of all these.

    Returns:
        The photos in color, rotated as their EXIF data says.

    Raises:
        InputError: If there are none, or one cannot be read; the message names it.
    """
    found = [_read(source, label) for source, label in _listed(photos)]
    if not found:
        raise InputError(f"no photos given: {FORMS}")
    return found


def _listed(photos: Any) -> Iterator[tuple[Any, str]]:
    """Single photos, and a name of each for error messages."""
    if _is_path(photos) or _is_single(photos):
        yield from _expanded(photos, "the photo")
        return
    if isinstance(photos, Mapping | bytes | bytearray) or not isinstance(photos, Iterable):
        raise InputError(f"cannot read a photo from {type(photos).__name__}: {FORMS}")
    for index, photo in enumerate(photos):
        yield from _expanded(photo, f"photos[{index}]")


def _expanded(photo: Any, label: str) -> Iterator[tuple[Any, str]]:
    if not _is_path(photo):
        yield photo, label
    elif not os.fspath(photo):
        raise InputError(f"{label}: the path is empty")
    elif ADDRESS.match(os.fspath(photo)) and not os.path.exists(photo):
        address = os.fspath(photo)[:80]
        raise InputError(
            f"{address} is an address, not a file: nothing is downloaded, so give the path of a local copy"
        )
    else:
        yield from ((path, str(path)) for path in find_photos([Path(photo)]))


def _is_path(photo: object) -> bool:
    return isinstance(photo, str | os.PathLike)


def _is_single(photo: object) -> bool:
    """Whether it is one photo, and not several."""
    if isinstance(photo, np.ndarray | Tensor):
        return photo.ndim != 4
    return isinstance(photo, Image.Image) or _is_file(photo)


def _is_file(photo: object) -> bool:
    return hasattr(photo, "read")


def _read(photo: Any, label: str) -> NamedPhoto:
    try:
        return NamedPhoto(_as_photo(photo), _name_of(photo), label)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _name_of(photo: Any) -> str:
    if _is_file(photo):
        photo = getattr(photo, "name", "")
    elif isinstance(photo, Image.Image):
        photo = getattr(photo, "filename", "")
    return Path(photo).name if isinstance(photo, str | os.PathLike) else ""


def _as_photo(photo: Any) -> Image.Image:
    if _is_path(photo):
        return open_photo(Path(photo))
    if isinstance(photo, Image.Image):
        return to_photo(photo)
    if _is_file(photo):
        return open_photo(photo)
    if isinstance(photo, Tensor):
        return to_photo(_from_array(_channels_last(photo)))
    if isinstance(photo, np.ndarray):
        return to_photo(_from_array(photo))
    hint = "wrap it in io.BytesIO" if isinstance(photo, bytes | bytearray) else FORMS
    raise InputError(f"cannot read a photo from {type(photo).__name__}: {hint}")


def _channels_last(photo: Tensor) -> np.ndarray:
    if photo.layout is not torch.strided or photo.is_meta:
        kind = "meta" if photo.is_meta else str(photo.layout).removeprefix("torch.")
        raise InputError(f"a {kind} tensor is no photo: give a dense tensor of pixels, as photo.to_dense() returns it")
    shape = tuple(photo.shape)
    if photo.ndim == 3 and shape[0] not in (1, 3, 4):
        raise InputError(f"a tensor of shape {shape} is no photo: tensors are (3, H, W) or (1, H, W), arrays (H, W, 3)")
    photo = photo.detach().cpu()
    photo = photo.float() if photo.is_floating_point() else photo
    return (photo.movedim(0, -1) if photo.ndim == 3 else photo).numpy()


def _from_array(photo: np.ndarray) -> Image.Image:
    if photo.ndim not in (2, 3) or 0 in photo.shape or (photo.ndim == 3 and photo.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"an array of shape {photo.shape} is no photo: arrays are (H, W, 3) or (H, W), tensors (3, H, W)"
        )
    if photo.ndim == 3 and photo.shape[2] == 1:
        photo = photo[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_in_eight_bits(photo)))


def _in_eight_bits(photo: np.ndarray) -> np.ndarray:
    """Scale pixels to 0..255 by their data type: floating-point numbers are in [0, 1]."""
    kind = photo.dtype.str[1:]
    if photo.dtype == np.uint8:
        return photo
    if kind not in WHITES and photo.dtype.kind != "f":
        raise InputError(f"pixels of type {photo.dtype}: give uint8, or floating-point numbers in [0, 1]")
    scaled = photo.astype(np.float32) / WHITES.get(kind, 1)
    if not np.isfinite(scaled).all():
        raise InputError("pixels are NaN or infinite")
    low, high = float(scaled.min()), float(scaled.max())
    if low < -1e-4 or high > 1 + 1e-4:
        raise InputError(f"pixels lie in [{low:.3g}, {high:.3g}]: give uint8, or floating-point numbers in [0, 1]")
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)
