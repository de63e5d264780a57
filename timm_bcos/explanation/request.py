"""A request: which number of a model's outputs is to be explained, checked once and handed on as one object.

Classes, sets of classes and directions are all linear in the outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import TargetError
from ..nn.patches import PatchLayout
from .inputs import rows_of
from .regions import Position, Region, check_region, position_pairs

__all__ = ["Request", "Target", "Targets", "as_direction", "check_table", "check_target"]

Targets = int | Sequence[int] | set[int] | frozenset[int] | Tensor | None
Target = Tensor | frozenset[int] | None  # (N,) classes, or (N, K) directions; a set of classes; or the strongest


@dataclass(frozen=True)
class Request:
    """What is to be explained for each of N images.

    Attributes:
        target: The class, set of classes or direction, as `check_target` returns it.
        versus: Class, set or direction whose output is subtracted, in the same format; None for nothing.
        layer: Path of the module whose units are explained; None for the model's outputs.
        output: Name or index of the output, if there are several; None for the first.
        position: Position in a map, as `timm_bcos.explain` takes it; None for the one where the target is largest.
        masks: (N, H, W) weights of the positions instead, as `check_region` returns them.
        extra: Other arguments of the model's forward, by name.
        patches: Layout of the patches that the model takes instead of images; None for images.
        images: N, or None if no attribute depends on the image.
    """

    target: Target = None
    versus: Target = None
    layer: str | None = None
    output: str | int | None = None
    position: Position = None
    masks: Tensor | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    patches: PatchLayout | None = None
    images: int | None = None

    @classmethod
    def checked(
        cls,
        x: Tensor,
        target: Target,
        versus: Target = None,
        *,
        position: Position = None,
        region: Region = None,
        extra: Mapping[str, object] | None = None,
        **names: Any,
    ) -> Self:
        """Create a request from the arguments of `timm_bcos.explain`.

        Args:
            x: Images (N, C, H, W).
            target: Target that `check_target` has returned.
            versus: Target to subtract, which `check_target` has returned; None for nothing.
            position: Position that the user has given.
            region: Region that the user has given.
            extra: Other arguments of the model that the user has given.
            names: `layer`, `output` and `patches`.

        Raises:
            TargetError: For an invalid region, or if both a position and a region are given.
        """
        if position is not None and region is not None:
            raise TargetError("give a position or a region, not both")
        pairs = position_pairs(position, len(x))
        masks = check_region(region, len(x), (x.shape[2], x.shape[3]))
        return cls(
            target, versus, position=position if pairs is None else pairs, masks=masks, extra=dict(extra or {}),
            images=len(x), **names,
        )  # fmt: skip

    def of_images(self, images: slice) -> "Request":
        """The same for some of the images."""
        if self.images is None:
            return self
        position: Any = self.position
        if position_pairs(position, self.images) is not None:
            position = position[images]
        return replace(
            self,
            target=_rows(self.target, images),
            versus=_rows(self.versus, images),
            position=position,
            masks=None if self.masks is None else self.masks[images],
            extra=rows_of(self.extra, images, self.images),
            images=len(range(self.images)[images]),
        )

    @property
    def varies(self) -> bool:
        """Whether a position, a region or another argument may differ from image to image."""
        rows = (isinstance(v, Tensor) and v.ndim > 0 and len(v) == self.images for v in self.extra.values())
        return self.position is not None or self.masks is not None or any(rows)

    @property
    def is_placed(self) -> bool:
        """Whether a position or a region is given."""
        return self.position is not None or self.masks is not None

    def repeated(self, count: int) -> "Request":
        """The request of one image for `count` copies of it."""
        if self.images != 1 or count == 1:
            return self
        rows = torch.zeros(count, dtype=torch.long)
        return replace(
            self,
            position=self.position[rows] if isinstance(self.position, Tensor) else self.position,
            masks=None if self.masks is None else self.masks[rows.to(self.masks.device)],
            extra={name: _first_row(value, count) for name, value in self.extra.items()},
            images=count,
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `timm_bcos.explain`, apart from the target, that this request stands for."""
        return dict(
            layer=self.layer, output=self.output, position=self.position, region=self.masks, extra=dict(self.extra)
        )


def _first_row(value: object, count: int) -> object:
    """`count` copies of the row of a tensor that has one."""
    is_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1
    return value.repeat_interleave(count, 0) if is_row else value  # type: ignore[attr-defined]


def _rows(target: Target, images: slice) -> Target:
    return target[images] if isinstance(target, Tensor) else target


def check_target(target: object, images: int, name: str = "target") -> Target:
    """What a user has given, as far as it can be checked before the model has run.

    Args:
        target: A class, N classes, a set of classes, a direction (K,) or N of them; None for the strongest class.
        images: Number of images, N.
        name: Name of the argument, for errors.

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
    """(N, T) classes, from N rows of T classes, or T classes for all images.

    Raises:
        TargetError: For anything else.
    """
    table = _integers(targets)
    if table is not None and table.ndim == 1 and len(table):
        return table.expand(images, -1)
    if table is None or table.ndim != 2 or len(table) != images or not table.numel():
        shape = f"of shape {tuple(table.shape)}" if table is not None else repr(targets)
        raise TargetError(f"targets {shape}: give {images} rows (one per image) of classes, or classes for all images")
    return table


def as_direction(asked: Tensor | frozenset[int], images: int, count: int, what: str) -> Tensor:
    """(N, K) coefficients of the outputs; a set's are those of the mean of its outputs.

    Args:
        asked: Target that `check_target` has returned.
        images: Number of images, N.
        count: Number of outputs, K.
        what: Description of the outputs, for errors.

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
    """Convert whole numbers to a tensor of int64; None for anything else."""
    tensor = _tensor(values)
    if tensor is None or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return None
    return tensor.detach().long().clone()  # a tensor made in inference mode could not be saved for a backward pass


def _tensor(values: object) -> Tensor | None:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
