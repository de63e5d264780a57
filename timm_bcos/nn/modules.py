"""Modules as objects: copied without copying tensors, watched for the time of a block, and what they return."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import TargetError

__all__ = ["clone", "converted_part", "first_output", "frozen_copy", "hooked", "isolate", "pick_output"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


def clone(module: ModuleT, **members: object) -> ModuleT:
    """A module that shares parameters, buffers, children and hooks with another one, but for those named.

    Args:
        module: Not changed, whatever is done to the clone's members.
        members: Parameters (None for none), buffers or children that the clone has instead.
    """
    new = copy.copy(module)
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or name.endswith(("_hooks", "_hooks_with_kwargs")):
            new.__dict__[name] = copy.copy(value)
    new.__dict__.pop("_compiled_call_impl", None)  # a program of the other one
    for name, value in members.items():
        setattr(new, name, value)
    return new


def isolate(model: ModuleT, names: Iterable[str]) -> ModuleT:
    """A network with clones of the named modules and of all on the way to them; everything else is shared.

    What is done to the clones (hooks, children) no other user of the network can see.

    Args:
        model: Not changed.
        names: Paths, as in `model.named_modules()`.
    """
    clones: dict[str, nn.Module] = {"": clone(model)}
    for name in names:
        path = ""
        for part in name.split("."):
            parent, path = clones[path], f"{path}.{part}" if path else part
            if path not in clones:
                clones[path] = clone(parent.get_submodule(part))
                parent._modules[part] = clones[path]
    return clones[""]  # type: ignore[return-value]


def frozen_copy(model: ModuleT) -> ModuleT:
    """A private copy of a network: modules of its own, the same numbers in memory, no parameter that learns.

    What is done to the copy (hooks, modes, replaced modules) no other user of the network can see. Tensors that modules
    keep besides (weight norm's product, activations that a hook has stored) are shared too, without their graphs. Hooks
    are shared with what they hold, unless they belong to the network. The copy recomputes nothing in the backward pass,
    if the network did (gradient checkpointing).
    """
    memo: dict[int, object] = {id(hook): hook for hook in _foreign_hooks(model)}
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):
            detached = tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(detached, requires_grad=False) if is_parameter else detached
    new = copy.deepcopy(model, memo)
    for module in new.modules():
        if getattr(module, "grad_checkpointing", False) is True:
            module.grad_checkpointing = False  # type: ignore[assignment]
    return new


def _foreign_hooks(model: nn.Module) -> Iterator[object]:
    """Hooks that neither modules of the network nor what they hold have registered."""
    own = {id(value) for module in model.modules() for value in (module, *vars(module).values())}
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs")):
                yield from (hook for hook in hooks.values() if id(_owner(hook)) not in own)


def _owner(hook: object) -> object:
    """What a bound method, or a partial one, belongs to."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", hook)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in list(value.values()) if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def converted_part(model: nn.Module) -> nn.Module:
    """The converted model within wrappers (`DataParallel`, a Lightning module), which know what it is made of.

    Args:
        model: Returned as it is if nothing in it is a converted model.
    """
    return next((module for module in model.modules() if hasattr(module, "bcos_config")), model)


def first_output(output: object) -> Any:
    """What a network returns, without what only training needs: the first of a tuple, list or dict."""
    parts = _parts(output)
    return next(iter(parts.values())) if parts else output


def pick_output(output: object, name: str | int | None, what: str) -> Any:
    """One of several outputs.

    Args:
        output: A tensor, or a tuple, list or dict of tensors.
        name: Key or index; None for the first.
        what: Returned it, in words.

    Raises:
        TargetError: If there is none of that name.
    """
    parts = _parts(output)
    if name is None or (not parts and name == 0):
        return first_output(output)
    if not parts:
        raise TargetError(f"output={name!r}: {what} returns a single tensor")
    if name not in parts:
        raise TargetError(f"output={name!r}: {what} returns {', '.join(map(repr, parts))}")
    return parts[name]


def _parts(output: object) -> dict[str | int, object]:
    if isinstance(output, dict):
        return dict(output)
    return dict(enumerate(output)) if isinstance(output, tuple | list) else {}


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
