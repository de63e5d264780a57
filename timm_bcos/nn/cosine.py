"""The cosine factor: what makes a B-cos response of a linear one.

Paper: B-cos Networks: Alignment is All We Need for Interpretability (CVPR 2022), https://arxiv.org/abs/2205.10268.
A unit computes y(x) = γ · |cos(x, w)|^(B-1) · ŵᵀx (eq. 3 there, γ in its section 3.2.2).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.weak import WeakIdKeyDictionary

from .memory import is_program, pieces

__all__ = [
    "Origin",
    "constant_factor",
    "gradients_past",
    "origin",
    "scale_by_cosine",
    "signed_square",
    "square_gradient",
]


def scale_by_cosine(
    linear: Tensor, norm: Tensor, b: float, gamma: float, inplace: bool = False, training: bool = False
) -> Tensor:
    """Turn the linear response ŵᵀx into the B-cos response γ · |ŵᵀx / ‖x‖|^(B-1) · ŵᵀx.

    Args:
        linear: ŵᵀx, any shape.
        norm: ‖x‖, broadcastable to `linear`.
        b: The exponent B, not 1.
        gamma: The fixed output scale γ.
        inplace: Write into `linear` where no gradient is needed.
        training: Whether the layer behind may keep the response in place of `linear` (`origin`).

    Returns:
        The shape and dtype of `linear`.
    """
    if not torch.jit.is_scripting():
        if has_torch_function((linear, norm)):
            return handle_torch_function(scale_by_cosine, (linear, norm), linear, norm, b, gamma, inplace, training)
        needs_grad = torch.is_grad_enabled() and (linear.requires_grad or norm.requires_grad)
        if b == 2 and inplace and not needs_grad:
            return _square_in_place(linear, gamma / norm)
        if b == 2:
            return _traced(linear, norm, gamma, training)
    return (linear * cosine_factor(linear, norm, b, gamma)).to(linear.dtype)


def cosine_factor(linear: Tensor, norm: Tensor, b: float, gamma: float, eps: float = 1e-6) -> Tensor:
    """γ · |cos|^(B-1), what `scale_by_cosine` multiplies by; |cos| = |ŵᵀx| / ‖x‖, plus eps unless B is 2."""
    if b == 2:
        return linear.abs() * (gamma / norm)
    return gamma * _power(linear.abs() / norm + eps, b - 1)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent of positive x. Roots are faster than `pow`, forward and backward."""
    if exponent == 0.25:
        return x.sqrt().sqrt()
    return x.sqrt() if exponent == 0.5 else x.pow(exponent)


def constant_factor(linear: Tensor, norm: Tensor, b: float, gamma: float) -> Tensor:
    """`cosine_factor` of constants, in the dtype of `linear`."""
    inverse = gamma / norm
    if b != 2 or linear.requires_grad or not _has_parts(linear, inverse):
        return cosine_factor(linear, norm, b, gamma).to(linear.dtype)
    factor = torch.empty_like(linear)
    for part, scale, out in pieces(linear, inverse, factor):
        _write(out, _abs(part, scale, out).mul_(scale))
    return factor


def signed_square(linear: Tensor, inverse_norm: Tensor) -> Tensor:
    """|a| · a / n, the B = 2 response, from a and 1 / n."""
    # |a| / n comes first: it is a cosine, whereas |a| · a overflows float16
    if torch.is_grad_enabled() or not _has_parts(linear, inverse_norm):
        return (linear.abs().to(inverse_norm.dtype) * inverse_norm * linear).to(linear.dtype)
    y = torch.empty_like(linear)
    for part, inverse, out in pieces(linear, inverse_norm, y):
        _write(out, _abs(part, inverse, out).mul_(inverse).mul_(part))
    return y


def _square_in_place(linear: Tensor, inverse_norm: Tensor) -> Tensor:
    if not _has_parts(linear, inverse_norm):
        return linear.mul_(linear.abs().to(inverse_norm.dtype).mul_(inverse_norm))
    for part, inverse in pieces(linear, inverse_norm):
        part.mul_(part.abs().to(inverse.dtype).mul_(inverse))
    return linear


def _has_parts(linear: Tensor, inverse_norm: Tensor) -> bool:
    """Whether buffers may be written to by parts: eager mode, a norm for each image."""
    return not is_program(linear) and linear.ndim > 0 and len(linear) == len(inverse_norm) > 0


