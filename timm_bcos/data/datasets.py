"""Labeled data sets from `timm.data.create_dataset`."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..distributed import distributed_map
from ..errors import InputError
from ..prefetch import prefetch
from .photos import photo_transform

__all__ = ["LabeledImages", "image_batches", "image_loader", "image_names", "load_dataset", "map_batches"]

R = TypeVar("R")

# names of splits' directories. timm treats the names of a group as synonyms, and loads all images if there are none
SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test", "testing"))
DEFAULT_SPLIT = "validation"


class LabeledImages(Protocol):
    """Protocol of a data set of Pillow images and integer labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


def image_loader(model: nn.Module, dataset: LabeledImages) -> Callable[[int], tuple[Tensor, int]]:
    """Return a function from an index to an image (C, H, W) in [0, 1] and its class.

    Images are resized and cropped as the model's `pretrained_cfg` says, but not normalized. The function raises an
    `InputError` for images without labels.

    Raises:
        InputError: If the model takes neither gray nor color images.
    """
    mode, transform = photo_transform(model)

    def load(index: int) -> tuple[Tensor, int]:
        image, label = dataset[index]
        if isinstance(label, str):
            raise InputError(f"image {index} of the data set has the label {label!r}: give the names with --class-map")
        if int(label) < 0:
            raise InputError(f"image {index} of the data set has no label: put the images into a folder per class")
        return transform(image.convert(mode)), int(label)

    return load


