"""Reading photos: image files of any mode, rotated by EXIF data, or broken."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import timm
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from ..errors import InputError
from ..explanation.inputs import refuse_stripes
from ..files import AUTHOR, first_line
from ..nn.module_utils import image_size
from ..nn.stems import image_channels
from .geometry import flatten_transform

__all__ = [
    "find_photos",
    "is_own_picture",
    "open_photo",
    "photo_mode",
    "photo_steps",
    "photo_transform",
    "to_photo",
]

_logger = logging.getLogger(__name__)

SIXTEEN_BITS = 65535
# Candidates for the value of white in images with more than 8 bits: the first that is not below the largest value.
WHITES = {"I": (255, SIXTEEN_BITS, 2**31 - 1), "F": (1, 255, SIXTEEN_BITS, 2**31 - 1)}


def find_photos(given: Iterable[Path]) -> Iterator[Path]:
    """Find image files: the given ones, and all files in the given directories except hidden ones.

    Raises:
        InputError: If a directory has no image files.
    """
    endings = timm.data.get_img_extensions()
    for path in given:
        if not os.path.isdir(path):  # unlike Path.is_dir, it accepts any name
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and _is_plain_file(p, path))
        if not found:
            raise InputError(f"no photos in {path}: looked for {', '.join(sorted(endings))}")
        yield from found


def _is_plain_file(path: Path, root: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not is_hidden and path.is_file()


def is_own_picture(path: Path) -> bool:
    """Whether this package wrote an image."""
    try:
        with _quiet(), Image.open(path) as image:
            return AUTHOR in (image.info.get("Software"), image.getexif().get(ExifTags.Base.Software))
    except Exception:  # `open_photo` reports what is wrong with it
        return False


def open_photo(file: Path | BinaryIO, mode: str = "RGB", formats: tuple[str, ...] | None = None) -> Image.Image:
    """Open a photo and rotate it as its EXIF data says. Of animations the first frame is read, with a logged warning.

    Args:
        file: Path or open file.
        mode: Mode of the Pillow image: 'RGB', or 'L' for gray.
        formats: Names of the Pillow formats to read. Default: all.

    Raises:
        InputError: If the file is missing, is not an image, is truncated, or cannot be read for another reason.
    """
    if isinstance(file, str | os.PathLike) and os.path.exists(file) and not os.path.isfile(file):
        raise InputError("no regular file")
    try:
        with _quiet(), Image.open(file, formats=formats) as image:
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
            if is_animated and isinstance(file, str | os.PathLike):
                _logger.warning("%s is animated: only its first frame is used", file)
            return _to_photo(image, mode)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("no such file") from None
    except UnidentifiedImageError:
        raise InputError("not an image") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"too large an image ({first_line(error)})") from error
    except Exception as error:  # decoders raise errors of every family
        raise InputError(f"broken image ({first_line(error)})") from error


def to_photo(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Convert a Pillow image of any mode, and rotate it as its EXIF data says; the image itself is not changed.

    Args:
        image: The image.
        mode: Mode of the result: 'RGB', or 'L' for gray.

    Raises:
        InputError: If it is empty, its pixels cannot be read, or one side is more than 100 times the other.
    """
    try:
        with _quiet():
            return _to_photo(image, mode)
    except InputError:
        raise
    except Exception as error:  # decoders raise errors of every family
        raise InputError(f"broken image ({first_line(error)})") from error


def _to_photo(image: Image.Image, mode: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"an image of {image.width} × {image.height} pixels is empty")
    refuse_stripes(image.size)
    image.load()
    return _in_eight_bits(_upright(image)).convert(mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about metadata and about more than 89 million pixels, which some cameras have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _upright(image: Image.Image) -> Image.Image:
    """Rotate a photo as its EXIF data says, if it can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data; the pixels are valid
        return image


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Convert images with more than 8 bits to 8-bit gray, which Pillow would clip."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise InputError("some of its values are not finite")
    black, white = min(float(values.min()), 0.0), float(values.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # older versions of Pillow call them I
        white = SIXTEEN_BITS
    elif black == 0:  # with negative values, the range of the image is used
        white = next((float(full) for full in WHITES[image.mode] if white <= full), white)
    gray = np.empty(values.shape, np.uint8)
    for row, target in zip(values, gray, strict=True):  # row by row, because float64 takes much memory
        target[:] = ((row.astype(np.float64) - black) / ((white - black) or 1) * 255).round()
    return Image.fromarray(gray)


CHANNELS = {"L": 1, "RGB": 3}  # of Pillow modes
# How photos that are not square get the shape of the model's image: changes of the arguments of timm's transform.
CROPS: dict[str, dict[str, object]] = {
    "center": {},
    "none": dict(crop_mode="border", crop_pct=1.0),
    "squash": dict(crop_mode="squash", crop_pct=1.0),
}
PADDING = 0.5  # gray, of photos that are not cropped


def photo_transform(model: nn.Module) -> tuple[str, Callable[[Image.Image], Tensor]]:
    """The transform of photos to images (C, H, W) in [0, 1]: resized and cropped for the model, but not normalized.

    Returns:
        Pillow mode of the photo, and transform.

    Raises:
        InputError: If the model takes neither gray nor color images.
    """
    return photo_mode(model), _create_transform(model, "center")


def photo_steps(model: nn.Module, crop: str = "center") -> tuple[Any, ...]:
    """The steps of the same transform, or of another one that shows the whole photo.

    Args:
        model: The model.
        crop: 'center' for the transform that the model's pretrained cfg describes, which resizes the shorter side and
            crops the center unless the cfg says otherwise. The whole photo is shown by 'none', which resizes the longer
            side and pads the shorter one with gray, and by 'squash', which changes the aspect ratio.

    Raises:
        InputError: If the model takes neither gray nor color images, or `crop` is something else.
    """
    if crop not in CROPS:
        raise InputError(f"crop={crop!r}: choose one of {', '.join(CROPS)}")
    return flatten_transform(_create_transform(model, crop))


def _create_transform(model: nn.Module, crop: str) -> Callable[[Image.Image], Tensor]:
    channels = CHANNELS[photo_mode(model)]
    mean = 0.0 if crop == "center" else PADDING  # timm pads with the mean color
    own = getattr(model, "pretrained_cfg", None) or {}
    cfg = timm.data.resolve_data_config(dict(in_chans=channels), own) | CROPS[crop]
    cfg |= dict(input_size=(channels, *image_size(model)))
    cfg |= dict(mean=(mean,) * channels, std=(1.0,) * channels, is_training=False)
    return timm.data.create_transform(**cfg)


def photo_mode(model: nn.Module) -> str:
    """Pillow mode of the photos that a model takes: 'RGB', or 'L' for gray.

    Raises:
        InputError: If the model takes neither gray nor color images.
    """
    channels = image_channels(model) or 3
    mode = next((mode for mode, count in CHANNELS.items() if count == channels), None)
    if mode is None:
        raise InputError(
            f"the model takes {channels} channels, photos have 1 or 3 channels: pass images to timm_bcos.explain"
        )
    return mode
