"""MaxOut: the largest response of neighbouring units (section 4 of arXiv 2205.10268)."""

from functools import reduce

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["max_out"]


class _Winners(FunctionCtx):
    """What forward leaves to backward: which of the neighbours won."""

    saved_tensors: tuple[Tensor, ...]
    units: int
    dim: int
    like: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class _MaxOut(torch.autograd.Function):
    """The largest of each M neighbours, in the memory layout of the input both ways."""

    @staticmethod
    def forward(ctx: _Winners, x: Tensor, units: int, dim: int) -> Tensor:
        first, *others = _neighbours(x, units, dim)
        best, winner = first, torch.zeros_like(first, dtype=torch.uint8)
        for i, unit in enumerate(others, start=1):
            winner.masked_fill_(unit > best, i)
            best = torch.maximum(best, unit)
        ctx.save_for_backward(winner)
        ctx.units, ctx.dim, ctx.like = units, dim, (x.size(), x.stride(), x.dtype, x.device)
        return best

    @staticmethod
    def backward(ctx: _Winners, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (winner,) = ctx.saved_tensors
        size, stride, dtype, device = ctx.like
        if torch.is_grad_enabled():  # a second derivative will be taken
            after = ctx.dim + 1 if ctx.dim >= 0 else ctx.dim
            return torch.stack([grad * (winner == i) for i in range(ctx.units)], after).reshape(size), None, None
        grad_x = torch.empty_strided(size, stride, dtype=dtype, device=device)
        for i, unit in enumerate(_neighbours(grad_x, ctx.units, ctx.dim)):
            unit.copy_(grad * (winner == i))
        return grad_x, None, None


def _neighbours(x: Tensor, units: int, dim: int) -> list[Tensor]:
    """Views of the first, second, ... of each M neighbours along a dimension, 1 or -1."""
    grouped = x.unflatten(dim, (-1, units))
    return [grouped.select(dim + 1 if dim >= 0 else dim, i) for i in range(units)]


def max_out(x: Tensor, units: int, dim: int) -> Tensor:
    """MaxOut: the largest response of each M neighbouring units (section 4 of arXiv 2205.10268).

    Args:
        x: Responses, unit m of output o at index o · M + m.
        units: M.
        dim: 1 for feature maps (N, O · M, H, W), -1 for feature vectors (..., O · M).

    Returns:
        The same with O instead of O · M.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(x):
            return handle_torch_function(max_out, (x,), x, units, dim)
        if torch.is_grad_enabled():
            return _MaxOut.apply(x, units, dim)
        first, *others = _neighbours(x, units, dim)
        return reduce(torch.maximum, others, first)
    return x.unflatten(dim, [-1, units]).max(dim + 1 if dim >= 0 else dim)[0]
