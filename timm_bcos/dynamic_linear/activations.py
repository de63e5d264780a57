"""Activations: a(x) = a(0) + x · slope, the slope being a constant of the linear map."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import functional, primitives
from .registry import Function, Mode, Operand, detached, kept, named, on_linear_path, rule
from .sums import extremum

__all__ = ["activate", "steady"]

ZERO_AT_ZERO = """
    gelu silu silu_ mish mish_ hardswish hardswish_ elu elu_ celu celu_ selu selu_ relu6 softsign tanh tanh_ tanhshrink
    softshrink hardshrink
"""
OTHERS = (
    "softplus hardtanh hardtanh_ clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_ threshold threshold_"
)


@rule(functional.sigmoid_activation, *named(ZERO_AT_ZERO), *named(OTHERS))
def activate(mode: Mode, func: Function, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A torch function of one tensor, elementwise."""
    if not on_linear_path(input):
        return func(input, *args, **kwargs)
    if func in BOUNDED and any(isinstance(bound, Tensor) for bound in (*args, *kwargs.values())):
        return _between_tensors(mode, func, input, *args, **kwargs)
    sources = (*args, *kwargs.values())
    args, kwargs = tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}
    is_in_place = kwargs.pop("inplace", False) or func.__name__.endswith("_")
    func = OUT_OF_PLACE.get(func, func)
    source = kept(input) if is_in_place else input
    point = detached(source)
    point = steady(torch.where(point == 0, torch.finfo(point.dtype).eps, point))  # at 0 the tangent's slope
    value = func(point.clone(), *args, **kwargs)
    if _is_zero_at_zero(func, args, kwargs):
        result = source * (value / point)
    else:
        at_zero = func(point.detach().new_zeros(()), *args, **kwargs)
        result = mode.add(source * ((value - at_zero) / point) + at_zero, at_zero, func, *sources)
    return input.copy_(result) if is_in_place else result


def steady(point: Tensor) -> Tensor:
    """Where slopes f(p) / p are taken: near 0 their derivative, a difference of large numbers, counts as 0."""
    if not point.requires_grad:
        return point
    is_near = point.detach().abs() < torch.finfo(point.dtype).eps ** 0.5
    return torch.where(is_near, point.detach(), point)


IN_PLACE = "silu mish hardswish elu celu selu tanh hardtanh clamp clip clamp_min clamp_max threshold"
OUT_OF_PLACE = {
    getattr(space, f"{name}_"): getattr(space, name)
    for name in IN_PLACE.split()
    for space in (torch, torch.Tensor, F)
    if hasattr(space, f"{name}_") and hasattr(space, name)
}
NEVER_ZERO_AT_ZERO = {functional.sigmoid_activation, *named("softplus threshold")}
BOUNDED = {*named("clamp clip clamp_min clamp_max hardtanh clamp_ clip_ clamp_min_ clamp_max_ hardtanh_")}


LOWER, UPPER = {*named("clamp_min clamp_min_")}, {*named("clamp_max clamp_max_")}


def _bounds(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The lower and the upper bound, however they are given."""
    default = (-1.0, 1.0) if func.__name__.startswith("hardtanh") else (None, None)
    if func in UPPER:
        args = (None, *args)
    low, high = (
        args[i] if len(args) > i else kwargs.get(name, kwargs.get(f"{name}_val", default[i]))
        for i, name in enumerate(("min", "max"))
    )
    return low, None if func in LOWER else high


def _is_zero_at_zero(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Told from the arguments alone: a look at values would end `torch.export`'s trace."""
    if func not in BOUNDED:
        return func not in NEVER_ZERO_AT_ZERO
    low, high = _bounds(func, args, kwargs)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    return (low is None or low <= 0) and (high is None or high >= 0)


def _between_tensors(
    mode: Mode, func: Function, /, input: Tensor, *bounds: Operand | None, inplace: bool = False, **named_bounds: Any
) -> Tensor:
    """`clamp` by tensors: the largest and the smallest of two. The bounds are no path, but gates or constants."""
    low, high = _bounds(func, bounds, named_bounds)
    result = input
    for bound, extreme in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            limit = detached(bound) if isinstance(bound, Tensor) else input.detach().new_tensor(bound)
            result = extremum(mode, extreme, result, limit)
    return input.copy_(result) if inplace or func.__name__.endswith("_") else result


@rule(functional.shifted_activation)
def _shifted(mode: Mode, func: Function, /, input: Tensor, shift: Tensor, act: nn.Module) -> Tensor:
    """x · (a(x + shift) - a(shift)) / x; at 0 the slope beside it, a quotient that rounding leaves some digits of."""
    point, shift = detached(input), detached(shift)
    point = steady(torch.where(point == 0, torch.finfo(point.dtype).eps ** 0.5, point))
    change = act.forward(point + shift) - act.forward(shift.clone())  # hooks would see constants
    return input * (change / point)


@rule(*named("pow __pow__ square float_power"))
def _power(mode: Mode, func: Function, /, input: Tensor, exponent: Operand = 2) -> Tensor:
    """xᵖ = x · xᵖ⁻¹ for a number p of at least 1, or a tensor of exponents; other powers are statistics."""
    if not on_linear_path(input) or (not isinstance(exponent, Tensor) and exponent < 1):
        return torch.pow(detached(input), detached(exponent))
    point, exponent = detached(input), detached(exponent)
    if not isinstance(exponent, Tensor):
        return input * point.pow(exponent - 1)
    slope = point.pow(exponent - 1)
    return input * torch.where(slope.isfinite() | (point != 0), slope, 0.0)


@rule(*named("glu"))
def _glu(mode: Mode, func: Function, /, input: Tensor, dim: int = -1) -> Tensor:
    half, gate = input.chunk(2, dim)
    return half * detached(gate).sigmoid()


@rule(*named("hypot"))
def _hypot(mode: Mode, func: Function, /, input: Tensor, other: Tensor) -> Tensor:
    """√(a² + b²) = a · (a / h) + b · (b / h)."""
    length = func(detached(input), detached(other))
    length = torch.where(length == 0, 1.0, length)
    y = input * (detached(input) / length) + other * (detached(other) / length)
    for operand in (input, other):
        if not on_linear_path(operand):
            y = mode.add(y, operand * (operand / length), func, operand)
    return y


@rule(primitives.max_out)
def _max_out(mode: Mode, func: Function, /, x: Tensor, units: int, dim: int) -> Tensor:
    return x.unflatten(dim, (-1, units)).max(dim + 1 if dim >= 0 else dim).values


@rule(primitives.scale_by_cosine)
def _scale_by_cosine(
    mode: Mode, func: Function, /, linear: Tensor, norm: Tensor, b: float, gamma: float, inplace: bool = False,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    return linear * primitives.cosine_factor(detached(linear), detached(norm), b, gamma, groups).to(linear.dtype)


@rule(primitives.unit_weight, primitives.row_norm)
def _of_weights(mode: Mode, func: Function, /, weight: Tensor, *args: float) -> Tensor:
    """Weights that depend on the image: their norms are statistics."""
    norm = primitives.row_norm(detached(weight))
    if func is primitives.row_norm:
        return norm
    power = args[0] if args else 1.0
    scale = (norm + (norm == 0).to(norm.dtype)).pow(-power)
    return weight * scale.reshape([-1] + [1] * (weight.ndim - 1)).to(weight.dtype)
