"""Results that grow line by line, so that an interrupted run resumes."""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import first_line

__all__ = ["append_rows", "drop_torn_line", "read_rows"]


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


def read_rows(path: Path, types: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows of a file that `append_rows` wrote; none if there is no file. A line cut short at the end is left out.

    Args:
        path: Of the file.
        types: What turns each column's text into its value; the columns in order.

    Raises:
        InputError: Naming the first line that is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}; mend or remove it") from error
    if header != list(types):
        raise InputError(f"{path} is damaged: its first line should be {','.join(types)}; mend or remove it")
    if lines and len(lines[-1]) < len(types):
        lines.pop()
    return [_row(cells, types, f"{path}, line {number}") for number, cells in enumerate(lines, 2)]


def _row(cells: Sequence[str], types: Mapping[str, Callable[[str], Any]], place: str) -> dict[str, Any]:
    try:
        return {name: convert(cell) for (name, convert), cell in zip(types.items(), cells, strict=True)}
    except ValueError as error:
        raise InputError(f"{place} is damaged: {first_line(error)}; mend or remove it") from error
