"""Activations that explanation mode must not take for gates."""

from torch import Tensor, nn

from .functional import passed_sigmoid

__all__ = ["PassedSigmoid"]


class PassedSigmoid(nn.Sigmoid):
    """A sigmoid whose value is passed on, as an activation's: a(x) = 1/2 + x · slope, the 1/2 being a constant.

    `torch.nn.Sigmoid` counts as a gate, whose value only scales. Where it is added or read by a layer, the explanation
    would not be exact: convert it with `RULES | {nn.Sigmoid: pass_sigmoid}`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return passed_sigmoid(input)