def image_batches(
    model: nn.Module, dataset: LabeledImages, indices: Sequence[int], batch_size: int, bar: str | None = None
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Iterate over batches of a data set. The next batch is loaded in the background.

    Args:
        model: Model that the images are prepared for.
        dataset: Labeled images.
        indices: Indices of the images.
        batch_size: Number of images per batch.
        bar: Title of the progress bar; None for no bar.

    Yields:
        Indices, images (N, C, H, W) in [0, 1] on the model's device, and classes (N,) on the CPU.
    """
    return _load_batches(model, dataset, _batches(indices, batch_size), bar)


def image_names(dataset: LabeledImages) -> list[str]:
    """The file name of each image, or its index in a data set without file names."""
    find: Any = getattr(dataset, "filename", lambda index: None)
    return [find(index) or str(index) for index in range(len(dataset))]


def map_batches(
    function: Callable[[Sequence[int], Tensor, Tensor], R],
    model: nn.Module,
    dataset: LabeledImages,
    indices: Sequence[int],
    batch_size: int,
    bar: str | None = None,
) -> Iterator[R]:
    """Apply a function to each batch of a data set. Several processes share the batches (`timm_bcos.distributed`).

    Args:
        function: Function of what `image_batches` yields. Its results must be picklable, and tensors on the CPU.
        model: As in `image_batches`.
        dataset: As in `image_batches`.
        indices: As in `image_batches`.
        batch_size: As in `image_batches`.
        bar: As in `image_batches`.

    Yields:
        The result of each batch, in order.
    """

    def compute(parts: Sequence[Sequence[int]]) -> Iterator[R]:
        for batch in _load_batches(model, dataset, parts, bar):
            yield function(*batch)

    return distributed_map(compute, _batches(indices, batch_size))


def _batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


def _load_batches(
    model: nn.Module, dataset: LabeledImages, parts: Sequence[Sequence[int]], bar: str | None
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    load, device = image_loader(model, dataset), next(model.parameters()).device
    batches = zip(parts, prefetch([load(i) for i in part] for part in parts), strict=True)
    for some, loaded in tqdm(batches, bar, len(parts), disable=True if bar is None else None):
        images, labels = zip(*loaded, strict=True)
        yield some, torch.stack(images).to(device), torch.tensor(labels)


# Types of data sets whose images can only be read one after the other, and what to use instead
SEQUENTIAL = {
    "wds": "give --dataset hfds/DIRECTORY with the directory of the shards, --input-key jpg and --target-key cls, and "
    "Hugging Face's datasets finds them",
    "hfids": "give --dataset hfds/NAME, which stores the data set",
    "tfds": "store the images in a folder per class",
}


def load_dataset(
    root: str,
    num_classes: int,
    *,
    kind: str = "",
    split: str = DEFAULT_SPLIT,
    class_map: str = "",
    input_key: str = "",
    target_key: str = "",
) -> LabeledImages:
    """Load a labeled data set as timm's scripts do, and check its split and its number of classes.

    Args:
        root: Directory with a folder per class, possibly within folders of splits; a tar file; or the root of another
            type of data set, for 'hfds/' the directory of stored data sets.
        num_classes: Number of classes of the model.
        kind: Type of the data set, a name of timm such as 'hfds/NAME'.
        split: Split of the data set.
        class_map: File with the names of all classes.
        input_key: Column of the images in a data set of type 'hfds/'. Default: 'image'.
        target_key: Column of the classes in such a data set. Default: 'label'.

    Raises:
        InputError: If the data set cannot be loaded, lacks the split, has another number of classes, or cannot be read
            in any order.
    """
    family = kind.partition("/")[0].lower() if "/" in kind else ""
    place = f"{kind or root}, split {split!r}"
    if family in SEQUENTIAL:
        raise InputError(f"{place}: single images of data sets of type {family}/ cannot be read: {SEQUENTIAL[family]}")
    keys: dict[str, Any] = {k: v for k, v in dict(input_key=input_key, target_key=target_key).items() if v}
    if keys and family != "hfds":
        raise InputError(f"{place}: --input-key and --target-key are for data sets of type hfds/, leave them out")
    if kind.partition("/")[0] in ("", "folder", "torch") and os.path.isdir(root):
        _refuse_missing_split(Path(root), split)
    try:
        dataset: Any = timm.data.create_dataset(
            kind,
            root=root or None,
            split=split,
            class_map=class_map,  # type: ignore[arg-type]
            **keys,
        )
    except Exception as error:  # timm's readers and Hugging Face's datasets raise errors of many types
        raise InputError(f"no data set at {place}: {str(error) or 'no images found'}") from error
    if family == "hfds":
        _check_columns(dataset.reader, place)
    readers = (dataset, getattr(dataset, "reader", None))  # torchvision's data sets have no reader
    names = ("class_to_idx", "class_name_to_idx")  # attributes of folders and tar files
    found = [getattr(reader, name) for reader in readers for name in names if getattr(reader, name, None)]
    count = len(set(found[0].values())) if found else num_classes
    if count != num_classes:
        raise InputError(
            f"{place} has images of {count} classes, the model has {num_classes}: provide a folder per class, or list "
            f"the names of all classes with --class-map"
        )
    return cast(LabeledImages, dataset)


def _check_columns(reader: Any, place: str) -> None:
    """Refuse a Hugging Face data set without the columns of images and classes, by its first row."""
    row: dict[str, object] = reader.dataset[0] if len(reader) else {}
    for option, name in {"--input-key": reader.image_key, "--target-key": reader.label_key}.items():
        if row and row.get(re.split("[.,]", name)[0]) is None:  # the reader adds an empty column of images
            found = ", ".join(column for column, value in row.items() if value is not None)
            raise InputError(f"{place} has no column {name!r}, only {found}: choose one with {option}")


def _refuse_missing_split(root: Path, split: str) -> None:
    """Refuse a split that has no folder beside those of other splits: timm would load all images."""
    name = split.partition("[")[0]
    accepted = next((synonyms for synonyms in SPLITS[:2] if name in synonyms), (name,))
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    has_splits = any(folder in synonyms for synonyms in SPLITS for folder in found)
    if name and found and not set(accepted) & set(found) and (has_splits or name != DEFAULT_SPLIT):
        raise InputError(
            f"{root} has no folder for split {split!r}, only {', '.join(found[:9])}: choose one with --split"
        )
