"""Labelled data sets, as `timm.data.create_dataset` makes them."""

from collections.abc import Callable
from typing import Any

import timm
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["image_loader"]


def image_loader(model: nn.Module, dataset: Any) -> Callable[[int], tuple[Tensor, int]]:
    """A function from an index to an image (C, H, W) in [0, 1] and its class.

    Images are cut and scaled as the model's cfg says, but not normalised. An image without a label is an `InputError`.
    """
    cfg = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}, is_training=False)

    def load(index: int) -> tuple[Tensor, int]:
        image, label = dataset[index]
        if int(label) < 0:
            raise InputError(f"image {index} of the data set has no label: images belong in a folder per class")
        return transform(image.convert("RGB")), int(label)

    return load
