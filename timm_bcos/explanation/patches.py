"""Inputs of NaFlex models: the patches as an image to explain, and explanations of patches on the image's grid."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter, signature
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.patches import PatchLayout, find_embeds
from ..nn.stems import image_channels
from .result import Explanation

__all__ = ["StripModel", "fold_patches", "split_input"]

NEEDED = ("patch_coord", "patch_valid")
Values = TypeVar("Values", Tensor, Explanation)


def split_input(
    model: nn.Module, x: object, extra: Mapping[str, object] | None
) -> tuple[object, dict[str, object], PatchLayout | None]:
    """The image in an input, the other arguments of the model, and the layout of the patches if there are any.

    Args:
        model: A B-cos model, or a plain one.
        x: Images; or the input of a NaFlex model, a dict with `patches`, `patch_coord` and `patch_valid`; or patches
            alone, with the rest in `extra`.
        extra: Other arguments of the model, by name.

    Raises:
        InputError: For a dict without these names, tensors that do not fit together, or arguments that the model does
            not take.
    """
    rest = _checked_extra(model, extra)
    if isinstance(x, Mapping):
        missing = [name for name in ("patches", *NEEDED) if name not in x and (name == "patches" or name not in rest)]
        if missing:
            raise InputError(
                f"an input with {', '.join(map(repr, x)) or 'no entries'}: {', '.join(map(repr, missing))} is missing; "
                f"NaFlex models take dict(patches=..., patch_coord=..., patch_valid=...)"
            )
        known = _argument_names(model)  # a loader's dict may hold more, which the model ignores
        rest = {name: value for name, value in x.items() if name != "patches" and name in (known or x)} | rest
        x = x["patches"]
    elif not (isinstance(x, Tensor) and x.ndim in (3, 5) and find_embeds(model) and set(NEEDED) <= rest.keys()):
        return x, rest, None
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor of patches, got {type(x).__name__}")
    layout = PatchLayout.of(model, x, image_channels(model) or 3)
    for name, shape in zip(NEEDED, ((*x.shape[:2], 2), tuple(x.shape[:2])), strict=True):
        value = rest[name]
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name}: expected shape {shape} for {x.shape[1]} patches per image, got {found}")
    return layout.to_image(x), rest, layout


def _checked_extra(model: nn.Module, extra: object) -> dict[str, object]:
    """Other arguments of a model, by name."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise InputError(f"extra={extra!r}: give the model's other arguments by name, as dict(name=value)")
    known = _argument_names(model) if extra else None
    for name in extra:
        if known is not None and name not in known:
            others = ", ".join(known[1:]) or "no other argument"
            raise InputError(f"extra has {name!r}: besides the image, {type(model).__name__} takes {others}")
    return dict(extra)


def _argument_names(model: nn.Module) -> list[str] | None:
    """Names of the arguments of a model's forward; None if it takes any name."""
    parameters = signature(model.forward).parameters.values()
    is_open = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    return None if is_open else [parameter.name for parameter in parameters]


class StripModel(nn.Module):
    """A NaFlex model as a model of images: strips of patches.

    Args:
        model: The model.
        layout: Layout of its patches.

    Shape: (N, C, L · P_h, P_w) to the model's output. Other arguments are passed on.
    """

    def __init__(self, model: nn.Module, layout: PatchLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.train(model.training)

    def forward(self, strips: Tensor, **extra: object) -> object:
        return self.model(self.layout.to_patches(strips), **extra)


def fold_patches(values: Values, patch_coord: Tensor, patch_valid: Tensor | None = None) -> Values:
    """Put patches in their places in the image.

    The explanation of a NaFlex input is one of its patches, which lie below each other (N, 2C, L · P_h, P_w). Sums do
    not change: patches that are only padding do not contribute.

    Args:
        values: An `Explanation`, or a tensor (N, ..., L · P_h, P_w) such as its `contribution_map`.
        patch_coord: (N, L, 2) row and column of each patch in its image, counted in patches.
        patch_valid: (N, L) False for patches that are padding; None if none are.

    Returns:
        The same for images: an explanation with `weights` and `inputs` (N, 2C, H, W), or a tensor (N, ..., H, W), as
        large as the largest image of the batch. Pixels without a patch are 0.

    Raises:
        InputError: If shapes do not fit together, or a coordinate is negative.
    """
    if isinstance(values, Explanation):
        folded = {name: fold_patches(getattr(values, name), patch_coord, patch_valid) for name in ("weights", "inputs")}
        return replace(values, **folded)
    valid = torch.ones(patch_coord.shape[:2]) if patch_valid is None else patch_valid
    count = patch_coord.shape[1] if patch_coord.ndim == 3 else 0
    if (
        patch_coord.shape != (len(values), count, 2) or valid.shape != (len(values), count)
        or values.ndim < 3 or not count or values.shape[-2] % count
    ):  # fmt: skip
        raise InputError(
            f"patch_coord {tuple(patch_coord.shape)} and patch_valid {tuple(valid.shape)} do not fit values of shape "
            f"{tuple(values.shape)}: give (N, L, 2) and (N, L) for values (N, ..., L · P, P)"
        )
    coord, valid = patch_coord.long().cpu(), valid.bool().cpu()
    if bool((coord[valid] < 0).any()):
        raise InputError("patch_coord holds negative coordinates")
    rows, columns = (coord[valid].amax(0) + 1).tolist() if bool(valid.any()) else (1, 1)
    patches = values.unflatten(-2, (count, -1)).movedim(-3, 1)  # (N, L, ..., P_h, P_w)
    cells = patches.new_zeros(len(values), rows * columns, *patches.shape[2:])
    for image, (places, is_valid) in enumerate(zip(coord, valid, strict=True)):
        index = places[is_valid, 0] * columns + places[is_valid, 1]
        cells[image].index_add_(0, index.to(cells.device), patches[image, is_valid.to(cells.device)])
    grid = cells.unflatten(1, (rows, columns)).movedim((1, 2), (-4, -2))  # (N, ..., rows, P_h, columns, P_w)
    return grid.flatten(-2).flatten(-3, -2)