def _abs(part: Tensor, like: Tensor, out: Tensor) -> Tensor:
    """|part| in `out`, or, for half-precision parts of wider norms, in a buffer of the norm's dtype."""
    return torch.abs(part, out=out) if part.dtype == like.dtype else part.to(like.dtype).abs_()


def _write(out: Tensor, result: Tensor) -> None:
    if result is not out:
        out.copy_(result)


class _Saved(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]
    gamma: float


class _SignedSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, linear: Tensor, norm: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(linear, norm)
        ctx.gamma = gamma
        return signed_square(linear, gamma / norm)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        linear, norm = ctx.saved_tensors
        inverse_norm = ctx.gamma / norm
        if torch.is_grad_enabled() or not _has_parts(linear, inverse_norm):
            weighted = linear.abs().to(inverse_norm.dtype) * grad
            by_norm = -(weighted * linear).sum_to_size(norm.shape) * inverse_norm / norm
            return (weighted * (2 * inverse_norm)).to(linear.dtype), by_norm, None
        by_linear, by_norm = torch.empty_like(linear), torch.empty_like(norm)
        for part in pieces(linear, norm, inverse_norm, grad, by_linear, by_norm):
            square_gradient(*part)
        return by_linear, by_norm, None


def square_gradient(
    linear: Tensor, norm: Tensor, inverse_norm: Tensor, grad: Tensor, out: Tensor, out_norm: Tensor
) -> None:
    """Write the gradients of γ · |a| · a / n to `out` and `out_norm`; `inverse_norm` is γ / n."""
    weighted = _abs(linear, inverse_norm, out).mul_(grad)
    out_norm.copy_((weighted * linear).sum_to_size(norm.shape)).mul_(inverse_norm).div_(norm).neg_()
    _write(out, weighted.mul_(2 * inverse_norm))


class Origin(NamedTuple):
    """What a B = 2 response y = γ · |a| · a / n was computed from."""

    linear: Tensor
    norm: Tensor
    gamma: float


def _traced(linear: Tensor, norm: Tensor, gamma: float, training: bool) -> Tensor:
    y: Tensor = _SignedSquare.apply(linear, norm, gamma)
    if training and not is_program(y):
        _ORIGINS[y] = y._version, Origin(linear, norm, gamma)
    return y


_ORIGINS = WeakIdKeyDictionary()  # a response that is alive, to its version and its origin


def origin(y: Tensor) -> Origin | None:
    """What a response in training was computed from.

    None for any other tensor, for one that has been changed, and for one whose own gradient somebody wants.
    """
    version, found = _ORIGINS.get(y, (None, None))
    is_wanted = y.retains_grad or bool(y._backward_hooks)
    return found if version == y._version and not is_wanted else None


def gradients_past(y: Tensor, norm: Tensor, gamma: float, grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a B = 2 response from the response alone, since |a| = sqrt(|y| · n / γ).

    Args:
        y: γ · |a| · a / n with γ > 0.
        norm: n.
        gamma: γ.
        grad: By y, but for what `slope` adds: the gradient is grad + slope · y.
        slope: The shape of `norm`.

    Returns:
        The gradients by a and by n.
    """
    scale = 4 * gamma / norm
    if torch.is_grad_enabled() or not _has_parts(y, scale):
        whole = torch.addcmul(grad, y, slope.to(y.dtype))
        squares = y.abs() * scale
        is_zero = squares == 0  # where the root has no derivative, though |a| has 0
        by_linear = (squares + is_zero.to(squares.dtype)).sqrt().masked_fill(is_zero, 0.0) * whole
        return by_linear.to(y.dtype), -(y.to(norm.dtype) * whole).sum_to_size(norm.shape) / norm
    by_linear, by_norm = torch.empty_like(y), torch.empty_like(norm)
    for part, n, q, g, s, out, out_norm in pieces(y, norm, scale, grad, slope, by_linear, by_norm):
        whole = torch.addcmul(g, part, s.to(part.dtype))
        out_norm.copy_((part * whole).sum_to_size(n.shape)).div_(n).neg_()
        _write(out, _abs(part, q, out).mul_(q).sqrt_().mul_(whole))
    return by_linear, by_norm
