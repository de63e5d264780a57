"""Names of output files. No input file, no other file of the user, and no file of the same run is overwritten."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import ExifTags, Image

from ..data.photos import is_own_picture
from ..errors import InputError
from ..explanation.video import VIDEO_SUFFIXES, is_own_film
from ..files import AUTHOR, atomic_path
from ..viewer.document import is_own_page

__all__ = ["Claim", "OutputPaths", "is_own", "is_video", "save_photo", "slug"]

LONGEST_NAME = 255  # bytes, the limit of most file systems


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_own(path: Path) -> bool:
    """Whether this package wrote an image, HTML file or video."""
    known = is_own_film if is_video(path) else is_own_page if path.suffix == ".html" else is_own_picture
    return os.path.isfile(path) and known(path)


@dataclass(frozen=True)
class Claim:
    """Arguments of `OutputPaths.claim`, and a temporary path."""

    stem: str
    suffix: str
    label: str
    path: Path


class OutputPaths:
    """Paths of new files in a directory.

    Args:
        folder: Directory; created when a file is written.
        inputs: Files that must not be overwritten, also under other names (links).

    Raises:
        InputError: If the directory cannot be created or written.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path] = ()) -> None:
        _refuse_unusable(folder)
        self.folder = folder
        self.inputs = {identity for path in inputs if (identity := _identity(path)) is not None}
        self.taken: set[str] = set()
        self._temporary: tuple[Path, list[Claim]] | None = None

    def claim(self, stem: str, suffix: str, label: str = "") -> Path:
        """Choose a path that does not exist, or that an earlier run wrote.

        Args:
            stem: First part of the name; truncated if it is too long.
            suffix: Suffix, with its dot.
            label: Part between stem and suffix, never truncated; followed by a number if necessary.
        """
        if self._temporary is not None:
            folder, claims = self._temporary
            claims.append(Claim(stem, suffix, label, folder / f"{len(claims)}{suffix}"))
            return claims[-1].path
        names = (_fitted(stem, label + ("" if k == 1 else f"_{k}") + suffix) for k in count(1))
        name = next(n for n in names if n.casefold() not in self.taken and self._is_free(self.folder / n))
        self.taken.add(name.casefold())  # some file systems do not distinguish a.png from A.png
        return self.folder / name

    @contextmanager
    def temporarily_in(self, folder: Path) -> Iterator[list[Claim]]:
        """Context manager in which `claim` returns temporary paths, and records what they stand for."""
        self._temporary = (folder, [])
        try:
            yield self._temporary[1]
        finally:
            self._temporary = None

    def _is_free(self, path: Path) -> bool:
        return not os.path.lexists(path) or (_identity(path) not in self.inputs and is_own(path))


def save_photo(image: Image.Image, path: Path) -> None:
    """Write a picture of a photo's size as a JPEG file that names this package as its maker."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = AUTHOR
    with atomic_path(path) as temporary:
        image.convert("RGB").save(temporary, "JPEG", quality=90, exif=exif)


def slug(name: str) -> str:
    """A class name as part of a file name; may be empty."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if it does not exist."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _fitted(stem: str, end: str) -> str:
    available = LONGEST_NAME - len(os.fsencode(end))
    encoded = os.fsencode(stem)
    return (stem if len(encoded) <= available else encoded[:available].decode(errors="ignore")) + end


def _refuse_unusable(folder: Path) -> None:
    existing = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path("."))
    if not os.path.isdir(existing):
        raise InputError(f"--out {folder}: {existing} is not a directory")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--out {folder}: {existing} cannot be written")
