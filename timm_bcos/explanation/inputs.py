"""What explaining asks of a model, of images and of other arguments, checked before anything runs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelStateError
from ..nn.functional import encode_image
from ..nn.stems import BcosStem, ImageReader

__all__ = ["check_images", "check_model", "image_reader", "is_encoding", "refuse_stripes", "rows_of"]

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


def check_images(x: object, stem: BcosStem | ImageReader) -> None:
    """Refuse anything but images in [0, 1] on the model's device.

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
