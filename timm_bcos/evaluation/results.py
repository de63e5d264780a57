"""Directories of results: CSV files that grow row by row, and the settings that a resumed run must share."""

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
    """Append rows to a CSV file; a new file begins with `header`."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if is_new else [])
        writer.writerows(rows)


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which an interruption may leave.

    A file without a complete line is deleted, so that its header is written again.
    """
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole:
            os.truncate(path, whole)
        else:
            path.unlink()


def read_rows(path: Path, types: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """Read the rows of a file that `append_rows` wrote, without an incomplete last line. A missing file has no rows.

    Args:
        path: File to read.
        types: Converters of the columns' texts, in the order of the columns.

    Raises:
        InputError: If a line is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}; fix or remove it") from error
    if header != list(types):
        raise InputError(f"{path} is damaged: its first line should be {','.join(types)}; fix or remove it")
    if lines and len(lines[-1]) < len(types):
        lines.pop()
    return [_row(cells, types, f"{path}, line {number}") for number, cells in enumerate(lines, 2)]


def _row(cells: Sequence[str], types: Mapping[str, Callable[[str], Any]], place: str) -> dict[str, Any]:
    try:
        return {name: convert(cell) for (name, convert), cell in zip(types.items(), cells, strict=True)}
    except ValueError as error:
        raise InputError(f"{place} is damaged: {first_line(error)}; fix or remove it") from error


CONTENTS = ("checkpoint", "data_dir", "class_map", "regions")  # files that may change under the same name


def remember_settings(folder: Path, given: Mapping[str, object], results: str = "*") -> None:
    """Write the settings of results to `folder/settings.json`, or check that they are the same.

    Settings bind from the first result on: until there is one, they may change. They include the contents of the
    checkpoint or of the model's directory, and the names and sizes of the data set's files. Other settings in the file
    stay as they are.

    Args:
        folder: Directory of the results; created if necessary.
        given: Settings by name; those in `CONTENTS` are files and directories.
        results: Pattern of the files that depend on these settings.

    Raises:
        InputError: If the directory has results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: _as_text(value) for name, value in given.items()}
    paths = {name: Path(str(given[name])) for name in CONTENTS if given.get(name)}
    settings |= {f"contents of {name}": fingerprint(path, folder) for name, path in paths.items() if path.exists()}
    kind, _, directory = str(given.get("model") or "").partition(":")
    if kind == "local-dir" and Path(directory).is_dir():
        settings["contents of model"] = _hash_contents(Path(directory))
    path = folder / "settings.json"
    others = [file for file in folder.iterdir() if file != path]
    stored = _read_settings(path) if others and path.exists() else {}
    if not stored or not any(file.match(results) for file in others):
        stored |= settings
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(stored, indent=1) + "\n")
    changed = [name for name in settings if stored.get(name) != settings[name]]
    if changed:
        raise InputError(
            f"{folder} has results for {changed[0]}={stored.get(changed[0], 'unknown')}, not {settings[changed[0]]}: "
            f"choose another folder with --out"
        )


def _hash_contents(directory: Path) -> str:
    """Hash of the names and contents of a directory's files. New weights of a model often have the old size."""
    names = sorted(path for path in directory.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name}\0{sha256(path)}\0" for path in names).encode()).hexdigest()


def fingerprint(path: Path, without: Path | None = None) -> str:
    """Hash of a file's contents, or of the names and sizes of all files in a directory.

    Args:
        path: File or directory.
        without: Directory to leave out.
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
        reason = "not an object"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise InputError(f"{path} is damaged ({reason}): choose another folder with --out, or remove this one")


def _as_text(value: object) -> str:
    """The text of a setting; paths are made absolute."""
    is_path = isinstance(value, Path) or (isinstance(value, str) and value and Path(value).exists())
    return str(Path(str(value)).resolve() if is_path else value)
