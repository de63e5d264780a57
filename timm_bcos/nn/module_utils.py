"""Modules as objects: copied without copying tensors, watched for the time of a block, and what they return."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from .._compat import timm_layers as layers
from ..errors import TargetError
from .norms import UncenteredBatchNorm2d

__all__ = [
    "Factory",
    "buffer_device",
    "channel_axis",
    "clone",
    "converted_part",
    "first_output",
    "frozen_copy",
    "hooked",
    "image_size",
    "isolate",
    "pick_output",
    "told_classifiers",
]


class Factory(TypedDict, total=False):
    """Keywords that every layer hands to those inside it."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def buffer_device(weight: Tensor) -> torch.device:
    """Where the buffers of a layer belong: where its weight is.

    But for accelerate's `init_empty_weights`, which lets parameters alone be empty: no file would fill such buffers.
    """
    usual = torch.empty(0).device
    if weight.is_meta and usual.type != "meta" and nn.Linear(1, 1).weight.is_meta:
        return usual
    return weight.device


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
    """A model with clones of the named modules and of all on the way to them; everything else is shared.

    What is done to the clones (hooks, children) no other user of the model can see.

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
    """A private copy of a model: modules of its own, the same numbers in memory, no parameter that learns.

    What is done to the copy (hooks, modes, replaced modules) no other user of the model can see. Tensors that modules
    keep besides (weight norm's product, activations that a hook has stored) are shared too, without their graphs. Hooks
    are shared with what they hold, unless they belong to the model. The copy recomputes nothing in the backward pass,
    if the model did (gradient checkpointing).
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
    """Hooks that neither modules of the model nor what they hold have registered."""
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


def told_classifiers(model: Any) -> list[nn.Module]:
    """What timm's `get_classifier` names: several for distilled models, none where there is no such method.

    Nor is there one where the method fails: some of timm's look inside a head that `num_classes=0` has removed.
    """
    try:
        told = model.get_classifier()
    except AttributeError:
        return []
    return [head for head in (told if isinstance(told, tuple | list) else [told]) if isinstance(head, nn.Module)]


def first_output(output: object) -> Any:
    """What a model returns, without what only training needs: the first of a tuple, list or dict."""
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


# Where types of modules have their channels; the first row that a module is an instance of counts.
CHANNEL_AXES: tuple[tuple[int, tuple[type[nn.Module], ...]], ...] = (
    (1, (
        layers.LayerNorm2d, layers.LayerNorm2dFp32, layers.LayerNormAct2d, layers.LayerNormAct2dFp32,
        layers.RmsNorm2d, layers.RmsNorm2dFp32, layers.SimpleNorm2d, layers.SimpleNorm2dFp32,
        layers.FrozenBatchNormAct2d, UncenteredBatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool2d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
        nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
    )),
    (-1, (
        nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase,
        layers.RmsNorm, layers.RmsNormFp32, layers.SimpleNorm, layers.SimpleNormFp32,
    )),
)  # fmt: skip


def channel_axis(module: nn.Module, output: Tensor, model: nn.Module | None = None) -> int:
    """Which axis of a module's output counts its units: formats change inside models, so the model cannot say.

    1. Of (N, C) it is 1.
    2. The module's type says: 1 for convolutions, batch norms, pooling, ...; the last one for linear layers, layer
       norms over features, ...
    3. Of other modules (blocks, activations) the last such module within them says, or else the last one registered
       before them in the model. The `output_fmt` of the module, or else of the model (for tokens (N, L, C): the
       last axis) says something else where the data are permuted in between: then the axis that is as long as that
       module has channels counts.
    4. If both or neither is as long, the type says if all types within the module agree, otherwise the model's
       format.

    Args:
        module: What returned the output.
        output: (N, ...), with at least two axes.
        model: Which the module is a part of; without it formats are (N, C, H, W) and (N, L, C).

    Returns:
        From 1 to output.ndim - 1.
    """
    typed = _axis_of_type(module)
    if output.ndim == 2 or typed is not None:
        return (typed or 1) % output.ndim
    named = getattr(module, "output_fmt", None) or getattr(model, "output_fmt", "NCHW")
    by_format = 1 if output.ndim > 3 and named == "NCHW" else output.ndim - 1
    inside = [m for m in module.modules() if _axis_of_type(m)] or _last_before(module, model)
    axes = [(_axis_of_type(m) or 1) % output.ndim for m in reversed(inside)]
    if not axes:
        return by_format
    width = _width([module, *reversed(inside)])
    fitting = {axis for axis in (axes[0], by_format) if output.shape[axis] == width}
    if len(fitting) == 1:
        return fitting.pop()
    return axes[0] if len(set(axes)) == 1 and output.ndim > 3 else by_format


def _axis_of_type(module: nn.Module) -> int | None:
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:  # (C, H, W)
        return 1
    return next((axis for axis, kinds in CHANNEL_AXES if isinstance(module, kinds)), None)


def _last_before(module: nn.Module, model: nn.Module | None) -> list[nn.Module]:
    before: list[nn.Module] = []
    for other in model.modules() if model is not None else ():
        if other is module:
            return before[-1:]
        before += [other] if _axis_of_type(other) else []
    return []


def _width(modules: list[nn.Module]) -> int | None:
    """Channels that the first module has which knows their number."""
    for module in modules:
        for name in ("out_features", "out_channels", "num_features", "num_channels", "normalized_shape"):
            value = getattr(module, name, None)
            if value is not None:
                return value if isinstance(value, int) else value[0]
    return None


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is made for, in pixels.

    For timm's models of a fixed size it is the `img_size` of the outermost module that has one, mostly the patch
    embedding: `create_model(..., img_size=...)` and `set_input_size` change it, while `pretrained_cfg` keeps the size
    of the pretrained weights. For all others it is the cfg's, or (224, 224) without one.
    """
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    named: Any = converted_part(model)
    height, width = timm.data.resolve_model_data_config(named)["input_size"][-2:]
    return height, width
