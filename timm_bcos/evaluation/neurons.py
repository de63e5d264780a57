"""Inner units of a model: the images of a data set that activate them most, and explanations of their activations.

Figures A5, A6 and B4 of the supplement of arXiv 2205.10268.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attribution.registry import AttributionModel, check_counts
from ..data.datasets import LabeledImages, image_loader, map_batches
from ..errors import InputError, TargetError
from ..explanation.api import explain
from ..explanation.inputs import layer_path
from ..explanation.result import Explanation
from ..explanation.visualization import on_white
from ..files import write_csv
from ..nn.module_utils import channel_axis, first_output, hooked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Strongest",
    "find_strongest",
    "label_entropy",
    "layer_maps",
    "peak_activations",
    "plot_label_counts",
    "plot_wall",
    "save_units",
]


@dataclass(frozen=True)
class Strongest:
    """The k images with the highest activations of each of a layer's C units, best first.

    Attributes:
        layer: Path of the layer.
        values: Activations (C, k) at the most active position.
        indices: Indices (C, k) of the images in the data set.
        labels: Classes (C, k) of the images.
    """

    layer: str
    values: Tensor
    indices: Tensor
    labels: Tensor

    def most_active(self, count: int, best: int = 10) -> list[int]:
        """The units with the highest mean activation over their `best` images."""
        return self.values[:, :best].mean(1).topk(min(count, len(self.values))).indices.tolist()

    def most_one_sided(self, count: int, num_classes: int) -> list[int]:
        """The units with the lowest class entropy.

        Units that are active for fewer than k images are left out: the rest of their lists has no meaningful order.
        """
        ranked = label_entropy(self.labels, num_classes).argsort().tolist()
        last_two = [values[-2:].tolist() for values in self.values]
        return [unit for unit in ranked if len(last_two[unit]) == len(set(last_two[unit]))][:count]


def find_strongest(
    model: nn.Module,
    dataset: LabeledImages,
    layer: str | nn.Module,
    k: int = 500,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Strongest:
    """Find the images that activate each unit of a layer most, in one pass over a data set.

    Several processes share the batches (`timm_bcos.distributed`).

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        dataset: Data set from `timm.data.create_dataset`.
        layer: Layer whose output is a feature map or a sequence of tokens, or its path.
        k: Number of images per unit.
        encode: Function of the layer's activations (N, C, P) that returns those of other units (N, K, P), such as
            `Concepts.encode`; None for the layer's channels.
        batch_size: Number of images per batch.
        progress: Show a progress bar.

    Raises:
        TargetError: If the layer does not exist or has no spatial positions.
        InputError: If the data set is empty.
        MethodError: If a count is below 1.
    """
    check_counts(k=k, batch_size=batch_size)
    layer, subject = layer_path(model, layer), AttributionModel(model)
    if len(dataset) == 0:
        raise InputError("the data set has no images")

    def activations(indices: Sequence[int], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = layer_maps(subject, layer, images)
        peaks = (maps if encode is None else encode(maps)).amax(2).T.cpu()
        return peaks, torch.tensor(indices), labels

    best: tuple[Tensor, ...] = ()
    bar = layer if progress else None
    for peaks, *same in map_batches(activations, model, dataset, range(len(dataset)), batch_size, bar):
        new = (peaks, *(values.expand_as(peaks) for values in same))
        both = new if not best else tuple(torch.cat(pair, 1) for pair in zip(best, new, strict=True))
        kept = both[0].topk(min(k, both[0].shape[1]), dim=1).indices
        best = tuple(values.gather(1, kept) for values in both)
    return Strongest(layer, *best)


@torch.no_grad()
def peak_activations(subject: AttributionModel, layer: str, x: Tensor) -> Tensor:
    """Activation of each unit of a layer at its most active position.

    Args:
        subject: Model.
        layer: Path of a layer.
        x: Images (N, C, H, W) in [0, 1].

    Returns:
        Activations (units, N).

    Raises:
        TargetError: If the layer does not exist or has no spatial positions.
    """
    return layer_maps(subject, layer, x).amax(2).T.cpu()


@torch.no_grad()
def layer_maps(subject: AttributionModel, layer: str, x: Tensor) -> Tensor:
    """Activations (N, C, P) of a layer's C units at its P positions; arguments and errors as in `peak_activations`."""
    module, outputs, prepared = _find_layer(subject, layer), [], subject.prepare(x)
    with hooked([module], lambda module, args, output: outputs.append(first_output(output))):
        subject(prepared)
    if not outputs or not isinstance(outputs[0], Tensor) or outputs[0].ndim not in (3, 4):
        shape = tuple(outputs[0].shape) if outputs and isinstance(outputs[0], Tensor) else "no tensor"
        raise TargetError(f"layer {layer!r} has no spatial positions: it returns {shape}, not (N, C, H, W)")
    axis = channel_axis(module, outputs[0], subject.model)
    maps: Tensor = outputs[0].movedim(axis, 1).flatten(2)
    return maps


def _find_layer(subject: AttributionModel, layer: str) -> nn.Module:
    return getattr(subject.model, "_orig_mod", subject.model).get_submodule(layer_path(subject.model, layer))


