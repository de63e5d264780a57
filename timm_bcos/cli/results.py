"""Results that grow line by line, so that an interrupted run resumes."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["append_rows", "drop_torn_line"]


def append_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Append rows to a CSV file as they come; a new file begins with `header`."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if is_new else [])
        writer.writerows(rows)


def drop_torn_line(path: Path) -> None:
    """Cut a text file that grows by lines back to its last whole one, should an interruption have torn it.

    A file without a whole line is removed, so that its header is written again.
    """
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole:
            os.truncate(path, whole)
        else:
            path.unlink()
