"""The size of the images that a network is made for."""

from typing import Any

import timm
from torch import nn

from .modules import converted_part

__all__ = ["image_size"]


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is made for, in pixels.

    For timm's models of a fixed size it is the `img_size` of the outermost module that has one, mostly the patch
    embedding: `create_model(..., img_size=...)` and `set_input_size` change it, while `pretrained_cfg` keeps the size
    of the pretrained weights. For all others it is the cfg's, or (224, 224) without one.
    """
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    named: Any = converted_part(model)
    height, width = timm.data.resolve_model_data_config(named)["input_size"][-2:]
    return height, width
