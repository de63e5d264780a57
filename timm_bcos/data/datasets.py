"""Labelled data sets, as `timm.data.create_dataset` makes them."""

from collections.abc import Callable
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from .transforms import photo_transform

__all__ = ["LabelledImages", "image_loader"]


class LabelledImages(Protocol):
    """What the tools need of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


def image_loader(model: nn.Module, dataset: LabelledImages) -> Callable[[int], tuple[Tensor, int]]:
    """A function from an index to an image (C, H, W) in [0, 1] and its class.

    Images are cut and scaled as the model's cfg says, but not normalised. An image without a label is an `InputError`.

    Raises:
        InputError: For a network that takes neither grey nor coloured images.
    """
    mode, transform = photo_transform(model)

    def load(index: int) -> tuple[Tensor, int]:
        image, label = dataset[index]
        if int(label) < 0:
            raise InputError(f"image {index} of the data set has no label: images belong in a folder per class")
        return transform(image.convert(mode)), int(label)

    return load
