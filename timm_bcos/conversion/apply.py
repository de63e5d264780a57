"""Third step of a conversion: carry out the plan. Only this step changes the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosPool2d
from ..nn.layers import ShiftedActivation
from ..nn.module_utils import buffer_device
from .fusing import FOLDING, fuse_within
from .plan import Plan
from .problems import CALL_HOOKS
from .settings import SETTINGS, encode_settings

__all__ = ["apply_plan", "link_heads"]

POOLING = (BcosPool2d, BcosFlatten)  # a tuple: torch.compile of torch 2.6 does not support `isinstance(x, A | B)`


def apply_plan(plan: Plan, set_class: Callable[[nn.Module, bool], None]) -> nn.Module:
    """Convert a model as planned.

    Args:
        plan: Plan of the conversion.
        set_class: Called with the root, and whether its forward methods call an `ImageReader`, to set the root's class.
            A callback, because the class lives in `converted`, which imports this module: its methods convert again.

    Returns:
        The converted model.
    """
    set_class(plan.root, plan.forward_calls_reader)  # first, because Python may refuse it
    _replace_modules(plan)
    for name, value in plan.attributes.items():
        setattr(plan.root, name, value)
    if not plan.forward_calls_reader:
        _put_first(plan.root, "image_reader")
    _disable_folding(plan)
    _set_reference(plan)
    link_heads(plan.root)
    device = next((buffer_device(parameter) for parameter in plan.root.parameters()), None)
    plan.root.register_buffer(SETTINGS, encode_settings(plan.root, plan.attributes["bcos_config"], device))
    return plan.root


def _replace_modules(plan: Plan) -> None:
    for path, (old, new) in plan.replacements.items():
        _move_hooks(old, new)
        if path:
            parent, _, name = path.rpartition(".")
            setattr(plan.converted.get_submodule(parent), name, new)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module's call hooks to its replacement. The dicts move, so handles can still remove their hooks."""
    for name in CALL_HOOKS:
        hooks = old.__dict__[name]
        hooks.update(new.__dict__[name])
        new.__dict__[name] = hooks
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _put_first(root: nn.Module, name: str) -> None:
    """Make a child the first one, if there is one of that name: the root may run its children in order."""
    if name in root._modules:
        others = {other: child for other, child in root._modules.items() if other != name}
        first = root._modules[name]
        root._modules.clear()
        root._modules.update({name: first} | others)


def _disable_folding(plan: Plan) -> None:
    """Replace methods that timm's `reparameterize_model` calls."""
    for module in plan.foldable:
        for name in FOLDING:
            if hasattr(type(module), name):
                setattr(module, name, partial(fuse_within, module))


@torch.no_grad()
def _set_reference(plan: Plan) -> None:
    """Let activations of a B-cos model with `bias="reference"` start at their reference."""
    for path, activations in plan.reference_activations.items():
        act: Any = getattr(plan.converted.get_submodule(path), "act", None)
        if isinstance(act, ShiftedActivation):
            act.shift.copy_(activations)


def link_heads(model: Any) -> None:
    """Set `deferred` on pooling layers whose sibling classifier does the pooling; unset it on the others.

    Args:
        model: A converted model. Its classifier may have been assigned or wrapped by others since the conversion.
    """
    for path, names in model.head_paths.items():
        head = _find(model, path)
        children = {} if head is None else head._modules
        defers = any(isinstance(child, BcosConvClassifier) for child in children.values())
        defers = defers or any(_holds_classifier(children.get(name)) for name in names)
        for child in children.values():
            if isinstance(child, POOLING) and child.deferred != defers:
                child.deferred = defers


def _holds_classifier(module: nn.Module | None) -> bool:
    """Whether a module is or contains a classifier, for instance in a Sequential, an adapter of PEFT's, or compiled."""
    if module is None:
        return False
    if isinstance(module, BcosConvClassifier):
        return True
    return any(_holds_classifier(child) for child in module._modules.values())


def _find(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
