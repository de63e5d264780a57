"""Functions of lists of tensors, of sparse tensors and of segments."""

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .registry import Function, Mode, detached, rule

__all__: list[str] = []

PREFIX = "_foreach_"


def _single(name: str) -> Function | None:
    """The function that `torch._foreach_<name>` applies to each tensor of its lists."""
    found: Function | None = getattr(Tensor if name.endswith("_") else torch, name, None)
    return found


FOR_EACH: dict[Function, Function] = {
    getattr(torch, name): single
    for name in dir(torch)
    if name.startswith(PREFIX) and (single := _single(name.removeprefix(PREFIX))) is not None
}


@rule(*FOR_EACH)
def _for_each(mode: Mode, func: Function, /, *args: Any, **kwargs: Any) -> list[Any] | None:
    rows = zip(*(value if isinstance(value, list | tuple) else repeat(value) for value in args), strict=False)
    results = [mode.__torch_function__(FOR_EACH[func], (), row, kwargs) for row in rows]
    return None if func.__name__.endswith("_") else results


@rule(torch.sparse_coo_tensor)
def _sparse(mode: Mode, func: Function, /, indices: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(detached(indices), values, *args, **kwargs)


@rule(torch.sparse.softmax, torch.sparse.log_softmax)
def _sparse_gate(mode: Mode, func: Function, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(detached(input), *args, **kwargs)


@rule(torch.segment_reduce)
def _segment_reduce(mode: Mode, func: Function, /, data: Tensor, reduce: str, **kwargs: Any) -> Tensor:
    """Sums, means, maxima or minima of segments, whose lengths are constants of the linear map."""
    if reduce == "prod":
        raise NotImplementedError("segment_reduce with reduce='prod' is no linear map of what it reduces")
    return func(data, reduce, **{name: detached(value) for name, value in kwargs.items()})
