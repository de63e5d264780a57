"""The part of a photo that a model's image shows, computed from the steps of the transform.

Every step that timm and torchvision use for evaluation maps columns and rows of the image separately and linearly:
position in the photo = start + scale · position in the image.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional

from ..errors import InputError
from ..explanation.photo import Box
from ..files import first_line

__all__ = ["flatten_transform", "transform_photo"]

LIBRARIES = ("timm", "torchvision")
Size = tuple[int, int]  # rows and columns
Pair = tuple[int | Fraction, int | Fraction]
Move = Callable[[Any, Size, Size], tuple[Size, Pair]]


def _keep(step: Any, before: Size, after: Size) -> tuple[Size, Pair]:
    return (0, 0), (1, 1)


def _resize(step: Any, before: Size, after: Size) -> tuple[Size, Pair]:
    return (0, 0), (Fraction(before[0], after[0]), Fraction(before[1], after[1]))


def _crop_center(step: Any, before: Size, after: Size) -> tuple[Size, Pair]:
    """Both libraries pad the smaller half in front, and round the start of a crop to even numbers."""
    differences = (before[0] - after[0], before[1] - after[1])
    rows, columns = (round(extra / 2) if extra >= 0 else -(-extra // 2) for extra in differences)
    return (rows, columns), (1, 1)


def _trim_border(step: Any, before: Size, after: Size) -> tuple[Size, Pair]:
    start = min(step.border_size, before[0])
    return (start, start), (1, 1)


def _pad(step: Any, before: Size, after: Size) -> tuple[Size, Pair]:
    padding = [step.padding] if isinstance(step.padding, int) else list(step.padding)
    left, top = padding[0], padding[1 % len(padding)]
    return (-top, -left), (1, 1)


# What a step of a transform does: the shift of the image's corner, in pixels before the step, and the pixels before the
# step per pixel after it. By name of the class, which the two versions of torchvision's transforms share.
MOVES: dict[str, Move] = {
    "Resize": _resize,
    "ResizeKeepRatio": _resize,
    "CenterCrop": _crop_center,
    "CenterCropOrPad": _crop_center,
    "TrimBorder": _trim_border,
    "Pad": _pad,
    **dict.fromkeys(
        ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ConvertImageDtype", "ToImage", "ToDtype",
         "ToPureTensor", "Grayscale", "RGB"),
        _keep,
    ),
}  # fmt: skip
NORMALIZATION = ("Normalize",)  # left out: B-cos models read pixels in [0, 1]


def flatten_transform(transform: Any) -> tuple[Any, ...]:
    """The steps of a transform, without normalization.

    Args:
        transform: Evaluation transform of timm or torchvision, or a sequence of their steps.

    Raises:
        InputError: If it is not known where a step takes its pixels from.
    """
    steps = tuple(_steps(transform))
    for step in steps:
        if _name(step) not in MOVES:
            raise InputError(
                f"transform step {_shown(step)}: it is not known which part of a photo it shows; give a transform of "
                f"{', '.join(list(MOVES)[:6])} and conversions to tensors, or pass images to timm_bcos.explain"
            )
    return steps


def _steps(transform: Any) -> Iterator[Any]:
    name = _name(transform)
    if name == "Compose":
        transform = transform.transforms
    if isinstance(transform, list | tuple | nn.Sequential):
        for step in transform:
            yield from _steps(step)
    elif name in ("ImageClassification", "SemanticSegmentation", "ObjectDetection"):  # presets of torchvision's weights
        yield from _steps_of_preset(transform)
    elif name not in NORMALIZATION:
        yield transform


def _steps_of_preset(preset: Any) -> Iterator[Any]:
    from torchvision import transforms

    if getattr(preset, "resize_size", None):
        yield transforms.Resize(preset.resize_size, preset.interpolation, antialias=preset.antialias)
    if hasattr(preset, "crop_size"):
        yield transforms.CenterCrop(preset.crop_size)


def _name(step: Any) -> str:
    """Name of the class of a step of the two libraries; empty for anything else."""
    return type(step).__name__ if type(step).__module__.partition(".")[0] in LIBRARIES else ""


def _shown(step: object) -> str:
    text = repr(step)
    return text if len(text) <= 80 else type(step).__name__


def transform_photo(photo: Image.Image, steps: Sequence[Any]) -> tuple[Tensor, Box]:
    """Transform a photo, and compute the part of it that the result shows.

    Args:
        photo: The photo.
        steps: Steps that `flatten_transform` returns.

    Returns:
        Image (C, H, W) in [0, 1], and (left, top, right, bottom) of its edges in pixels of the photo. Padding lies
        outside the photo, unless it follows a crop: then it covers what was cropped.

    Raises:
        InputError: If a step fails, for instance because a side of the image would have no pixels.
    """
    image: Any = photo
    scales, starts = [Fraction(1)] * 2, [Fraction(0)] * 2  # of rows and columns
    for step in steps:
        before = _size(image)
        image = _apply(step, image)
        shifts, factors = MOVES[_name(step)](step, before, _size(image))
        starts = [start + scale * shift for start, scale, shift in zip(starts, scales, shifts, strict=True)]
        scales = [scale * factor for scale, factor in zip(scales, factors, strict=True)]
    height, width = _size(image)
    left, top, right, bottom = starts[1], starts[0], starts[1] + scales[1] * width, starts[0] + scales[0] * height
    return _as_float(image), (float(left), float(top), float(right), float(bottom))


def _apply(step: Any, image: Any) -> Any:
    try:
        result = _resize_whole(step, image) if _name(step) == "ResizeKeepRatio" else step(image)
    except Exception as error:  # of Pillow or torch
        size = " × ".join(str(side) for side in reversed(_size(image)))
        raise InputError(f"the transform fails at {_shown(step)} for {size} pixels: {first_line(error)}") from error
    if isinstance(image, Tensor) and image.is_floating_point() and isinstance(result, Tensor):
        low, high = image.aminmax()  # bicubic interpolation overshoots
        result = result.clamp(low, high) if MOVES[_name(step)] is _resize else result
    return result


def _resize_whole(step: Any, image: Any) -> Any:
    """What timm's step does at evaluation, but sides have at least one pixel where it would round them to none."""
    size = step.get_params(image, step.size, step.longest)
    if min(size) > 0:
        return step(image)
    return functional.resize(image, [max(side, 1) for side in size], step.interpolation)


def _size(image: Any) -> tuple[int, int]:
    _, height, width = functional.get_dimensions(image)
    return height, width


def _as_float(image: Any) -> Tensor:
    tensor: Tensor = image if isinstance(image, Tensor) else functional.to_tensor(image)
    return functional.convert_image_dtype(tensor.as_subclass(Tensor), torch.float32)
