"""B-cos layers for inference: what depends on the weights alone is computed once, scales of norms included.

A B-cos layer with exponent B computes y = γ · |ŵᵀx / ‖x‖|^(B-1) · ŵᵀx. A scale s of its output is
s · y = |vᵀx| / ‖x‖ · vᵀx with v = sign(s) · √(γ|s|) · ŵ where B is 2, and vᵀx with v = s · γ · ŵ where B is 1; for any
other B it stays a factor per channel. A scale of its input, y(s ⊙ x), moves into the weights as v = s ⊙ ŵ, and into the
norm as ‖s ⊙ x‖² = Σ s² x².
"""

from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelStateError
from .module_utils import clone
from .norms import UncenteredBatchNorm2d
from .primitives import effective_weight, feature_norm, patch_norm, row_norm, scale_by_cosine
from .primitives import max_out as largest_of

__all__ = ["FoldedNorm", "fuse_layer", "fused_conv2d", "fused_linear", "norm_scale"]


class BcosLayer(Protocol):
    """What `fuse_layer` needs to know of a `BcosConv2d` or `BcosLinear`."""

    weight: Tensor
    b: float
    gamma: float
    max_out: int
    normalize_weight: bool
    is_fused: bool

    @property
    def bias(self) -> Tensor | None: ...


LayerT = TypeVar("LayerT", bound=BcosLayer)


class FoldedNorm(nn.Module):
    """What is left of a norm whose scale a neighboring layer has taken over: its drop and activation layers."""

    def __init__(self, norm: UncenteredBatchNorm2d) -> None:
        super().__init__()
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))  # type: ignore[no-any-return]


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    b: float,
    max_out: int,
    amplitude: Tensor | None,
    channel_squares: Tensor | None,
) -> Tensor:
    """`functional.bcos_conv2d` of a fused layer, whose weight is what x is multiplied by.

    Args:
        x: (N, C, H, W).
        weight: (O · max_out, C / groups, *kernel).
        stride: As there.
        padding: As there.
        dilation: As there.
        groups: As there.
        eps: As there.
        b: As there.
        max_out: As there.
        amplitude: (O, 1, 1), what the response is multiplied by besides; or None.
        channel_squares: (C,), the squared scale of a norm before the layer; or None.
    """
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if max_out > 1:
        y = largest_of(y, max_out, -3)
    if b != 1.0:
        kernel = weight.shape[2:]
        norm = patch_norm(x, kernel, stride, padding, dilation, groups, eps, channel_squares)  # type: ignore[arg-type]
        y = scale_by_cosine(y, norm, b, 1.0, True, groups)
    return y if amplitude is None else y * amplitude


def fused_linear(x: Tensor, weight: Tensor, b: float, max_out: int, amplitude: Tensor | None) -> Tensor:
    """`functional.bcos_linear`, likewise; the amplitude is (O,)."""
    y = F.linear(x, weight)
    if max_out > 1:
        y = largest_of(y, max_out, -1)
    if b != 1.0:
        y = scale_by_cosine(y, feature_norm(x), b, 1.0, inplace=True)
    return y if amplitude is None else y * amplitude


def norm_scale(norm: UncenteredBatchNorm2d) -> Tensor:
    """What an uncentered batch norm multiplies each channel by in evaluation, (C,) in float64."""
    return norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()


@torch.no_grad()
def fuse_layer(layer: LayerT, after: Tensor | None = None, before: Tensor | None = None) -> LayerT:
    """A copy of a layer for inference, computed in float64.

    Args:
        layer: Not changed.
        after: (O,) scale of the layer's output that the copy takes over.
        before: (C,) scale of its input, likewise; for convolutions alone.

    Raises:
        ModelStateError: For a layer that has been fused.
    """
    if layer.is_fused:
        raise ModelStateError("the network has been fused before: fuse the one that it was made from")
    free = layer.weight.detach().double()
    weight = effective_weight(free, layer.b, layer.normalize_weight)
    scale = free.new_full((len(free) // layer.max_out,), layer.gamma)
    if not layer.normalize_weight and layer.b not in (1.0, 2.0):
        scale = scale * row_norm(free)
    if after is not None:
        scale = scale * after
    weight, amplitude = _share(weight, scale, layer)
    shape = (-1, 1, 1) if weight.ndim == 4 else (-1,)
    left = None if amplitude is None else amplitude.reshape(shape).to(layer.weight.dtype)
    members: dict[str, Tensor | None] = dict(amplitude=left)
    if before is not None:
        weight = weight * _per_input(before, layer)
        members["channel_squares"] = before.square().to(layer.weight.dtype)
    if layer.bias is not None:
        bias = layer.bias.double() if after is None else layer.bias.double() * after
        members["bias"] = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
    module: Any = layer
    new: Any = clone(module, weight=nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False), **members)
    new.gamma, new.is_fused = 1.0, True
    return new.eval()  # type: ignore[no-any-return]


def _share(weight: Tensor, scale: Tensor, layer: BcosLayer) -> tuple[Tensor, Tensor | None]:
    """The scale (O,) in the weight as far as it may be, and what is left of it, or None.

    The largest of several units stays the largest only where the scale is positive.
    """
    rows = scale.repeat_interleave(layer.max_out).reshape([-1] + [1] * (weight.ndim - 1))
    folds = layer.b in (1.0, 2.0) and (layer.max_out == 1 or bool((scale > 0).all()))
    if not folds:
        return weight, scale
    return weight * (rows if layer.b == 1.0 else rows.sign() * rows.abs().sqrt()), None


def _per_input(scale: Tensor, layer: BcosLayer) -> Tensor:
    """(C,) as it multiplies weights (O, C / G, ...) of G groups."""
    groups: int = getattr(layer, "groups", 1)
    rows = scale.reshape(groups, -1).repeat_interleave(layer.weight.shape[0] // groups, 0)
    return rows.reshape([*rows.shape, *[1] * (layer.weight.ndim - 2)])
