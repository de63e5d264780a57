"""Weights as B-cos layers use them: rows of unit norm, or of the norm that the response asks for.

Section 3.2.2 of https://arxiv.org/abs/2205.10268 (ŵ), section 3 of https://arxiv.org/abs/2411.00715 (free rows).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.weak import WeakIdKeyDictionary

from .memory import is_program

__all__ = ["effective_weight", "forget_weight", "kept_as_parameters", "remembered_weight", "row_norm", "unit_weight"]


def effective_weight(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    """What a layer multiplies x by.

    Rows of unit norm; free rows keep √‖w‖ at B = 2, because the response squares it, and ‖w‖ at B = 1.
    """
    if normalize_weight or b not in (1.0, 2.0):
        return unit_weight(weight)
    return weight if b == 1.0 else unit_weight(weight, 0.5)


def row_norm(weight: Tensor) -> Tensor:
    """‖w‖ of each output row, (O, ...) to (O,)."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def _inverse_norm(weight: Tensor, power: float) -> Tensor:
    """(O, 1, ...) 1 / norm of each row to a power; 1 for a row of zeros, which stays one."""
    norm = row_norm(weight)
    return (norm + (norm == 0).to(norm.dtype)).pow(-power).reshape([-1] + [1] * (weight.ndim - 1))


class _Saved(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]
    power: float


class _UnitWeight(torch.autograd.Function):
    """w · n^-p, whose gradient takes two passes: n^-p · (g - p · ŵ · ŵᵀg)."""

    @staticmethod
    def forward(ctx: _Saved, weight: Tensor, power: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.power = power
        return weight * _inverse_norm(weight, power)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        inverse = _inverse_norm(weight, 1.0)
        dims = list(range(1, weight.ndim))
        slope = -ctx.power * inverse.square() * (grad * weight).sum(dims, keepdim=True)
        return torch.addcmul(grad, weight, slope) * inverse.pow(ctx.power), None


def unit_weight(weight: Tensor, power: float = 1.0) -> Tensor:
    """Divide each output row of a weight by its Euclidean norm to the given power; 1 gives ŵ.

    Args:
        weight: (O, ...), one row per output unit.
        power: 1 for unit norm; 1/2 leaves rows of norm √‖w‖, whose B = 2 unit has the amplitude of w itself.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(weight):
        return handle_torch_function(unit_weight, (weight,), weight, power)
    if torch.jit.is_scripting():
        return weight * _inverse_norm(weight, power)
    return _UnitWeight.apply(weight, power)


_REMEMBERED = WeakIdKeyDictionary()  # weight to (state of weight and layer, what it gave)


def remembered_weight(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    """`effective_weight`, computed once for all inferences until the weight changes.

    A change is told by the version that torch counts for every tensor. It misses writes to `weight.data`, which go
    round it on purpose: `forget_weight` after them, or call the network's `eval()`.
    """
    if not torch.jit.is_scripting() and _is_memorable(weight):
        return _remembered(weight, b, normalize_weight)
    return effective_weight(weight, b, normalize_weight)


def _remembered(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    key = weight._version, weight.data_ptr(), weight.dtype, b, normalize_weight
    found: tuple[object, Tensor] | None = _REMEMBERED.get(weight)
    if found is None or found[0] != key:
        found = key, effective_weight(weight, b, normalize_weight)
        _REMEMBERED[weight] = found
    return found[1]


@contextmanager
def kept_as_parameters(weight: Tensor, used: Tensor, b: float, normalize_weight: bool) -> Iterator[None]:
    """What is computed inside keeps no copy of a weight for its backward pass, which computes it again.

    Args:
        weight: The parameter.
        used: What `effective_weight` made of it.
        b: As there.
        normalize_weight: As there.
    """
    if has_torch_function_unary(used) or used is weight or not used.requires_grad or is_program(used):
        yield
        return
    key = used.data_ptr()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        is_used = saved.data_ptr() == key and saved.numel() == weight.numel()
        return (saved.size(), saved.stride()) if is_used else saved

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return effective_weight(weight.detach(), b, normalize_weight).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def forget_weight(weight: Tensor) -> None:
    """Compute it anew the next time."""
    _REMEMBERED.pop(weight, None)


def _is_memorable(weight: Tensor) -> bool:
    """Eager inference alone: programs compute what they are given, and gradients need the way there."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or has_torch_function_unary(weight):
        return False
    return not torch.is_grad_enabled() and not weight.is_inference() and weight.device.type != "meta"
