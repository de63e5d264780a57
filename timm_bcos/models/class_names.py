"""The names of a model's classes."""

import difflib
from pathlib import Path

import timm
import timm.utils

from ..errors import InputError, TargetError
from .loading import TimmModel

__all__ = ["class_names", "find_class", "read_class_names"]


def class_names(model: TimmModel, path: Path | None = None) -> list[str]:
    """Names of a model's classes, from a file, its pretrained cfg or timm's table of ImageNet; otherwise numbers.

    Args:
        model: The model.
        path: File or directory of names, see `read_class_names`; None for the model's own names.

    Raises:
        InputError: If the file names another number of classes.
    """
    count = model.num_classes
    if path is not None:
        return read_class_names(path, count)
    labels = model.pretrained_cfg.get("label_names")
    if labels and len(labels) == count:
        return list(labels)
    if count == 1000:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(i).split(",")[0] for i in range(count)]
    return [f"class {i}" for i in range(count)]


def read_class_names(path: Path, count: int) -> list[str]:
    """Class names from a text file with one per line, or from a directory with a directory of images per class.

    Args:
        path: Text file or directory.
        count: Expected number of classes.

    Raises:
        InputError: If the path cannot be read, or has another number of classes than `count`.
    """
    try:
        names = _class_directories(path) if path.is_dir() else _lines(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no class names in {path}: {error}") from error
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, the model has {count}")
    return names


def _lines(text: str) -> list[str]:
    """Lines that end with LF or CRLF. `str.splitlines` would also split at U+2028 and other separators."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _class_directories(path: Path) -> list[str]:
    """Names of the subdirectories, in the order of timm's image folders."""
    return sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=timm.utils.natural_key)


def find_class(wanted: str, names: list[str], count: int) -> int:
    """The index of a class, given by its index, its name, or a part of its name.

    Args:
        wanted: Index, name or part of a name; case does not matter.
        names: Names of the classes.
        count: Number of classes.

    Raises:
        TargetError: If no class or several classes match.
    """
    if wanted.isdecimal():
        if int(wanted) < count:
            return int(wanted)
        raise TargetError(f"class {wanted}: the model has {count} classes, counted from 0")
    lower = [name.lower() for name in names]
    matches = [i for i, name in enumerate(lower) if name == wanted.lower()]
    matches = matches or [i for i, name in enumerate(lower) if wanted.lower() in name]
    if len(matches) > 1:
        several = ", ".join(names[i] for i in matches[:5])
        raise TargetError(f"several classes match {wanted!r}: {several}; give a whole name or an index")
    if not matches:
        close = ", ".join(difflib.get_close_matches(wanted.lower(), lower, n=3))
        hint = f"close names: {close}; or give" if close else "give"
        raise TargetError(f"no class is called {wanted!r}; {hint} an index, 0 to {count - 1}")
    return matches[0]
