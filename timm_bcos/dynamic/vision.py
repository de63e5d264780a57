"""Operators of torchvision: where they read is a constant of the linear map."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch import Tensor

from .products import share
from .table import Function, Mode, detached, handles

__all__: list[str] = []


def _operators(*names: str) -> list[Callable[..., Any]]:
    packets = [getattr(torch.ops.torchvision, name) for name in names]
    return [*packets, *(packet.default for packet in packets)]


@handles(*_operators("deform_conv2d"))
def _deform_conv2d(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    """Offsets and masks are gates; what they weigh is linear."""
    offset, mask = detached(offset), detached(mask)
    y = share(lambda x, w: func(x, w, offset, mask, torch.zeros_like(bias), *rest), [input, weight])
    addend = bias.reshape(-1, 1, 1)
    return mode.add(y + addend, addend, func, bias)


@handles(*_operators("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool"))
def _regions(mode: Mode, func: Function, /, input: Tensor, rois: Tensor, *rest: Any) -> Any:
    return func(input, detached(rois), *rest)
