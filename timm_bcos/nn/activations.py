"""Activations that keep a network dynamic linear where the original's would not."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .functional import shifted_activation, sigmoid_activation

__all__ = ["ShiftedActivation", "SigmoidActivation"]


class SigmoidActivation(nn.Sigmoid):
    """A sigmoid whose value is passed on, as an activation's: a(x) = 1/2 + x · slope, the 1/2 being a constant.

    `torch.nn.Sigmoid` counts as a gate, whose value only scales. Where it is added or read by a layer, the explanation
    would not be exact: convert it with `RULES | {nn.Sigmoid: sigmoid_as_activation}`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid_activation(input)


@register_notrace_module  # a node of timm's graphs, which TorchScript can then compile: functions take no modules there
class ShiftedActivation(nn.Module):
    """An activation with a bias that only gates: a(x + shift) - a(shift).

    An additive bias is not explained by the image. Here it only decides how much of x passes: the output is x times a
    gate, which lies between 0 and 1 for ReLU and ReLU6. What is left out, a(shift), is a constant.

    Args:
        act: a, an elementwise activation.
        shift: (C,) one per channel; trained like a bias.

    Shape: (N, C, H, W) to the same.
    """

    def __init__(self, act: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.act = act
        self.shift = nn.Parameter(shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift.reshape(1, -1, 1, 1).to(x.dtype)
        if torch.jit.is_scripting():  # which passes no modules
            return self.act(x + shift) - self.act.forward(shift.clone())
        return shifted_activation(x, shift, self.act)
