"""The result of explaining: one row of W(x) for each image, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dynamic_linear.violations import Violation
from ..errors import InputError
from .photo import Photo
from .visualization import Bars, Row, draw_rows, faded, map_to_rgba, on_white, overlay, save_figure, weights_to_rgba

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explanation", "unit_name"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why each image got its logit (or neuron its activation): exact, no approximation.

    Attributes:
        logits: (N, K) outputs; for an inner neuron its layer's activations at the neuron's position.
        target: (N,) the class or unit explained; of a direction, the one that it weighs most.
        weights: (N, 2C, H, W) row `target` of W(x), a picture in the input's encoding.
        inputs: (N, 2C, H, W) the encoded images.
        bias: (N,) what is added on the way contributes: constants (logit bias, layer biases, position embeddings,
            class tokens), and, in a model that is not dynamic linear, values that depend on the image. Computed as
            gradient · addend and never as the remainder.
        constant_bias: (N,) how much of `bias` comes from true constants (parameters, buffers, literals): all of it, or
            the explanation is not exact.
        violations: Parts of the model that are not dynamic linear, which make the explanation inexact; empty if exact.
        logit_bias: The classifier's fixed logit bias, which `bias` contains; 0 for inner neurons.
        layer: The explained neuron's layer, None for a logit.
        probability_kind: 'sigmoid' or 'softmax', as the model's config says.
        position: (N, 2) its row and column (row 0 for token sequences); None for a logit, and for a region.
        versus: (N,) the class that `contrast` subtracts; weights and biases are then differences. None for one class.
        direction: (N, K) coefficients of the outputs whose sum is explained; None for a class, or two.
        region: (N, rows, columns) weights of the positions of the output's map, which sum to 1; `logits` are then
            means over the region. None without one.
        rounding: Measured bound of the output's rounding errors, if a part of the model computes in a narrower data
            type than its input's (`x.float()` in float64); otherwise 0.
        class_names: Name of each class; empty if unknown.
        photos: The photo of each image and the part of it that the model's image shows; empty if images were given as
            tensors.
    """

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

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> "Explanation":
        """The explanation of one image, as a batch of one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        one = slice(index % len(self), index % len(self) + 1)
        own: dict[str, Any] = {name: value[one] for name, value in self._tensors().items()}
        return replace(self, **own)

    @classmethod
    def stack(cls, explanations: Sequence["Explanation"]) -> "Explanation":
        """One batch of the explanations of several, for instance of different targets of one image.

        Raises:
            InputError: For none at all, or for explanations of different layers or kinds of output.
        """
        if not explanations:
            raise InputError("no explanations to stack")
        kinds = {(e.layer, e.probability_kind, e.logit_bias, e.logits.shape[1:], *e._extras()) for e in explanations}
        if len(kinds) > 1:
            raise InputError(
                f"cannot stack explanations of different outputs: {', '.join(map(str, sorted(kinds, key=str)))}"
            )
        stacked: dict[str, Any] = {
            name: torch.cat([getattr(e, name) for e in explanations]) for name in explanations[0]._tensors()
        }
        violations = tuple(dict.fromkeys(violation for e in explanations for violation in e.violations))
        return replace(explanations[0], **stacked, violations=violations)

    def _extras(self) -> list[str]:
        """What it has that others lack."""
        return [name for name in ("versus", "direction", "position", "region") if getattr(self, name) is not None]

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to_rgba(self, smooth: int = 15, percentile: float = 99.5) -> Tensor:
        """(N, H, W, 4) pictures in [0, 1]: each pixel in the color that its weights look for, opaque where they are
        strong and speak for the target; see `timm_bcos.explanation.visualization.weights_to_rgba`."""
        return weights_to_rgba(self.weights, self.contribution_map, smooth, percentile)

    def plot(self, class_names: Sequence[str] | None = None, top: int = 5) -> "Figure":
        """A matplotlib figure: a row per image with the image, its explanation, the contribution map, both overlaid and
        the most probable classes (or the most active units).

        Outside a region the image is pale. A difference has a second picture, of what speaks for the other side. In the
        contribution map, what speaks for the target is red, and what speaks against it (for the other side) is blue.

        Args:
            class_names: Name of each class.
            top: Number of classes to show.
        """
        image = self.image.detach().cpu().clamp(0, 1)
        maps = self.contribution_map.detach().cpu()
        own = [self] if not self._is_difference() else [self, self.opposite()]
        colors = [on_white(one.to_rgba()) for one in own]
        shown = image if self.region is None else faded(image, self.region.cpu() > 0)
        pictures = (shown.movedim(1, -1), *colors, map_to_rgba(maps), overlay(image, maps))
        rows = []
        for i in range(len(self)):
            titles = ("image", *(one._title(i, class_names) for one in own), "contributions", "overlay")
            row = [(title, picture[i]) for title, picture in zip(titles, pictures, strict=True)]
            rows.append(Row(row, self._bars(i, class_names, top)))
        return draw_rows(rows)

    def _is_difference(self) -> bool:
        return self.versus is not None or (self.direction is not None and bool((self.direction < 0).any()))

    def opposite(self) -> "Explanation":
        """The explanation of the negative: of "why b, not a", where this one is of "why a, not b".

        Raises:
            InputError: For the explanation of a class, which has no opposite.
        """
        negated = {name: -getattr(self, name) for name in ("weights", "bias", "constant_bias")}
        if self.versus is not None:
            return replace(self, **negated, target=self.versus, versus=self.target)
        if self.direction is not None and self._is_difference():
            return replace(self, **negated, direction=-self.direction, target=self.direction.argmin(1))
        raise InputError("the explanation of a single output has no opposite: see timm_bcos.contrast")

    def _title(self, index: int, class_names: Sequence[str] | None) -> str:
        place = ""
        if self.position is not None:
            place = f" at {tuple(self.position[index].tolist())}"
        elif self.region is not None:
            place = " in the region"
        if self.layer is None:
            return self._subject(index, "class", class_names) + place
        return f"{self.layer}, {self._subject(index, 'unit', None).removeprefix('for ')}{place}"

    def _subject(self, index: int, kind: str, names: Sequence[str] | None) -> str:
        if self.direction is not None:
            return _of_direction(self.direction[index], kind, names)
        own = f"for {unit_name(kind, int(self.target[index]), names)}"
        return own if self.versus is None else f"{own}, not {unit_name(kind, int(self.versus[index]), names)}"

    def _bars(self, index: int, class_names: Sequence[str] | None, top: int) -> Bars:
        is_logit = self.layer is None
        values = self.probability[index] if is_logit else self.logits[index]
        best = values.topk(min(top, len(values)))
        units = best.indices.tolist()
        names = [unit_name("class", unit, class_names) if is_logit else unit_name("unit", unit) for unit in units]
        target = int(self.target[index])
        title = f"probability ({self.probability_kind})" if is_logit else "activation"
        marked = units.index(target) if target in units and self.direction is None else None
        return Bars(title, names, best.values.tolist(), marked, 1.0 if is_logit else None)

    def save(self, path: str | PathLike[str], class_names: Sequence[str] | None = None) -> None:
        """Write `plot` to a picture file, whole or not at all; the suffix says the format."""
        save_figure(self.plot(class_names), path)


def _of_direction(direction: Tensor, kind: str, names: Sequence[str] | None, shown: int = 2) -> str:
    """The outputs that a direction weighs most, for and against."""
    sides = []
    for values in (direction, -direction):
        count = int((values > 0).sum())
        units = values.topk(min(count, shown)).indices.tolist()
        sides.append(" + ".join([unit_name(kind, unit, names) for unit in units] + ["…"] * (count > shown)))
    return ", ".join(f"{word} {side}" for word, side in zip(("for", "not"), sides, strict=True) if side)


def unit_name(kind: str, index: int, names: Sequence[str] | None = None) -> str:
    """The name of a class, or what stands for one: its kind and number."""
    return names[index] if names is not None and index < len(names) else f"{kind} {index}"
