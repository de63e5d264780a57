"""The names of a model's classes, and classes by their names."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.utils
from torch import Tensor, nn

from ..errors import InputError, TargetError
from ..weights.catalog import imagenet_names

__all__ = ["class_names", "find_class", "find_classes", "read_class_names"]

NEAR_NAMES = 5  # offered where a name is not found


def class_names(model: nn.Module, path: Path | None = None) -> list[str]:
    """Names of a model's classes, from a file, its pretrained cfg or timm's table of ImageNet; otherwise numbers.

    Args:
        model: The model.
        path: File or directory of names, see `read_class_names`; None for the model's own names.

    Returns:
        A name for each class; none for a model of one's own that has no attribute `num_classes`.

    Raises:
        InputError: If the file names another number of classes.
    """
    count = getattr(model, "num_classes", None)
    if path is not None:
        return read_class_names(path, count)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    labels = list(cfg.get("label_names") or ())
    if labels and count in (None, len(labels)):
        return labels
    return list(imagenet_names()) if count == 1000 else [f"class {i}" for i in range(count or 0)]


def read_class_names(path: Path, count: int | None) -> list[str]:
    """Class names from a text file with one per line, or from a directory with a directory of images per class.

    Args:
        path: Text file or directory.
        count: Expected number of classes; None for any.

    Raises:
        InputError: If the path cannot be read, or has another number of classes than `count`.
    """
    try:
        names = _class_directories(path) if path.is_dir() else _lines(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no class names in {path}: {error}") from error
    if count is not None and len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, the model has {count}")
    return names


def _lines(text: str) -> list[str]:
    """Lines that end with LF or CRLF. `str.splitlines` would also split at U+2028 and other separators."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _class_directories(path: Path) -> list[str]:
    """Names of the subdirectories, in the order of timm's image folders."""
    return sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=timm.utils.natural_key)


def find_classes(wanted: object, names: Sequence[str]) -> Any:
    """Replace class names in a target by indices.

    Args:
        wanted: A target as in `timm_bcos.explain` or `explain_targets`, in which classes may be given by name: a class,
            a set of classes, a class for each image, or several for each image. Iterators and other iterables are
            read into lists.
        names: Names of the classes.

    Returns:
        The same without names. Other objects are returned as they are.

    Raises:
        TargetError: If a name matches no class or several classes.
    """
    if isinstance(wanted, str):
        return find_class(wanted, names, len(names))
    if isinstance(wanted, np.ndarray) and wanted.dtype.kind in "UO":
        wanted = wanted.tolist()
    if isinstance(wanted, set | frozenset | list | tuple):
        return type(wanted)(find_classes(one, names) for one in wanted)
    if isinstance(wanted, Iterable) and not isinstance(wanted, Mapping | bytes | np.ndarray | Tensor):
        return [find_classes(one, names) for one in wanted]
    return wanted


def find_class(wanted: str, names: Sequence[str], count: int) -> int:
    """The index of a class, given by its name, its index, or whole words of its name.

    Case does not matter, nor how letters with accents are composed; hyphens, underscores and spaces are the same. Words
    are accepted only if a single class name contains them: "tabby" for "tabby cat", but not "fruit" for "jackfruit".

    Args:
        wanted: Name, index or words.
        names: Names of the classes.
        count: Number of classes.

    Raises:
        TargetError: If no class or several classes match.
    """
    if not names:
        raise TargetError(f"class {wanted!r}: the model's classes have no names here; give an index, or the names")
    exact = _only(wanted, names, lambda name: name == wanted) or _only(wanted, names, _is_same(wanted))
    if exact is not None:
        return exact[0]
    if wanted.isdecimal():
        if int(wanted) < count:
            return int(wanted)
        raise TargetError(f"class {wanted}: the model has {count} classes, counted from 0")
    containing = [i for i, name in enumerate(names) if _folded(wanted) and _folded(wanted) in _folded(name)]
    in_words = [i for i in containing if f" {_folded(wanted)} " in f" {_folded(names[i])} "]
    if len(in_words) == len(containing) == 1:
        return in_words[0]
    if in_words:
        raise TargetError(
            f"several classes match {wanted!r}: {_listed(containing, names)}; give a whole name or an index"
        )
    raise TargetError(f"no class is called {wanted!r}; {_hint(wanted, containing, names)} an index, 0 to {count - 1}")


def _only(wanted: str, names: Sequence[str], matches: Callable[[str], bool]) -> tuple[int] | None:
    """The only class whose name matches, as a tuple; None if there is none."""
    found = [i for i, name in enumerate(names) if matches(name)]
    if len(found) > 1:
        raise TargetError(f"several classes match {wanted!r}: {_listed(found, names)}; give an index")
    return (found[0],) if found else None


def _is_same(wanted: str) -> Callable[[str], bool]:
    folded = _folded(wanted)
    return lambda name: _folded(name) == folded


def _folded(name: str) -> str:
    """A name without what does not matter: case, the kind of spaces, and how Unicode composes letters with accents."""
    return unicodedata.normalize("NFC", re.sub(r"[\s_-]+", " ", name).strip().casefold())


def _listed(classes: Sequence[int], names: Sequence[str]) -> str:
    shown = [f"{names[i]} ({i})" for i in classes[:NEAR_NAMES]]
    return ", ".join([*shown, *(["…"] if len(classes) > NEAR_NAMES else [])])


def _hint(wanted: str, containing: Sequence[int], names: Sequence[str]) -> str:
    """Near names: those that contain the text, then those that are spelled alike."""
    folded = {_folded(name): name for name in names}
    alike = [folded[name] for name in difflib.get_close_matches(_folded(wanted), folded, n=3)]
    near = list(dict.fromkeys([*(names[i] for i in containing), *alike]))[:NEAR_NAMES]
    return f"close names: {', '.join(near)}; or give" if near else "give"
