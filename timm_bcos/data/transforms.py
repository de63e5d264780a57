"""Photos as a network takes them."""

from collections.abc import Callable

import timm
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError
from ..nn.stems import image_channels

__all__ = ["photo_transform"]

MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


def photo_transform(model: nn.Module) -> tuple[str, Callable[[Image.Image], Tensor]]:
    """How a photo becomes an image (C, H, W) in [0, 1]: cut and scaled as the model's cfg says, but not normalised.

    Returns:
        Pillow's mode that the photo must have, and the transform.

    Raises:
        InputError: For a network that takes neither grey nor coloured images.
    """
    channels = image_channels(model) or 3
    if channels not in MODES:
        raise InputError(f"photos have 1 or 3 channels, {type(model).__name__} takes {channels}")
    cfg = timm.data.resolve_model_data_config(model)
    cfg |= dict(mean=(0.0,) * channels, std=(1.0,) * channels, is_training=False)
    return MODES[channels], timm.data.create_transform(**cfg)
