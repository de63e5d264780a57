"""Outputs appear whole or not at all, and know themselves again."""

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import InputError

__all__ = ["AUTHOR", "atomic_path", "first_line", "sha256", "write_csv"]

AUTHOR = "timm_bcos"  # what our pictures and films name as the software that made them


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path of the same name in a temporary directory beside `path`; it becomes `path` when the block succeeds.

    An interrupted or failed write leaves whatever was at `path` before, and nothing else.

    Raises:
        InputError: If `path` is a directory or a device, or the block writes nothing there.
    """
    final = Path(path)
    if os.path.lexists(final) and not final.is_symlink() and not final.is_file():
        raise InputError(f"{final} is {'a directory' if final.is_dir() else 'no regular file'}: name a file")
    final.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=final.parent, prefix=".unfinished-") as folder:
        temporary = Path(folder) / final.name
        yield temporary
        if not temporary.is_file():  # some writers add a suffix where there is none
            raise InputError(f"nothing was written to {final}: give it a suffix that says the format, as in .png")
        temporary.replace(final)


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table with a line of titles."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop; its kind where it says nothing."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
