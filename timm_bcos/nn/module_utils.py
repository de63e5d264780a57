"""Utilities for modules: copies that share tensors, temporary hooks, outputs, and the axis of channels."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from .._compat import timm_layers
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
    "get_classifiers",
    "hooked",
    "image_size",
    "isolate",
    "pick_output",
]


class Factory(TypedDict, total=False):
    """Keyword arguments that layers pass on to the layers inside them."""

    device: torch.device | str | None
    dtype: torch.dtype | None


def buffer_device(weight: Tensor) -> torch.device:
    """The device for the buffers of a layer: that of its weight.

    Under accelerate's `init_empty_weights` only parameters are on the meta device. Buffers must not be, because no
    checkpoint would fill them.
    """
    usual = torch.empty(0).device
    if weight.is_meta and usual.type != "meta" and nn.Linear(1, 1).weight.is_meta:
        return usual
    return weight.device


ModuleT = TypeVar("ModuleT", bound=nn.Module)
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


def clone(module: ModuleT, **members: object) -> ModuleT:
    """A copy of a module that shares its parameters, buffers, children and hooks, except those given.

    Args:
        module: The module, which is not changed, not even by later assignments to the copy.
        members: Parameters (None for none), buffers or children that the copy has instead.
    """
    new = copy.copy(module)
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or name.endswith(("_hooks", "_hooks_with_kwargs")):
            new.__dict__[name] = copy.copy(value)
    new.__dict__.pop("_compiled_call_impl", None)  # it would run the original module
    for name, value in members.items():
        setattr(new, name, value)
    return new


def isolate(model: ModuleT, names: Iterable[str]) -> ModuleT:
    """A copy of a model with clones of the named modules and of their parents; everything else is shared.

    Changes to the clones (hooks, children) do not affect the model.

    Args:
        model: The model, which is not changed.
        names: Paths of modules, as in `model.named_modules()`.
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
    """A copy of a model with its own modules, whose tensors share memory with the model's and need no gradients.

    Changes to the copy (hooks, modes, replaced modules) do not affect the model. Other tensors that modules keep (the
    product of weight norm, activations that a hook has stored) are shared without their graphs. Hooks that do not
    belong to the model are shared. Gradient checkpointing is off in the copy.
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
    """Hooks that are no methods of the model's modules or of their attributes."""
    own = {id(value) for module in model.modules() for value in (module, *vars(module).values())}
    for module in model.modules():
        for name, hooks in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs")):
                yield from (hook for hook in hooks.values() if id(_owner(hook)) not in own)


def _owner(hook: object) -> object:
    """The object of a bound method, which may be wrapped by `partial`; for other callables the callable."""
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
    """The converted model inside wrappers such as `DataParallel` or a Lightning module.

    Args:
        model: A model or wrapper, which is returned if nothing in it is a converted model.
    """
    return next((module for module in model.modules() if hasattr(module, "bcos_config")), model)


def get_classifiers(model: Any) -> list[nn.Module]:
    """The classifiers that timm's `get_classifier` returns: several for distilled models, none without the method.

    Some of timm's methods fail after `num_classes=0` has removed the head; then there is none, either.
    """
    try:
        found = model.get_classifier()
    except AttributeError:
        return []
    return [head for head in (found if isinstance(found, tuple | list) else [found]) if isinstance(head, nn.Module)]


def first_output(output: object) -> Any:
    """The first of several outputs (of a tuple, list or dict); the others are for training only."""
    parts = _parts(output)
    return next(iter(parts.values())) if parts else output


def pick_output(output: object, name: str | int | None, what: str) -> Any:
    """One of several outputs.

    Args:
        output: A tensor, or a tuple, list or dict of tensors.
        name: Key or index; None for the first output.
        what: Description of the module, for errors.

    Raises:
        TargetError: If there is no output of that name.
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

    Other users of the modules run the hooks, too: pass modules of a `frozen_copy`.
    """
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


# Axis of the channels by type of module; the first row that a module is an instance of counts.
CHANNEL_AXES: tuple[tuple[int, tuple[type[nn.Module], ...]], ...] = (
    (1, (
        timm_layers.LayerNorm2d, timm_layers.LayerNorm2dFp32,
        timm_layers.LayerNormAct2d, timm_layers.LayerNormAct2dFp32,
        timm_layers.RmsNorm2d, timm_layers.RmsNorm2dFp32, timm_layers.SimpleNorm2d, timm_layers.SimpleNorm2dFp32,
        timm_layers.FrozenBatchNormAct2d, UncenteredBatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool2d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
        nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
    )),
    (-1, (
        nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase,
        timm_layers.RmsNorm, timm_layers.RmsNormFp32, timm_layers.SimpleNorm, timm_layers.SimpleNormFp32,
    )),
)  # fmt: skip


def channel_axis(module: nn.Module, output: Tensor, model: nn.Module | None = None) -> int:
    """The axis of the channels in a module's output. Formats may change inside a model.

    1. For outputs (N, C) it is 1.
    2. For modules with a known type it follows from the type: 1 for convolutions, batch norms, pooling, ...; the last
       axis for linear layers, layer norms over features, ...
    3. For other modules (blocks, activations) there are two candidates: the axis of the last module of a known type
       inside them, or else registered before them in the model; and the axis of their `output_fmt`, or else the
       model's. If data are permuted in between, the two differ. Then the axis counts whose length is that module's
       number of channels.
    4. If both or neither have that length, the axis of the known types counts if all types inside the module agree,
       otherwise that of the format.

    Args:
        module: The module that returned the output.
        output: (N, ...), with at least two axes.
        model: The model that contains the module; without it formats are (N, C, H, W) and (N, L, C).

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
    """Number of channels of the first module that has one."""
    for module in modules:
        for name in ("out_features", "out_channels", "num_features", "num_channels", "normalized_shape"):
            value = getattr(module, name, None)
            if value is not None:
                return value if isinstance(value, int) else value[0]
    return None


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a model's input, in pixels.

    For timm's models of a fixed size it is the `img_size` of the outermost module that has one, mostly the patch
    embedding, because `create_model(..., img_size=...)` and `set_input_size` do not change `pretrained_cfg`. For other
    models it is that of the pretrained cfg, or (224, 224) without a cfg.
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
