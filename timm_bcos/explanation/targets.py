"""What may be asked of outputs: classes, sets of classes, directions; all of them linear in the outputs."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.stems import BcosStem, ImageReader

__all__ = [
    "Target",
    "Targets",
    "as_direction",
    "check_images",
    "check_model",
    "check_table",
    "check_target",
    "image_reader",
    "of_images",
    "refuse_stripes",
]

LONGEST = 100  # sides in proportion; the shorter side is resized to what the network wants, the longer one with it


def check_model(model: nn.Module) -> BcosStem | ImageReader:
    """What reads the images in a B-cos network.

    Raises:
        InputError: For what is no network.
        ModelStateError: For another network, or one in training mode.
    """
    stem = image_reader(model)
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ModelStateError(f"{training[0]} is in training mode: call model.eval() first")
    return stem


def image_reader(model: nn.Module) -> BcosStem | ImageReader:
    """The same in training mode, too."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a network first, then images, got {type(model).__name__}")
    stems = [m for m in model.modules() if isinstance(m, BcosStem | ImageReader)]
    if not stems:
        raise ModelStateError(
            f"{type(model).__name__} is no B-cos network: create one with timm.create_model('bcos_...'), "
            f"or convert it with timm_bcos.bcosify(model)"
        )
    return stems[0]


def check_images(x: object, stem: BcosStem | ImageReader) -> None:
    """Refuse what are no images in [0, 1], on the model's device.

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


Targets = int | Sequence[int] | set[int] | frozenset[int] | Tensor | None
Target = Tensor | frozenset[int] | None  # (N,) classes, or (N, K) directions; a set of classes; or the strongest


def check_target(target: object, images: int, name: str = "target") -> Target:
    """What a user has given, as far as it can be checked before the network has run.

    Args:
        target: A class, N classes, a set of classes, a direction (K,) or N of them; None for the strongest class.
        images: N.
        name: What errors call it.

    Raises:
        TargetError: For anything else.
    """
    if target is None:
        return None
    if isinstance(target, set | frozenset):
        return _check_set(target, name)
    direction = _floats(target)
    if direction is not None:
        return _check_direction(direction, images, name)
    units = _integers(target)
    if units is None or units.ndim > 1 or (units.ndim == 1 and len(units) != images):
        raise TargetError(
            f"{name}={target!r}: give an int, or one int for each of the {images} images, a set of ints, or a "
            f"direction: a floating-point tensor with a number for each output"
        )
    return units.expand(images)


def check_table(targets: object, images: int) -> Tensor:
    """(N, T) classes.

    Raises:
        TargetError: For anything else.
    """
    table = _integers(targets)
    if table is None or table.ndim != 2 or len(table) != images:
        shape = f"of shape {tuple(table.shape)}" if table is not None else repr(targets)
        raise TargetError(f"targets {shape}: give {images} rows (one per image) of classes")
    return table


def of_images(asked: Target, images: slice) -> Target:
    """What is asked of some of the images."""
    return asked[images] if isinstance(asked, Tensor) else asked


def as_direction(asked: Tensor | frozenset[int], images: int, count: int, what: str) -> Tensor:
    """(N, K) coefficients of the outputs; a set's are those of the mean of its outputs.

    Args:
        asked: What `check_target` returned.
        images: N.
        count: K.
        what: The K outputs, in words.

    Raises:
        TargetError: For outputs that do not exist, or a direction of another size.
    """
    if isinstance(asked, Tensor) and asked.is_floating_point():
        if asked.shape[1] != count:
            raise TargetError(f"a direction of {asked.shape[1]} numbers: the model has {count} {what}")
        return asked
    each = torch.tensor(sorted(asked)) if isinstance(asked, frozenset) else asked[:, None]
    check_units(each, count, what)
    rows = torch.nn.functional.one_hot(each, count).double()
    return rows.mean(-2).expand(images, -1)


def check_units(units: Tensor, count: int, what: str) -> None:
    """Refuse outputs that do not exist."""
    wrong = units[(units < 0) | (units >= count)]
    if len(wrong):
        raise TargetError(f"target={int(wrong[0])}: the model has {count} {what}, counted from 0")


def _check_set(target: set[int] | frozenset[int], name: str) -> frozenset[int]:
    if not target or not all(isinstance(unit, Integral) and not isinstance(unit, bool) for unit in target):
        raise TargetError(f"{name}={set(target) or 'set()'}: a set of classes holds at least one int, and only ints")
    return frozenset(map(int, target))


def _check_direction(direction: Tensor, images: int, name: str) -> Tensor:
    shape = tuple(direction.shape)
    if direction.ndim not in (1, 2) or (direction.ndim == 2 and len(direction) != images):
        raise TargetError(f"{name} of shape {shape}: a direction is (K,), or ({images}, K) with one for each image")
    if not bool(direction.isfinite().all()):
        raise TargetError(f"{name} holds numbers that are not finite")
    if bool((direction == 0).all(-1).any()):
        raise TargetError(f"{name} holds a direction of zeros, which explains nothing")
    return direction.detach().clone().expand(images, -1)


def _floats(values: object) -> Tensor | None:
    """Directions; a single number is none."""
    tensor = _tensor(values)
    return tensor if tensor is not None and tensor.is_floating_point() and tensor.ndim else None


def _integers(values: object) -> Tensor | None:
    """As a tensor of int64; None for what are no whole numbers."""
    tensor = _tensor(values)
    if tensor is None or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return None
    return tensor.detach().long().clone()  # a tensor made in inference mode could not be saved for a backward pass


def _tensor(values: object) -> Tensor | None:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
