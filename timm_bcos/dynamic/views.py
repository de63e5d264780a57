"""Views that may be written to: autograd forbids it for the parts that one function returns together."""

from typing import Any

from torch import Tensor

__all__ = ["as_single_views"]


def as_single_views(source: Tensor, result: Any) -> Any:
    """The parts of a tensor (`chunk`, `split`, `unbind`), each as a view of its own; anything else as it is.

    Args:
        source: What was taken apart.
        result: What torch returned.
    """
    if not isinstance(result, list | tuple) or type(result) not in (list, tuple) or not result:
        return result
    if not all(isinstance(part, Tensor) and part._is_view() and part._base is _base(source) for part in result):
        return result
    return type(result)(source.as_strided(part.shape, part.stride(), part.storage_offset()) for part in result)


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base
