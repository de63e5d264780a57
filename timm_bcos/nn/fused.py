"""B-cos layers for inference, with effective weights computed once and the scales of norms folded in.

A B-cos layer with exponent B computes y = γ · |ŵᵀx / ‖x‖|^(B-1) · ŵᵀx. A scale s of its output is
s · y = |vᵀx| / ‖x‖ · vᵀx with v = sign(s) · √(γ|s|) · ŵ if B is 2, and vᵀx with v = s · γ · ŵ if B is 1. For any other
B it remains a factor per channel. A scale s of its input, y(s ⊙ x), moves into the weight as v = s ⊙ ŵ, and into the
norm as ‖s ⊙ x‖² = Σ s² x².
"""

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelStateError
from .module_utils import clone
from .norms import UncenteredBatchNorm2d
from .primitives import effective_weight, has_amplitude, row_norm

if TYPE_CHECKING:
    from .layers import BcosLayer

__all__ = ["FoldedNorm", "fuse_layer", "norm_scale"]

LayerT = TypeVar("LayerT", bound="BcosLayer")


class FoldedNorm(nn.Module):
    """The drop and activation layers of a norm whose scale has been folded into a neighboring layer."""

    def __init__(self, norm: UncenteredBatchNorm2d) -> None:
        super().__init__()
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


def norm_scale(norm: UncenteredBatchNorm2d) -> Tensor:
    """The factor per channel of an uncentered batch norm in evaluation mode, (C,) in float64."""
    return norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()


@torch.no_grad()
def fuse_layer(layer: LayerT, after: Tensor | None = None, before: Tensor | None = None) -> LayerT:
    """A copy of a layer for inference, computed in float64.

    Args:
        layer: The layer, which is not changed.
        after: Scale of the layer's output to fold in, (O,).
        before: Scale of a convolution's input to fold in, (C,).

    Raises:
        ModelStateError: For a layer that has been fused.
    """
    if layer.is_fused:
        raise ModelStateError("the model has been fused before: fuse the one that it was made from")
    weight, amplitude = _fold(layer, after)
    members: dict[str, Tensor] = {}
    if amplitude is not None:
        members["amplitude"] = layer.per_output(amplitude)
    if before is not None:
        weight = weight * _per_input(before, layer)
        members["channel_squares"] = before.square()
    if layer.bias is not None:
        members["bias"] = layer.bias.double() if after is None else layer.bias.double() * after
    members = {name: value.to(layer.weight.dtype) for name, value in dict(weight=weight, **members).items()}
    parameters = {
        name: nn.Parameter(members.pop(name), requires_grad=False) for name in {"weight", "bias"} & {*members}
    }
    new = clone(layer, **members, **parameters)
    new.gamma, new.is_fused = 1.0, True
    return new.eval()


def _fold(layer: "BcosLayer", after: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The effective weight in float64 with γ and the output's scale folded in.

    Returns:
        The weight, and the scale (O,) where it cannot be folded in: for other B than 1 and 2, and where it is not
        positive although MaxOut takes the largest of several units.
    """
    free = layer.weight.detach().double()
    weight = effective_weight(free, layer.b, layer.normalize_weight)
    scale = free.new_full((len(free) // layer.max_out,), layer.gamma)
    if has_amplitude(layer.b, layer.normalize_weight):
        scale = scale * row_norm(free)
    if after is not None:
        scale = scale * after
    if layer.b not in (1.0, 2.0) or (layer.max_out > 1 and not bool((scale > 0).all())):
        return weight, scale
    rows = scale.repeat_interleave(layer.max_out).reshape([-1] + [1] * (weight.ndim - 1))
    return weight * (rows if layer.b == 1.0 else rows.sign() * rows.abs().sqrt()), None


def _per_input(scale: Tensor, layer: "BcosLayer") -> Tensor:
    """A scale of input channels (C,) in the shape of weights (O, C / G, ...) of G groups."""
    groups: int = getattr(layer, "groups", 1)
    rows = scale.reshape(groups, -1).repeat_interleave(layer.weight.shape[0] // groups, 0)
    return rows.reshape([*rows.shape, *[1] * (layer.weight.ndim - 2)])
