"""Where, and as what, a module makes its parameters: torch's factory keywords."""

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

__all__ = ["Factory", "buffer_device"]


class Factory(TypedDict, total=False):
    """Keywords that every layer hands to those inside it."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def buffer_device(weight: Tensor) -> torch.device:
    """Where the buffers of a layer belong: where its weight is.

    But for accelerate's `init_empty_weights`, which lets parameters alone be empty: no file would fill such buffers.
    """
    usual = torch.empty(0).device
    if weight.is_meta and usual.type != "meta" and nn.Linear(1, 1).weight.is_meta:
        return usual
    return weight.device
