"""Sums of the linear path and something else, in all forms: what is added is noted by the mode."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import functional
from .kinds import Kind, is_zero
from .registry import Function, Mode, Operand, detached, named, on_linear_path, rule

__all__ = ["add", "choose"]

SUBTRACTING = {*named("sub __sub__ __isub__ sub_ subtract subtract_")}
REVERSED = {*named("rsub __rsub__")}
ADDING = {*named("add __add__ __radd__ __iadd__ add_")}


def coefficients(func: Function, alpha: float) -> tuple[float, float]:
    """Of the two operands of a sum or difference."""
    if func in REVERSED:
        return -alpha, 1
    return 1, -alpha if func in SUBTRACTING else alpha


@rule(*ADDING, *SUBTRACTING, *REVERSED)
def add(mode: Mode, func: Function, /, input: Operand, other: Operand, *, alpha: float = 1) -> Tensor:
    """Sums and differences."""
    addends = [
        (operand, operand if coefficient == 1 else operand * coefficient, mode.kind_of(operand))
        for operand, coefficient in zip((input, other), coefficients(func, alpha), strict=True)
        if not on_linear_path(operand)
    ]
    if _changes(func) and not on_linear_path(input) and isinstance(input, Tensor):
        _join_base(mode, func, input)
        if input.requires_grad:  # a view of what is now on the path, with its constants noted
            addends = []
        else:
            addends = [(_copy(operand), _copy(addend), kind) for operand, addend, kind in addends]
    y = func(input, other) if alpha == 1 else func(input, other, alpha=alpha)
    if mode.tracker is not None and on_linear_path(y):
        for operand, addend, kind in addends:
            y = mode.add_kind(y, addend, func, (operand,) if alpha == 1 else (operand, alpha), kind)
    return y


def _changes(func: Function) -> bool:
    return func.__name__.startswith("__i") or (func.__name__.endswith("_") and not func.__name__.endswith("__"))


def _copy(value: Operand) -> Operand:
    return value.clone() if isinstance(value, Tensor) else value


def _join_base(mode: Mode, func: Function, target: Tensor) -> None:
    """Before the path is written to a part of a tensor off the path: all of it joins the path, its content noted."""
    base = target._base
    if base is None or mode.tracker is None or base.requires_grad or is_zero(base):
        return
    base.copy_(mode.operand(base, func))
    assert target.grad_fn is not None  # autograd notices that a view's base has changed when it is asked


@rule(functional.scale_and_offset)
def _scale_and_offset(mode: Mode, func: Function, /, image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return mode.add(func(image, scale, offset), offset, func)


@rule(functional.to_logits)
def _to_logits(mode: Mode, func: Function, /, y: Tensor, temperature: float, logit_bias: float) -> Tensor:
    return mode.add(func(y, temperature, logit_bias), logit_bias, func)


@rule(*named("cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag complex"))
def _join(mode: Mode, func: Function, /, *args: Any, **kwargs: Any) -> Tensor:
    """What stands beside the path, whatever its type, is noted whole."""
    dtype = next(x.dtype for x in _flat([*args, *kwargs.values()]) if on_linear_path(x))

    def joined(value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
            return [joined(v) for v in value]
        if not isinstance(value, Tensor) or on_linear_path(value):
            return value
        return mode.operand(_as_type(mode, value, dtype), func)

    return func(*map(joined, args), **{name: joined(value) for name, value in kwargs.items()})


def _flat(values: Sequence[Any]) -> list[Tensor]:
    return [x for v in values for x in (v if isinstance(v, list | tuple) else [v]) if isinstance(x, Tensor)]


def _as_type(mode: Mode, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers and booleans as numbers of the path's type; of the same kind."""
    if value.is_floating_point() or value.is_complex():
        return value
    converted = value.to(dtype)
    mode.inherit(converted, value)
    return converted


@rule(*named("where"))
def choose(mode: Mode, func: Function, /, *args: Any, **kwargs: Any) -> Tensor:
    """Which of the two it is, is a constant of the linear map."""
    values = list(args)
    if "condition" in kwargs:
        values.insert(1 if func is Tensor.where else 0, kwargs.pop("condition"))
    values += kwargs.values()
    if func is Tensor.where and len(values) > 1:  # x.where(condition, other)
        values[:2] = values[1], values[0]
    if len(values) == 1:
        return func(detached(values[0]))
    condition, first, second = values
    condition = detached(condition)
    y = torch.where(condition, first, second)
    zero = y.detach().new_zeros(())
    if not on_linear_path(first):
        y = mode.add(y, torch.where(condition, _tensor(first, y), zero), func, first)
    if not on_linear_path(second):
        y = mode.add(y, torch.where(condition, zero, _tensor(second, y)), func, second)
    return y


