"""Sums of the linear path and something else, in all forms: what is added is noted by the mode."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import functional
from .table import Function, Mode, Operand, detached, handles, named, on_linear_path

__all__ = ["add"]

SUBTRACTING = {*named("sub __sub__ __isub__ sub_ subtract subtract_")}
REVERSED = {*named("rsub __rsub__")}


CHANGING = {*named("__iadd__ __isub__ add_ sub_ subtract_")}
ADDING = {*named("add __add__ __radd__ __iadd__ add_")}


def coefficients(func: Function, alpha: float) -> tuple[float, float]:
    """Of the two operands of a sum or difference."""
    if func in REVERSED:
        return -alpha, 1
    return 1, -alpha if func in SUBTRACTING else alpha


@handles(*ADDING, *SUBTRACTING, *REVERSED)
def add(mode: Mode, func: Function, /, input: Operand, other: Operand, *, alpha: float = 1) -> Tensor:
    """Sums and differences."""
    addends = [
        (operand if coefficient == 1 else operand * coefficient, mode.is_gate(operand))
        for operand, coefficient in zip((input, other), coefficients(func, alpha), strict=True)
        if not on_linear_path(operand)
    ]
    if addends and not on_linear_path(input) and func in CHANGING:
        addends = [(addend.clone(), is_gate) for addend, is_gate in addends if isinstance(addend, Tensor)]
    y = func(input, other) if alpha == 1 else func(input, other, alpha=alpha)
    for addend, is_gate in addends:
        y = mode.add(y, addend, func, is_gate=is_gate)
    return y


@handles(functional.scale_and_offset)
def _scale_and_offset(mode: Mode, func: Function, /, image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return mode.add(func(image, scale, offset), offset, func)


@handles(functional.to_logits)
def _to_logits(mode: Mode, func: Function, /, y: Tensor, temperature: float, logit_bias: float) -> Tensor:
    return mode.add(func(y, temperature, logit_bias), logit_bias, func)


@handles(*named("cat concat concatenate stack hstack vstack dstack column_stack"))
def _join(mode: Mode, func: Function, /, tensors: Sequence[Tensor], *args: object, **kwargs: object) -> Tensor:
    return func([mode.operand(t, func) if t.is_floating_point() else t for t in tensors], *args, **kwargs)


@handles(*named("where"))
def choose(mode: Mode, func: Function, /, condition: Tensor, *branches: Any, **options: Any) -> Tensor:
    """Which of the two it is, is a constant of the linear map."""
    values = [*branches, *options.values()]
    if not values:
        return func(detached(condition))
    if func is Tensor.where:  # x.where(condition, other)
        condition, values[0] = values[0], condition
    first, second = values
    y = torch.where(condition, first, second)
    if not on_linear_path(first):
        y = mode.add(y, torch.where(condition, first, torch.zeros_like(y)), func, first)
    if not on_linear_path(second):
        y = mode.add(y, torch.where(condition, torch.zeros_like(y), second), func, second)
    return y


@handles(*named("maximum minimum fmax fmin"))
def _extremum(mode: Mode, func: Function, /, input: Tensor, other: Tensor) -> Tensor:
    takes_first = func(detached(input), detached(other)) == detached(input)
    return choose(mode, torch.where, takes_first, input, other)


@handles(F.pad)
def _pad(
    linear: Mode, func: Function, /, input: Tensor, pad: Sequence[int], mode: str = "constant",
    value: float | None = None,
) -> Tensor:  # fmt: skip
    y = func(input, pad, mode, value)
    if mode != "constant" or not value or not math.isfinite(value):
        return y
    return linear.add(y, func(torch.zeros_like(input), pad, mode, value), func)


@handles(*named("constant_pad_nd"))
def _constant_pad(linear: Mode, func: Function, /, input: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    return _pad(linear, F.pad, input, pad, "constant", value)


@handles(*named("lerp"))
def _lerp(mode: Mode, func: Function, /, input: Tensor, end: Tensor, weight: Operand) -> Tensor:
    """(1 - weight) · input + weight · end, the weight being a gate."""
    y, gate = func(input, end, detached(weight)), detached(weight)
    for operand, share in ((input, 1 - gate), (end, gate)):
        if not on_linear_path(operand):
            y = mode.add(y, operand * share, func, operand, weight)
    return y


WRITING = """
    __setitem__ index_put index_put_ masked_fill masked_fill_ masked_scatter masked_scatter_ copy_ scatter scatter_
    scatter_add scatter_add_ index_copy index_copy_ index_add index_add_ index_fill index_fill_ fill_ fill zero_
    slice_scatter select_scatter diagonal_scatter fill_diagonal_ put put_
"""


@handles(*named(WRITING))
def _write(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> Tensor | None:
    return _jointly_linear(mode, func, *args, **kwargs)


def _jointly_linear(mode: Mode, func: Function, /, *args: Any, **kwargs: object) -> Tensor | None:
    """A function that is linear in all that it reads or writes together.

    What an operand off the path adds is the function of that operand with zeros for all others.
    """
    names: list[int | str] = [*range(len(args)), *kwargs]
    values = dict(zip(names, (*args, *kwargs.values()), strict=True))
    addends = [name for name, value in values.items() if _is_addend(value) or name == _number(values)]
    sources = [name for name in addends if not on_linear_path(values[name])]
    alone = [{n: _alone(v, n == source) if n in addends else v for n, v in values.items()} for source in sources]
    are_gates = [mode.is_gate(values[source]) for source in sources]
    result = func(*args, **kwargs)
    target = args[0] if result is None else result
    for operands, is_gate in zip(alone, are_gates, strict=True):
        rest = {name: operands[name] for name in kwargs}
        part = func(*(operands[i] for i in range(len(args))), **rest)
        part = operands[0] if part is None else part
        if bool(part.any()):
            target = mode.add(target, part, func, is_gate=is_gate)
    return None if result is None else target


def _number(values: dict[int | str, Any]) -> int | str | None:
    """Where a number stands that is written: last, or under its name."""
    last = "value" if "value" in values else list(values)[-1]
    return last if isinstance(values[last], int | float) and last != 0 else None


def _is_addend(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _alone(value: object, is_source: bool) -> Any:
    if not isinstance(value, Tensor):
        return value if is_source else 0
    return value.detach().clone() if is_source else torch.zeros_like(value)
