"""Names for what a run writes: nothing of the user's, nor of the same run, is ever overwritten."""

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from ..data.photos import is_own_picture
from ..errors import InputError
from ..explanation.video import VIDEO_SUFFIXES, is_own_film
from ..viewer.document import is_own_page

__all__ = ["OutputPaths", "is_film", "is_own", "slug"]

LONGEST_NAME = 255  # bytes, on almost every file system


def is_film(path: Path) -> bool:
    """Whether a file's name says that it is a film."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_own(path: Path) -> bool:
    """Whether this package wrote a picture, page or film."""
    known = is_own_film if is_film(path) else is_own_page if path.suffix == ".html" else is_own_picture
    return os.path.isfile(path) and known(path)


class OutputPaths:
    """Paths of new files in one folder.

    Args:
        folder: Made when something is written.
        inputs: Files that must never be overwritten, wherever they are and whatever they are also called.

    Raises:
        InputError: If there can be no such folder.
    """

    def __init__(self, folder: Path, inputs: Iterable[Path] = ()) -> None:
        _refuse_unusable(folder)
        self.folder = folder
        self.inputs = {identity for path in inputs if (identity := _identity(path)) is not None}
        self.taken: set[str] = set()

    def claim(self, stem: str, suffix: str, label: str = "") -> Path:
        """A path that is free, or holds what an earlier run wrote.

        Args:
            stem: Its end is cut if it is too long.
            suffix: With its dot.
            label: Between the two, never cut; a number follows if need be.
        """
        names = (_fitted(stem, label + ("" if k == 1 else f"_{k}") + suffix) for k in count(1))
        name = next(n for n in names if n.casefold() not in self.taken and self._is_free(self.folder / n))
        self.taken.add(name.casefold())  # some file systems do not tell a.png from A.png
        return self.folder / name

    def _is_free(self, path: Path) -> bool:
        return not os.path.lexists(path) or (_identity(path) not in self.inputs and is_own(path))


def slug(name: str) -> str:
    """A class name as a part of file names; may be empty."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _identity(path: Path) -> tuple[int, int] | None:
    """What a file is under all its names; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _fitted(stem: str, end: str) -> str:
    room = LONGEST_NAME - len(os.fsencode(end))
    encoded = os.fsencode(stem)
    return (stem if len(encoded) <= room else encoded[:room].decode(errors="ignore")) + end


def _refuse_unusable(folder: Path) -> None:
    existing = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path("."))
    if not os.path.isdir(existing):
        raise InputError(f"--out {folder}: {existing} is no directory")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--out {folder}: {existing} cannot be written")