def _tensor(value: Operand, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else like.detach().new_tensor(value)


@rule(*named("maximum minimum fmax fmin"))
def extremum(mode: Mode, func: Function, /, input: Operand, other: Operand) -> Tensor:
    """Of two tensors elementwise: which one it is, is a constant of the linear map."""
    takes_first = func(detached(input), detached(other)) == detached(input)
    return choose(mode, torch.where, takes_first, input, other)


@rule(*named("max min"))
def _largest(mode: Mode, func: Function, /, input: Operand, *args: Any, **kwargs: Any) -> Any:
    """Of two tensors (`torch.max(a, b)`), or along an axis."""
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return extremum(mode, torch.maximum if func.__name__ == "max" else torch.minimum, input, other)
    return func(input, *args, **kwargs)


@rule(F.pad)
def _pad(
    linear: Mode, func: Function, /, input: Tensor, pad: Sequence[int], mode: str = "constant",
    value: float | None = None,
) -> Tensor:  # fmt: skip
    y = func(input, pad, mode, value)
    if mode != "constant" or not value or not math.isfinite(value):
        return y
    return linear.add(y, func(torch.zeros_like(input), pad, mode, value), func, value)


@rule(*named("constant_pad_nd"))
def _constant_pad(linear: Mode, func: Function, /, input: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    return _pad(linear, F.pad, input, pad, "constant", value)


@rule(*named("lerp"))
def _lerp(mode: Mode, func: Function, /, input: Tensor, end: Tensor, weight: Operand) -> Tensor:
    """(1 - weight) · input + weight · end, the weight being a gate."""
    y, gate = func(input, end, detached(weight)), detached(weight)
    for operand, share in ((input, 1 - gate), (end, gate)):
        if not on_linear_path(operand):
            y = mode.add(y, operand * share, func, operand, weight)
    return y


@rule(*named("diff"))
def _diff(
    mode: Mode, func: Function, /, input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> Tensor:  # fmt: skip
    parts = [x for x in (prepend, input, append) if x is not None]
    return func(_join(mode, torch.cat, parts, dim) if len(parts) > 1 else input, n, dim)


# Where the value stands that a function writes into its first operand, and its name.
WRITTEN = {
    1: "copy_ fill fill_",
    2: "__setitem__ masked_fill masked_fill_ masked_scatter masked_scatter_ index_put index_put_ put put_ "
    "fill_diagonal_value",
    3: "scatter scatter_ scatter_add scatter_add_ index_copy index_copy_ index_add index_add_ index_fill index_fill_ "
    "scatter_reduce scatter_reduce_ index_reduce index_reduce_",
}
AFTER = "slice_scatter select_scatter diagonal_scatter as_strided_scatter"
POSITIONS = {
    **{function: place for place, names in WRITTEN.items() for function in named(names)},
    **dict.fromkeys(named(AFTER), 1),
    **dict.fromkeys(named("fill_diagonal_"), 1),
}
NAMES = ("value", "src", "source", "values", "fill_value")
ACCUMULATING = {*named("scatter_add scatter_add_ index_add index_add_")}
LINEAR_REDUCTIONS = ("sum", "mean", "add")


@rule(*POSITIONS)
def write(mode: Mode, func: Function, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """What is written, and what is written over, add up: linear in both together."""
    place, name = POSITIONS[func] - 1, next((n for n in NAMES if n in kwargs), None)
    value = kwargs.pop(name) if name is not None else args[place] if len(args) > place else None
    places = [*args[:place], *args[place + 1 :]] if name is None else list(args)
    places = [detached(x) for x in places]

    def run(target: Tensor, written: object) -> Tensor:
        given = {name: written} if name is not None else {}
        positional = [*places[:place], written, *places[place:]] if name is None and value is not None else places
        result = func(target, *positional, **given, **kwargs)
        return target if result is None else result

    accumulates = func in ACCUMULATING or kwargs.get("accumulate", len(places) > 1 and places[1] is True)
    reduction = kwargs.get("reduce", places[2] if len(places) > 2 and isinstance(places[2], str) else None)
    if reduction is not None and reduction not in LINEAR_REDUCTIONS:
        return _reduce(mode, func, input, value, run, str(reduction))
    where = places if accumulates or reduction is not None else []  # what is replaced, is a choice; a sum is none
    return _write(mode, func, input, value, run, kwargs, mode.kind_of(*where, *(kwargs.values() if where else [])))


def _write(
    mode: Mode,
    func: Function,
    /,
    input: Tensor,
    value: Any,
    run: Callable[[Tensor, object], Tensor],
    options: dict[str, Any],
    where: Kind,
) -> Tensor | None:
    in_place = _changes(func) or func is Tensor.__setitem__
    if in_place and not on_linear_path(input):
        _join_base(mode, func, input)
    parts: list[tuple[object, Tensor, Any]] = []
    numbers = [number for number in options.values() if isinstance(number, int | float)]
    if mode.tracker is not None:
        if not on_linear_path(input):
            parts.append((input.clone(), run(input.detach().clone(), _nothing(value)), mode.kind_of(input)))
        if value is not None and not on_linear_path(value):
            zeros = torch.zeros_like(input, requires_grad=False)
            source = value.clone() if isinstance(value, Tensor) else value
            parts.append((source, run(zeros, value), max(where, mode.kind_of(value))))
    y = run(input, value)
    if on_linear_path(y):
        for source, part, kind in parts:
            if not is_zero(part):
                y = mode.add_kind(y, part, func, (source, *numbers), kind)
    return None if func is Tensor.__setitem__ else y


def _nothing(value: object) -> object:
    return torch.zeros_like(value, requires_grad=False) if isinstance(value, Tensor) else 0


def _reduce(
    mode: Mode, func: Function, /, input: Tensor, value: Any, run: Callable[[Tensor, object], Tensor], reduction: str
) -> Tensor:
    """The largest or smallest of what meets: which one it is, is a constant of the linear map."""
    if reduction not in ("amax", "amin"):
        raise NotImplementedError(f"reduce={reduction!r} is no linear map of what it reduces")
    target, source = (x if on_linear_path(x) else mode.operand(x, func) for x in (input, value))
    return run(target, source)


@rule(*named("zero_"))
def _zero(mode: Mode, func: Function, /, input: Tensor) -> Tensor:
    return func(input)
