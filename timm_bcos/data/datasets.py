"""Labeled data sets, as `timm.data.create_dataset` makes them."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..prefetch import prefetch
from .photos import photo_transform

__all__ = ["LabeledImages", "image_batches", "image_loader", "load_dataset"]

# what folders of splits are called; timm takes each for the others of its line, and none for all images
SPLITS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test", "testing"))
DEFAULT_SPLIT = "validation"


class LabeledImages(Protocol):
    """What the tools need of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


def image_loader(model: nn.Module, dataset: LabeledImages) -> Callable[[int], tuple[Tensor, int]]:
    """A function from an index to an image (C, H, W) in [0, 1] and its class.

    Images are cut and scaled as the model's cfg says, but not normalized. An image without a label is an `InputError`.

    Raises:
        InputError: For a network that takes neither gray nor colored images.
    """
    mode, transform = photo_transform(model)

    def load(index: int) -> tuple[Tensor, int]:
        image, label = dataset[index]
        if int(label) < 0:
            raise InputError(f"image {index} of the data set has no label: images belong in a folder per class")
        return transform(image.convert(mode)), int(label)

    return load


def image_batches(
    model: nn.Module, dataset: LabeledImages, indices: Sequence[int], batch_size: int, bar: str | None = None
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Batches of a data set, loaded while the one before is in use.

    Args:
        model: As in `image_loader`.
        dataset: As there.
        indices: Of the images.
        batch_size: Images at a time.
        bar: Name of the progress bar that a terminal shows; None for no bar.

    Yields:
        Indices, images (N, C, H, W) in [0, 1] on the model's device, and classes (N,) on the CPU.
    """
    load, device = image_loader(model, dataset), next(model.parameters()).device
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    batches = zip(parts, prefetch([load(i) for i in part] for part in parts), strict=True)
    for some, loaded in tqdm(batches, bar, len(parts), disable=True if bar is None else None):
        images, labels = zip(*loaded, strict=True)
        yield some, torch.stack(images).to(device), torch.tensor(labels)


def load_dataset(
    root: str, num_classes: int, *, kind: str = "", split: str = DEFAULT_SPLIT, class_map: str = ""
) -> LabeledImages:
    """A labeled data set as timm's scripts read it, which says so if it is not the one that was meant.

    Args:
        root: A folder of one folder per class, with or without folders of splits above them, a tar file, or whatever
            `kind` reads.
        num_classes: Of the network.
        kind: timm's name of the data set.
        split: Of the data set.
        class_map: File of the names of all classes.

    Raises:
        InputError: For a data set that cannot be had, a split that it does not have, or another number of classes.
    """
    place = f"{root}, split {split!r}"
    if kind.partition("/")[0] in ("", "folder", "torch") and os.path.isdir(root):
        _refuse_missing_split(Path(root), split)
    try:
        dataset = timm.data.create_dataset(kind, root=root, split=split, class_map=class_map)  # type: ignore[arg-type]
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:  # as timm's readers differ
        raise InputError(f"no data set at {place}: {str(error) or 'there is nothing'}") from error
    readers = (dataset, getattr(dataset, "reader", None))  # torchvision's data sets have none
    names = ("class_to_idx", "class_name_to_idx")  # folders', tars'
    found = [getattr(reader, name) for reader in readers for name in names if getattr(reader, name, None)]
    count = len(set(found[0].values())) if found else num_classes
    if count != num_classes:
        raise InputError(
            f"{place} has images of {count} classes, the model {num_classes}: labels come from a folder per class, or "
            f"from folders and --class-map, which lists the names of all classes"
        )
    return cast(LabeledImages, dataset)


def _refuse_missing_split(root: Path, split: str) -> None:
    """Where there is no folder for a split, timm takes all images; that is meant where no folder is called so."""
    name = split.partition("[")[0]
    accepted = next((synonyms for synonyms in SPLITS[:2] if name in synonyms), (name,))
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    has_splits = any(folder in synonyms for synonyms in SPLITS for folder in found)
    if name and found and not set(accepted) & set(found) and (has_splits or name != DEFAULT_SPLIT):
        raise InputError(f"{root} has no folder for split {split!r}, but {', '.join(found[:9])}: see --split")
