"""The data sets of a probe: names of the classes, and checks of what no classifier can be fitted to."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.class_folders import ClassFolders, read_splits
from ..data.datasets import LabeledImages
from ..errors import InputError
from .features import Features

__all__ = ["checked_names", "matched", "names_of", "numbered", "read_data", "refuse_few", "remarks"]

FEWEST = 3  # photos of a class: two to fit and one to hold out
INDICES = ("class_to_idx", "class_name_to_idx")  # attributes of data sets and of timm's readers


def read_data(
    dataset: LabeledImages | str | PathLike[str], validation: LabeledImages | str | PathLike[str] | None
) -> tuple[LabeledImages, LabeledImages | None]:
    """The data sets for training and validation; directories are read.

    Raises:
        InputError: If something else is given, or a directory cannot be read.
    """
    _refuse_other(dataset, "dataset")
    train, test = read_splits(Path(dataset)) if isinstance(dataset, str | PathLike) else (dataset, None)
    if validation is None:
        return train, test
    _refuse_other(validation, "validation")
    return train, ClassFolders(Path(validation)) if isinstance(validation, str | PathLike) else validation


def _refuse_other(dataset: object, argument: str) -> None:
    has_items = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not isinstance(dataset, str | PathLike) and (not has_items or isinstance(dataset, Mapping | bytes)):
        raise InputError(
            f"{argument}={dataset!r}: give a directory with a folder per class, or a data set of Pillow images and "
            f"integer labels with a length"
        )


def names_of(dataset: Any) -> list[str]:
    """Names of the classes, by index; empty if the data set has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ClassFolders):
        return dataset.class_names
    sources = (getattr(dataset, "reader", None), dataset)  # timm's data sets have a reader
    found = [getattr(source, name, None) for source in sources for name in INDICES]
    indices = next((item for item in found if isinstance(item, Mapping) and item), {})
    names = {int(index): str(name) for name, index in indices.items()}
    return [names.get(index, f"class {index}") for index in range(max(names, default=-1) + 1)]


def checked_names(given: Iterable[str] | None) -> list[str]:
    """The names of classes that the user gave; empty if there are none.

    Raises:
        InputError: If they are not a list of different names.
    """
    if given is None:
        return []
    if isinstance(given, str | bytes | Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise InputError(f"class_names={given!r}: give a list of names")
    names = [str(name) for name in given]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"class_names has {twice[0]!r} twice: give each class a name of its own")
    return names


def refuse_few(labels: Tensor, names: Sequence[str]) -> None:
    """Refuse data that no classifier can be fitted to and held out from.

    Args:
        labels: Classes (N,).
        names: Names of the classes; empty if they have none.

    Raises:
        InputError: If there is only one class, or a class has too few photos or no name.
    """
    largest = int(labels.max())
    if names and largest >= len(names):
        raise InputError(f"the photos have class {largest}, but only {len(names)} names are given")
    if largest >= len(labels):  # before arrays of that length are made
        raise InputError(f"{len(labels)} photos have classes up to {largest}: number the classes 0, 1, 2, ...")
    names = names or numbered(labels)
    counts = dict(zip(names, torch.bincount(labels, minlength=len(names)).tolist(), strict=True))
    if len(counts) < 2:
        raise InputError(f"only one class, {names[0]!r}: a classifier needs photos of at least two")
    few = [f"{name!r} has {count}" for name, count in counts.items() if count < FEWEST]
    if few:
        raise InputError(f"too few photos: {', '.join(few)}; give at least {FEWEST} of each class, better 5 or more")


def numbered(labels: Tensor) -> list[str]:
    """Names of classes that have none."""
    return [f"class {index}" for index in range(int(labels.max()) + 1)]


def matched(test: Features, own: Sequence[str], names: Sequence[str]) -> Features:
    """Validation features with the classes of the training data, which are found by name.

    Args:
        test: Features with the classes of the validation data.
        own: Names of the classes of the validation data; empty if they have none: then classes have the same indices.
        names: Names of the classes of the training data.

    Raises:
        InputError: If there is a photo of another class.
    """
    present = sorted(set(test.labels.tolist()))
    named = dict(enumerate(own)) if own else dict(enumerate(names))
    table = {index: names.index(named[index]) for index in present if named.get(index) in names}
    unknown = [named.get(index, index) for index in present if index not in table]
    if unknown:
        raise InputError(f"the validation photos have class {unknown[0]!r}, the classes are {list(names)}")
    return replace(test, labels=torch.tensor([table[index] for index in test.labels.tolist()]))


def remarks(*parts: tuple[Any, Features | None]) -> tuple[str, ...]:
    """Warnings about photos that cannot be read or occur twice, which makes the measured accuracy too high."""
    seen: dict[str, str] = {}
    twice, failures = [], []
    for dataset, features in parts:
        failures += features.failures if features else []
        for index, digest in zip(features.indices, features.digests, strict=True) if features else ():
            name = _filename(dataset, index)
            if digest in seen:
                twice.append(f"{seen[digest]} and {name}")
            seen.setdefault(digest, name)
    found = []
    if failures:
        found.append(f"{len(failures)} photos cannot be read and are left out: {_first(failures)}")
    if twice:
        found.append(f"{len(twice)} photos occur twice, which makes the accuracy look too high: {_first(twice)}")
    for remark in found:
        warnings.warn(remark, stacklevel=3)
    return tuple(found)


def _first(items: Sequence[str], shown: int = 3) -> str:
    return "; ".join([*items[:shown], *(["…"] if len(items) > shown else [])])


def _filename(dataset: Any, index: int) -> str:
    if isinstance(dataset, ClassFolders):
        return f"{dataset.root.name}/{dataset.filename(index)}"
    return str(dataset.filename(index, basename=False)) if hasattr(dataset, "filename") else f"photo {index}"
