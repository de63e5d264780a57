"""Labelled data sets, as `timm.data.create_dataset` makes them."""

from collections.abc import Callable
from typing import Protocol

import timm
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from ..nn.stems import image_channels

__all__ = ["LabelledImages", "image_loader"]

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


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
    channels = image_channels(model) or 3
    if channels not in MODES:
        raise InputError(f"photos have 1 or 3 channels, {type(model).__name__} takes {channels}")
    cfg = timm.data.resolve_model_data_config(model)
    cfg |= dict(mean=(0.0,) * channels, std=(1.0,) * channels, is_training=False)
    transform = timm.data.create_transform(**cfg)

    def load(index: int) -> tuple[Tensor, int]:
        image, label = dataset[index]
        if int(label) < 0:
            raise InputError(f"image {index} of the data set has no label: images belong in a folder per class")
        return transform(image.convert(MODES[channels])), int(label)

    return load
