"""Modules as objects: copied without copying tensors, watched for the time of a block, and what they return."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

__all__ = ["clone", "first_output", "frozen_copy", "hooked"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


def clone(module: ModuleT, **members: Any) -> ModuleT:
    """A module that shares parameters, buffers and children with another one, but for those named.

    Args:
        module: Not changed, whatever is done to the clone's members.
        members: Parameters (None for none), buffers or children that the clone has instead.
    """
    new = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = dict(module.__dict__[kind])
    for name, value in members.items():
        setattr(new, name, value)
    return new


def frozen_copy(model: ModuleT) -> ModuleT:
    """A private copy of a network: modules of its own, the same numbers in memory, no parameter that learns.

    What is done to the copy (hooks, modes, replaced modules) no other user of the network can see.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def first_output(output: Any) -> Any:
    """What a network returns without what only training needs: the first of several outputs."""
    return output[0] if isinstance(output, tuple | list) and output else output


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call `hook(module, args, output)` after each forward pass of the modules, until the block ends.

    Hooks are seen by every user of the modules: give those of a `frozen_copy`.
    """
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