def label_entropy(labels: Tensor, num_classes: int) -> Tensor:
    """Entropy of the classes of each unit's images, relative to the entropy of the uniform distribution.

    Args:
        labels: Classes (C, k) of the images.
        num_classes: Number of classes.

    Returns:
        Entropies (C,) in [0, 1]: 1 if all classes are equally frequent, 0 if there is only one.

    Raises:
        TargetError: If a label is not one of the classes.
    """
    strange = labels[(labels < 0) | (labels >= num_classes)]
    if len(strange):
        raise TargetError(f"label {int(strange[0])}: there are {num_classes} classes, counted from 0")
    ones = torch.ones_like(labels, dtype=torch.double)
    counts = torch.zeros(len(labels), num_classes).double().scatter_add_(1, labels, ones)
    shares = counts / counts.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1) / math.log(max(num_classes, 2))  # avoids 0 / 0 for a single class


def plot_wall(
    model: nn.Module,
    dataset: LabeledImages,
    strongest: Strongest,
    units: Sequence[int],
    images: int = 6,
    *,
    directions: Tensor | None = None,
    noun: str = "unit",
) -> "Figure":
    """Plot two rows per unit: crops around the most active positions, and their explanations.

    Args:
        model: A B-cos model.
        dataset: Data set of the images.
        strongest: Result of `find_strongest`.
        units: Units to show.
        images: Number of crops per unit.
        directions: Directions (units, C) of the units among the layer's channels; None if units are channels.
        noun: Name of the units in titles.

    Raises:
        TargetError: If the layer does not have one of the units.
        MethodError: If there are no units or no images.
    """
    from matplotlib.figure import Figure

    check_counts(images=images)
    _check_units(strongest, units)
    figure = Figure(figsize=(1.6 * images, 3.3 * len(units)), layout="constrained")
    axes = figure.subplots(2 * len(units), images, squeeze=False)
    for row, unit in enumerate(units):
        explanation = _explain_unit(model, dataset, strongest, unit, images, directions)
        pictures = (explanation.image.movedim(1, -1), on_white(explanation.to_rgba()))
        for below, batch in enumerate(pictures):
            for ax, picture, center in zip(axes[2 * row + below], batch, _centers(explanation), strict=False):
                ax.imshow(_crop(picture.cpu(), center).numpy())
        axes[2 * row, 0].set_title(f"{noun} {unit}", fontsize=9, loc="left")
    for ax in axes.flat:
        ax.axis("off")
    return figure


def _check_units(strongest: Strongest, units: Sequence[int]) -> None:
    check_counts(units=len(units))
    for unit in units:
        if not 0 <= unit < len(strongest.values):
            raise TargetError(f"unit {unit}: layer {strongest.layer!r} has {len(strongest.values)}, counted from 0")


def _explain_unit(
    model: nn.Module,
    dataset: LabeledImages,
    strongest: Strongest,
    unit: int,
    images: int,
    directions: Tensor | None,
) -> Explanation:
    load = image_loader(model, dataset)
    indices = strongest.indices[unit, :images].tolist()
    x = torch.stack([load(i)[0] for i in indices]).to(next(model.parameters()).device)
    return explain(model, x, unit if directions is None else directions[unit], layer=strongest.layer)


def _centers(explanation: Explanation) -> list[tuple[int, int]]:
    """Center of mass of the positive contributions to each unit."""
    mass = explanation.contribution_map.clamp(min=0).double()
    mass = mass / mass.sum((1, 2), keepdim=True).clamp(min=1e-30)
    rows, columns = (torch.arange(n, device=mass.device, dtype=mass.dtype) for n in mass.shape[1:])
    return [
        (round(y), round(x))
        for y, x in zip((mass.sum(2) @ rows).tolist(), (mass.sum(1) @ columns).tolist(), strict=True)
    ]


def _crop(picture: Tensor, center: tuple[int, int]) -> Tensor:
    """Crop a third of the image's side around a center, within the borders."""
    size = max(picture.shape[0] // 3, min(24, *picture.shape[:2]))
    top, left = (min(max(c - size // 2, 0), n - size) for c, n in zip(center, picture.shape[:2], strict=True))
    return picture[top : top + size, left : left + size].float()


def plot_label_counts(strongest: Strongest, units: Sequence[int], class_names: Sequence[str]) -> "Figure":
    """Plot the class counts of each unit's strongest images, with their entropy."""
    from matplotlib.figure import Figure

    _check_units(strongest, units)
    entropy = label_entropy(strongest.labels, len(class_names))
    figure = Figure(figsize=(3 * len(units), 3.2), layout="constrained")
    for ax, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
        counts = strongest.labels[unit].bincount(minlength=len(class_names))
        ax.bar(range(len(class_names)), counts.tolist(), color="tab:gray")
        ax.set_title(f"unit {unit}, entropy {entropy[unit]:.2f}", fontsize=9)
        if len(class_names) <= 20:
            ax.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
    return figure


def save_units(strongest: Strongest, class_names: Sequence[str], path: Path) -> None:
    """Write a CSV file with a row per unit: strongest activation, number of images, class entropy, top class and share.

    Args:
        strongest: Result of `find_strongest`.
        class_names: Names of all classes.
        path: File to write.
    """
    entropy = label_entropy(strongest.labels, len(class_names)).tolist()
    rows = []
    for unit, (values, labels) in enumerate(zip(strongest.values, strongest.labels, strict=True)):
        top = int(labels.mode().values)
        share = (labels == top).double().mean().item()
        rows.append([unit, f"{values[0]:.6g}", len(labels), f"{entropy[unit]:.4f}", class_names[top], f"{share:.3f}"])
    write_csv(path, ["unit", "strongest", "images", "entropy", "most_frequent", "share"], rows)
