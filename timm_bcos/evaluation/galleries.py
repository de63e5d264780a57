"""Figures of many explanations: methods side by side, and the images of highest confidence of each class.

Figures A1 to A4 of the supplement of arXiv 2205.10268.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..attribution.registry import attribute, check_counts, method_names
from ..distributed import distributed_map
from ..errors import InputError, MethodError
from ..explanation.api import explain
from ..explanation.visualization import map_to_rgba, on_white
from .pointing_game import Confidence

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["most_confident", "plot_classes", "plot_methods"]


def most_confident(found: Sequence[Confidence], per_class: int, classes: Sequence[int]) -> list[Confidence]:
    """Select the correctly classified images of each class with the highest confidence, class by class, best first.

    Args:
        found: Predictions, from `timm_bcos.evaluation.pointing_game.confidences`.
        per_class: Number of images per class.
        classes: Classes to select.

    Raises:
        InputError: If a class has too few images; the message says how many are missing.
    """
    check_counts(per_class=per_class)
    chosen: list[Confidence] = []
    for c in classes:
        right = sorted((f for f in found if f.label == f.predicted == c), key=lambda f: -f.confidence)
        if len(right) < per_class:
            raise InputError(
                f"class {c} has {len(right)} correctly classified images, {per_class - len(right)} fewer than the "
                f"{per_class} requested"
            )
        chosen += right[:per_class]
    return chosen


def plot_methods(
    model: nn.Module,
    x: Tensor,
    targets: Sequence[int],
    methods: Sequence[str],
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Plot a row per image and a column per method. The model's own explanation is also shown in color.

    Methods that do not support the model, or whose library is missing, are left out with a warning. Several processes
    share the methods (`timm_bcos.distributed`).

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1].
        targets: Class of each image.
        methods: Attribution methods, names in `timm_bcos.attribution.registry.METHODS`.
        class_names: Names of all classes, for the titles.
    """

    def compute(own: Sequence[str]) -> Iterator[list[tuple[str, Tensor]] | MethodError]:
        for method in own:
            try:
                yield _columns(model, x, targets, method)
            except MethodError as error:
                yield error

    columns: list[tuple[str, Tensor]] = [("image", _colors(x))]
    for found in distributed_map(compute, method_names(methods)):
        if isinstance(found, MethodError):
            warnings.warn(f"left out: {found}", stacklevel=2)
        else:
            columns += found
    figure, axes = _figure(len(x), len(columns))
    for column, (title, pictures) in enumerate(columns):
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.detach().cpu().clamp(0, 1).float().numpy())
        axes[0, column].set_title(title, fontsize=9)
    if class_names is not None:
        for row, target in enumerate(targets):
            axes[row, 0].text(-0.05, 0.5, class_names[target], fontsize=8, rotation=90, ha="right", va="center",
                              transform=axes[row, 0].transAxes)  # fmt: skip
    return figure


def _columns(model: nn.Module, x: Tensor, targets: Sequence[int], method: str) -> list[tuple[str, Tensor]]:
    """Titles and pictures (N, H, W, 3) of a method."""
    columns = [(method, map_to_rgba(attribute(model, x, list(targets), method))[..., :3].cpu())]
    if method == "bcos":
        columns.insert(0, ("B-cos in color", on_white(explain(model, x, list(targets)).to_rgba()).detach().cpu()))
    return columns


def plot_classes(model: nn.Module, x: Tensor, targets: Sequence[int], class_names: Sequence[str]) -> "Figure":
    """Plot two rows per class: images, and below them their explanations in color.

    Args:
        model: A B-cos model.
        x: Images (N, C, H, W) in [0, 1], the same number per class, class by class.
        targets: Classes of the images.
        class_names: Names of all classes.

    Raises:
        InputError: If classes do not have the same number of images, class by class.
    """
    classes = list(dict.fromkeys(targets))
    per_class = len(targets) // max(len(classes), 1)
    if not classes or list(targets) != [c for c in classes for _ in range(per_class)]:
        raise InputError(f"targets {list(targets)}: give the same number of images per class, class by class")
    pictures = on_white(explain(model, x, list(targets)).to_rgba())
    figure, axes = _figure(2 * len(classes), per_class)
    for i, target in enumerate(targets):
        row, column = 2 * classes.index(target), i % per_class
        axes[row, column].imshow(_colors(x[i : i + 1])[0].cpu().float().numpy())
        axes[row + 1, column].imshow(pictures[i].detach().cpu().float().numpy())
        if column == 0:
            axes[row, column].set_title(class_names[target], fontsize=9, loc="left")
    return figure


def _colors(x: Tensor) -> Tensor:
    """Colors (N, H, W, 3) of images (N, C, H, W): the first three channels, or gray if there are fewer."""
    three = x[:, :3] if x.shape[1] >= 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return three.movedim(1, -1)


def _figure(rows: int, columns: int) -> tuple["Figure", "np.ndarray"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * columns, 1.55 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    return figure, axes
