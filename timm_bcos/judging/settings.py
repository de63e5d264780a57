"""What a folder of results depends on, so that no run resumes results of other settings."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..files import atomic_path, first_line, sha256

__all__ = ["fingerprint", "remember_settings"]

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
