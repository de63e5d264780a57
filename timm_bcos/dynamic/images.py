"""The image that a network reads is the one that is explained."""

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..nn import functional
from .table import Function, Mode, detached, handles

__all__: list[str] = []


@handles(functional.encode_image)
def _encode_image(mode: Mode, func: Function, /, image: Tensor, in_chans: int) -> Tensor:
    """What a network does to images before its stem reads them, it does to encoded ones: resizing is the same then,
    normalising and padding are not.

    Raises:
        ModelStateError: If the stem reads another encoding than the image's.
    """
    encoded: Tensor = func(image, in_chans)
    leaf = mode.leaf
    if leaf is not None and not (encoded.shape == leaf.shape and torch.equal(encoded, leaf)):
        first, second = detached(encoded).chunk(2, dim=1)
        if bool((first + second - 1).abs().max() > max(1e-3, 4 * torch.finfo(encoded.dtype).eps)):
            raise ModelStateError(
                "the network changes images before its stem reads them, as by normalising or padding them: take that "
                "out of its forward, and convert it with BcosConfig(mean=..., std=...)"
            )
    return encoded
