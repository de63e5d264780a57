"""Photos as people have them: files, turned by their cameras, in any mode, or broken."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

__all__ = ["find_photos", "open_photo"]


def find_photos(given: Iterable[Path]) -> Iterator[Path]:
    """Image files, those in given directories included.

    Raises:
        InputError: For a directory without any.
    """
    endings = timm.data.get_img_extensions()
    for path in given:
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
        if not found:
            raise InputError(f"no photos in {path}: looked for {', '.join(sorted(endings))}")
        yield from found


def open_photo(path: Path) -> Image.Image:
    """Open a photo upright, in RGB.

    Raises:
        InputError: If it is missing, no image, or truncated.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError("no such file") from None
    except UnidentifiedImageError:
        raise InputError("not an image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"broken image ({error})") from error
