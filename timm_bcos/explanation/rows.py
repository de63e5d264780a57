"""Rows of W(x), one per image, what follows from them, and batches of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..dynamic_linear.violations import Violation
from ..errors import InputError
from ..files import first_line
from .photo import Photo

__all__ = ["Rows", "select_rows"]


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """The numbers of an `Explanation`, which describes the attributes."""

    logits: Tensor
    target: Tensor
    weights: Tensor
    inputs: Tensor
    bias: Tensor
    constant_bias: Tensor
    violations: tuple[Violation, ...] = ()
    logit_bias: float = 0.0
    layer: str | None = None
    position: Tensor | None = None
    probability_kind: str = "sigmoid"
    versus: Tensor | None = None
    direction: Tensor | None = None
    region: Tensor | None = None
    rounding: float = 0.0
    class_names: tuple[str, ...] = ()
    photos: tuple[Photo, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str):
            raise InputError(f"class_names={self.class_names!r}: give a name for each class")
        names = () if self.class_names is None else map(str, self.class_names)
        object.__setattr__(self, "class_names", tuple(names))  # lists are not hashable
        object.__setattr__(self, "photos", tuple(self.photos))
        if self.photos and len(self.photos) != len(self):
            raise InputError(f"{len(self.photos)} photos for {len(self)} images: give one per image, or none")

    @property
    def logit(self) -> Tensor:
        """(N,) the explained outputs; with `versus`, the differences of two, with `direction`, the weighted sums."""
        if self.direction is not None:
            return (self.logits * self.direction).sum(1)
        logit = self.logits.gather(1, self.target[:, None])[:, 0]
        return logit if self.versus is None else logit - self.logits.gather(1, self.versus[:, None])[:, 0]

    @property
    def image(self) -> Tensor:
        """(N, C, H, W) the images, in [0, 1]."""
        return self.inputs[:, : self.inputs.shape[1] // 2]

    @property
    def contributions(self) -> Tensor:
        """(N, 2C, H, W) what each encoded pixel value adds to the logit: weights · inputs."""
        return self.weights * self.inputs

    @property
    def contribution_map(self) -> Tensor:
        """(N, H, W) what each pixel adds to the logit, in units of the logit."""
        return self.contributions.sum(1)

    @property
    def probability(self) -> Tensor:
        """(N, K) probabilities of the classes.

        Sigmoids, as B-cos models train with binary cross-entropy, so they need not sum to 1; softmax for a
        conversion that preserves a model trained with it.
        """
        return self.logits.softmax(1) if self.probability_kind == "softmax" else self.logits.sigmoid()

    @property
    def remainder(self) -> Tensor:
        """(N,) logit - Σ contributions - bias in float64."""
        return self.logit.double() - self.contributions.double().sum((1, 2, 3)) - self.bias.double()

    @property
    def completeness_error(self) -> Tensor:
        """(N,) |Σ contributions + bias - logit| / |logit - logit bias|. Expect rounding error only: about 1e-7 in
        float32. What lies within `rounding` counts as 0."""
        error = (self.remainder.abs() - self.rounding).clamp_min(0)
        share = self.logit_bias if self.direction is None else self.logit_bias * self.direction.double().sum(1)
        scale = (self.logit.double() - share).abs()
        return torch.where(error == 0, error, error / scale)

    @property
    def is_difference(self) -> bool:
        """Whether something is subtracted, so that there is an `opposite`."""
        return self.versus is not None or (self.direction is not None and bool((self.direction < 0).any()))

    def __len__(self) -> int:
        return len(self.target)

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> Self:
        """The explanations of some images, as a batch; of one image for an int. Tensors are copied.

        Args:
            index: An int, a slice, or a list or tensor of ints or of N booleans.

        Raises:
            IndexError: For an image that does not exist.
            InputError: For anything else that is not an index.
        """
        rows = select_rows(index, len(self))
        own: dict[str, Any] = {name: value[rows] for name, value in self._tensors().items()}
        return replace(self, **own, photos=tuple(self.photos[i] for i in rows) if self.photos else ())

    def to(self, device: torch.device | str | int | torch.dtype | None = None,
           dtype: torch.dtype | None = None) -> Self:  # fmt: skip
        """Move to a device, or convert floating-point tensors to a data type, as `torch.Tensor.to` does.

        Args:
            device: Device, or a data type.
            dtype: Floating-point data type.

        Raises:
            InputError: For a device that does not exist, or another data type.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype}: give a floating-point data type, as torch.float32")
        try:
            moved: dict[str, Any] = {
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in self._tensors().items()
            }
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device={device!r}: {first_line(error)}") from error
        return replace(self, **moved)

    @classmethod
    def stack(cls, explanations: Sequence[Self]) -> Self:
        """One batch of the explanations of several, for instance of different targets of one image.

        Photos and names of classes are kept if all have them.

        Raises:
            InputError: For none at all, or for explanations of different layers or kinds of output, or of images of
                different sizes.
        """
        if not explanations:
            raise InputError("no explanations to stack")
        kinds = {
            (e.layer, e.probability_kind, e.logit_bias, e.logits.shape[1:], e.inputs.shape[1:], *e._extras())
            for e in explanations
        }
        if len(kinds) > 1:
            raise InputError(
                f"cannot stack explanations of different outputs: {', '.join(map(str, sorted(kinds, key=str)))}"
            )
        stacked: dict[str, Any] = {
            name: torch.cat([getattr(e, name) for e in explanations]) for name in explanations[0]._tensors()
        }
        violations = tuple(dict.fromkeys(violation for e in explanations for violation in e.violations))
        names = {e.class_names for e in explanations}
        have_photos = all(e.photos for e in explanations)
        return replace(
            explanations[0],
            **stacked,
            violations=violations,
            class_names=explanations[0].class_names if len(names) == 1 else (),
            photos=tuple(photo for e in explanations for photo in e.photos) if have_photos else (),
        )

    def _extras(self) -> list[str]:
        """What it has that others lack."""
        return [name for name in ("versus", "direction", "position", "region") if getattr(self, name) is not None]

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def opposite(self) -> Self:
        """The explanation of the negative: of "why b, not a", where this one is of "why a, not b".

        Raises:
            InputError: For the explanation of a class, which has no opposite.
        """
        negated = {name: -getattr(self, name) for name in ("weights", "bias", "constant_bias")}
        if self.versus is not None:
            return replace(self, **negated, target=self.versus, versus=self.target)
        if self.direction is not None and self.is_difference:
            return replace(self, **negated, direction=-self.direction, target=self.direction.argmin(1))
        raise InputError("the explanation of a single output has no opposite: see timm_bcos.contrast")


def select_rows(index: object, count: int) -> list[int]:
    """The images that an index selects.

    Args:
        index: An int, a slice, or a list, array or tensor of ints or of `count` booleans.
        count: Number of images.

    Returns:
        Their numbers, from 0.

    Raises:
        IndexError: For an image that does not exist.
        InputError: For anything else.
    """
    if isinstance(index, slice):
        return list(range(count)[index])
    try:
        chosen = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.tensor(torch.nan)
    if chosen.dtype is torch.bool and chosen.shape == (count,):
        return chosen.nonzero()[:, 0].tolist()
    if chosen.numel() == 0 and chosen.ndim == 1:
        return []
    if chosen.dtype is torch.bool or chosen.is_floating_point() or chosen.is_complex() or chosen.ndim > 1:
        raise InputError(f"index {index!r}: give an int, a slice, or a list of ints or of {count} booleans")
    return [_row(i, count) for i in chosen.reshape(-1).tolist()]


def _row(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"image {index} of {count}")
    return index % count
