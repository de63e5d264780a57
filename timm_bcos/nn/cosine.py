"""The cosine factor: what makes a B-cos response of a linear one.

Paper: B-cos Networks: Alignment is All We Need for Interpretability (CVPR 2022), https://arxiv.org/abs/2205.10268.
A unit computes y(x) = γ · |cos(x, w)|^(B-1) · ŵᵀx (eq. 3 there, γ in its section 3.2.2).
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .execution import only_infers, pieces

__all__ = ["EPS", "cosine_factor", "per_unit", "scale_by_cosine"]

EPS = 1e-6  # added to cosines unless B is 2, whose power has a derivative at 0 by itself


def scale_by_cosine(
    linear: Tensor, norm: Tensor, b: float, gamma: float, inplace: bool = False, groups: int = 1
) -> Tensor:
    """Turn the linear response ŵᵀx into the B-cos response γ · |ŵᵀx / ‖x‖|^(B-1) · ŵᵀx.

    Args:
        linear: ŵᵀx, any shape.
        norm: ‖x‖, broadcastable to `linear`; of maps (N, O, H, W) also one for each group of channels, (N, G, H, W).
        b: The exponent B, not 1.
        gamma: The fixed output scale γ.
        inplace: Whether `linear` may be overwritten, where no gradient needs it.
        groups: G.

    Returns:
        The shape and dtype of `linear`.
    """
    if not torch.jit.is_scripting():
        if has_torch_function((linear, norm)):
            return handle_torch_function(scale_by_cosine, (linear, norm), linear, norm, b, gamma, inplace, groups)
        if inplace and b == 2 and only_infers(linear, norm):
            return _square_in_place(linear, gamma / per_unit(norm, linear, groups))
    return (linear * cosine_factor(linear, norm, b, gamma, groups)).to(linear.dtype)


def _square_in_place(linear: Tensor, inverse: Tensor) -> Tensor:
    """|a| · a · γ / n, from a and γ / n, written over a."""
    for part, scale in pieces(linear, inverse):
        part.mul_(part.abs().to(scale.dtype).mul_(scale))
    return linear


def cosine_factor(linear: Tensor, norm: Tensor, b: float, gamma: float, groups: int = 1, eps: float = EPS) -> Tensor:
    """γ · |cos|^(B-1), what `scale_by_cosine` multiplies by; |cos| = |ŵᵀx| / ‖x‖, plus eps unless B is 2."""
    norm = per_unit(norm, linear, groups)
    if b == 2:
        return linear.abs() * (gamma / norm)
    return gamma * _power(linear.abs() / norm + eps, b - 1)


def per_unit(norm: Tensor, like: Tensor, groups: int) -> Tensor:
    """Norms of G groups of channels, (N, G, H, W), as they broadcast to maps (N, C, H, W); others as they are."""
    if groups == 1:
        return norm
    channels = int(like.shape[-3])  # no tensor, as which tracers see sizes
    return norm if groups == channels else norm.repeat_interleave(channels // groups, -3)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent of positive x. Roots are faster than `pow`, forward and backward."""
    if exponent == 0.25:
        return x.sqrt().sqrt()
    return x.sqrt() if exponent == 0.5 else x.pow(exponent)
