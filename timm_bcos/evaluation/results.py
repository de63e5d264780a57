"""What a folder of results depends on, so that no run resumes results of other settings."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic_path, first_line, sha256

__all__ = [
    "append_rows",
    "drop_torn_line",
    "fingerprint",
    "read_rows",
    "remember_settings",
]


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


CONTENTS = ("checkpoint", "data_dir", "class_map", "regions")  # what may change under the same name


def remember_settings(folder: Path, given: Mapping[str, object]) -> None:
    """Note in `folder/settings.json` what its results depend on.

    That is the contents of files too: of the checkpoint, and which files of which sizes the data set has.

    Args:
        folder: Made if need be.
        given: Settings by name; under `CONTENTS`' names, files and folders.

    Raises:
        InputError: If the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: _as_text(value) for name, value in given.items()}
    paths = {name: Path(str(given[name])) for name in CONTENTS if given.get(name)}
    settings |= {f"contents of {name}": fingerprint(path, folder) for name, path in paths.items() if path.exists()}
    path = folder / "settings.json"
    if not path.exists() or list(folder.iterdir()) == [path]:  # no results yet
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
    stored = _read_settings(path)
    changed = [name for name in settings if stored.get(name) != settings[name]]
    if changed:
        raise InputError(
            f"{folder} holds results for {changed[0]}={stored.get(changed[0], 'unknown')}, not {settings[changed[0]]}: "
            f"choose another folder with --out"
        )


def fingerprint(path: Path, without: Path | None = None) -> str:
    """What tells a file from another one, or a folder: the names and sizes of all files in it.

    Args:
        path: A file or folder.
        without: A folder that does not count.
    """
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    results = without and without.resolve()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and results not in p.resolve().parents):
        digest.update(os.fsencode(f"{file.relative_to(path)}\0{file.stat().st_size}\0"))
    return digest.hexdigest()


def _read_settings(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict):
            return stored
        reason = "no mapping"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise InputError(f"{path} is damaged ({reason}): choose another folder with --out, or remove this one")


def _as_text(value: object) -> str:
    """Paths as they are found from anywhere."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and value and Path(value).exists())
    return str(Path(str(value)).resolve() if is_path else value)
