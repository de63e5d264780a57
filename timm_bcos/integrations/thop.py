"""thop counts multiply-adds by a table of exact types: those of B-cos layers, which it would count as 0."""

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
    """Add the multiply-adds of ŵᵀx, as for the plain layer of that shape; the norm of x is not counted."""
    x = inputs[0]
    if isinstance(module, nn.Linear):
        positions = x.numel() // module.in_features
    else:
        map_of_positions = output if output.ndim == 4 else x  # a classifier answers for all positions
        positions = len(x) * map_of_positions.shape[2:].numel()
    module.total_ops += torch.tensor([positions * module.weight.numel()], dtype=torch.float64)


def register() -> None:
    """Add B-cos layers to thop's table, where they are not yet."""
    table: dict[type[nn.Module], Any] = sys.modules["thop.profile"].register_hooks  # `thop.profile` is a function
    for kind in LAYERS:
        table.setdefault(kind, count_multiply_adds)
