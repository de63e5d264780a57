"""thop and B-cos layers: its table of exact types, which would count them as 0 multiply-adds, gets entries for them."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.positions import PositionedQkv
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.stems import BcosStem

__all__ = ["count_multiply_adds", "register"]

LAYERS = (BcosConv2d, BcosStem, BcosConvClassifier, BcosLinear, BcosLinearClassifier, PositionedQkv)


def count_multiply_adds(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Count the multiply-adds of ŵᵀx, as in a plain layer of that shape, without the norm of x."""
    x = inputs[0]
    if isinstance(module, nn.Linear):
        positions = x.numel() // module.in_features
    else:
        map_of_positions = output if output.ndim == 4 else x  # a classifier responds at all positions
        positions = len(x) * map_of_positions.shape[2:].numel()
    module.total_ops += torch.tensor([positions * module.weight.numel()], dtype=torch.float64)


def register() -> None:
    """Add B-cos layers to thop's table."""
    table: dict[type[nn.Module], Any] = sys.modules["thop.profile"].register_hooks  # `thop.profile` is a function
    for kind in LAYERS:
        table.setdefault(kind, count_multiply_adds)
