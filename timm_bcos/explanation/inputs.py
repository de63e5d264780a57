"""What explaining asks of a model, of images and of other arguments, checked before anything runs."""

import difflib
from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.stems import BcosStem, ImageReader

__all__ = [
    "Layer", "check_images", "check_model", "image_reader", "is_encoding", "layer_path", "refuse_stripes", "rows_of",
]  # fmt: skip

Layer = str | nn.Module | None

LONGEST = 100  # sides in proportion; the shorter side is resized to what the model wants, the longer one with it


def check_model(model: nn.Module) -> BcosStem | ImageReader:
    """What reads the images in a B-cos model.

    Raises:
        InputError: For what is no model.
        ModelStateError: For another model, or one in training mode.
    """
    stem = image_reader(model)
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ModelStateError(f"{training[0]} is in training mode: call model.eval() first")
    return stem


def image_reader(model: nn.Module) -> BcosStem | ImageReader:
    """The same in training mode, too."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model first, then images, got {type(model).__name__}")
    stems = [m for m in model.modules() if isinstance(m, BcosStem | ImageReader)]
    if not stems:
        raise ModelStateError(
            f"{type(model).__name__} is no B-cos model: create one with timm.create_model('bcos_...'), "
            f"or convert it with timm_bcos.bcosify(model)"
        )
    return stems[0]


def check_images(x: object, stem: BcosStem | ImageReader) -> Tensor:
    """The images, if they are in [0, 1] and on the model's device.

    Raises:
        InputError: Saying what they are, and what to do.
    """
    channels = stem.image_channels
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor of images, got {type(x).__name__}: apply the model's transform first")
    if x.ndim != 4:
        encode_image(x, channels)  # raises, naming the shape
    if 0 in x.shape:
        raise InputError(f"images of shape {tuple(x.shape)} are empty")
    if x.device != stem.weight.device:
        raise InputError(f"images are on {x.device}, the model is on {stem.weight.device}: move one of them")
    if not x.is_floating_point():
        raise InputError(f"expected floating-point pixels in [0, 1], got {x.dtype}: divide by 255 first")
    _check_range(x)
    return x


def _check_range(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise InputError("images contain NaN or infinite pixels")
    low, high = x.detach().min().item(), x.detach().max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        hint = (
            "divide by 255"
            if low >= 0 and high > 16
            else "it looks mean/std-normalized: leave that out (mean 0, std 1)"
        )
        raise InputError(f"pixels must lie in [0, 1], got [{low:.3g}, {high:.3g}]; {hint}")


def refuse_stripes(size: tuple[int, int]) -> None:
    """Refuse pictures whose resized longer side would take all memory.

    Args:
        size: Width and height, in pixels.

    Raises:
        InputError: If one side is more than 100 times the other.
    """
    if max(size) > LONGEST * min(size):
        raise InputError(f"too long and thin: {size[0]} × {size[1]} pixels, at most 1 : {LONGEST}")


def is_encoding(x: Tensor, channels: int) -> bool:
    """Whether images (N, 2C, H, W) are encoded ones: the second half is the first one's complement."""
    if x.shape[1] != 2 * channels:
        return False
    first, second = x.chunk(2, 1)
    return bool((first + second - 1).abs().max() <= max(1e-3, 4 * torch.finfo(x.dtype).eps))


def rows_of(extra: Mapping[str, object] | None, rows: slice, count: int) -> dict[str, object]:
    """Other arguments of a model for some of the images: of tensors with a row per image, these rows."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in (extra or {}).items()
    }


@overload
def layer_path(model: nn.Module, layer: None) -> None: ...


@overload
def layer_path(model: nn.Module, layer: str | nn.Module) -> str: ...


def layer_path(model: nn.Module, layer: Layer) -> str | None:
    """The path of a layer, as in `model.named_modules()`.

    Args:
        model: A model, which may be compiled.
        layer: A module of the model, or its path; None for none.

    Raises:
        TargetError: If the model has no such layer, if the layer is the model itself, or if a module has several paths.
    """
    if layer is None:
        return None
    given, model = model, getattr(model, "_orig_mod", model)
    if isinstance(layer, str) and model is not given:  # paths in the compiled model
        layer = "" if layer == "_orig_mod" else layer.removeprefix("_orig_mod.")
    names = dict(model.named_modules(remove_duplicate=False))
    if layer == "" or layer is model or layer is given:
        what = "layer=''" if layer == "" else f"the layer {type(layer).__name__}"
        raise TargetError(f"{what} is the model itself: leave `layer` out to explain its logits")
    if isinstance(layer, nn.Module):
        return _path_of_module(names, layer)
    if not isinstance(layer, str):
        raise TargetError(f"layer={layer!r}: give a module of the model, or its path as in model.named_modules()")
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=3)
        hint = f"close names: {', '.join(near)}" if near else "see model.named_modules() for their names"
        raise TargetError(f"no layer {layer!r}; {hint}")
    return layer


def _path_of_module(names: Mapping[str, nn.Module], layer: nn.Module) -> str:
    paths = [name for name, module in names.items() if module is layer]
    if not paths:
        raise TargetError(
            f"the layer {type(layer).__name__} is not a module of this model: give one from model.named_modules(); "
            f"conversion replaces modules, so look it up in the converted model"
        )
    if len(paths) > 1:
        raise TargetError(
            f"the model uses the layer {type(layer).__name__} as {', '.join(paths)}: give one of the paths"
        )
    return paths[0]
