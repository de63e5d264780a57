"""Views that may be written to: autograd forbids it for the parts that one function returns together."""

from typing import Any

from torch import Tensor

from .table import named

__all__ = ["PARTS", "as_single_views"]

# Functions that take a tensor apart.
PARTS = frozenset(named("chunk split tensor_split split_with_sizes unbind hsplit vsplit dsplit unsafe_chunk"))


def as_single_views(source: Tensor, result: Any) -> Any:
    """The parts of a tensor, each as a view of its own.

    Args:
        source: What was taken apart.
        result: What torch returned.
    """
    if not result or not all(part._is_view() for part in result):
        return result
    first, starts = result[0], [part.storage_offset() - source.storage_offset() for part in result]
    if first.ndim < source.ndim:  # unbind
        axis = next(d for d in range(source.ndim) if source.shape[:d] + source.shape[d + 1 :] == first.shape
                    and source.stride()[:d] + source.stride()[d + 1 :] == first.stride())  # fmt: skip
        return type(result)(source.select(axis, i) for i in range(len(result)))
    changed = [d for d in range(source.ndim) if source.shape[d] != first.shape[d]]
    if not changed:
        return type(result)([source.narrow(0, 0, source.shape[0])])
    if not source.stride(changed[0]):
        return result
    axis, stride = changed[0], source.stride(changed[0])
    return type(result)(
        source.narrow(axis, start // stride, part.shape[axis]) for start, part in zip(starts, result, strict=True)
    )
