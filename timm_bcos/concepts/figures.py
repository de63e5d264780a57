"""Figures and tables of concepts: decompositions of photos, and the mean share of each concept in each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.datasets import LabeledImages, map_batches
from ..explanation.titles import class_name
from ..explanation.visualization import Bars, Row, draw_rows, on_white
from ..files import write_csv
from .decomposition import ConceptDecomposition, explain_concepts
from .dictionary import Concepts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["class_shares", "plot_decomposition", "save_shares"]


def plot_decomposition(decomposition: ConceptDecomposition, class_names: Sequence[str] | None = None) -> "Figure":
    """Plot a row per image: the explanation of the logit, those of the strongest concepts, and all shares.

    Args:
        decomposition: Result of `explain_concepts`.
        class_names: Name of each class; None for those of the explanation.
    """
    whole = decomposition.explanation
    columns = [whole, *decomposition.pixels]
    pictures = [whole.image.movedim(1, -1), *(on_white(one.to_rgba()) for one in columns)]
    rows = []
    for i in range(len(whole)):
        name = class_name(whole, int(whole.target[i]), class_names)
        titles = [f"concept {int(one.target[i])}: {float(one.logit[i]):+.2f}" for one in decomposition.pixels]
        titles = ["image", f"{name}: logit {float(whole.logit[i]):.2f}", *titles]
        shown = [(title, picture[i]) for title, picture in zip(titles, pictures, strict=True)]
        rows.append(Row(shown, _bars(decomposition, i)))
    return draw_rows(rows)


def _bars(decomposition: ConceptDecomposition, image: int, most: int = 8) -> Bars:
    shares = decomposition.shares[image]
    order = shares.abs().topk(min(most, len(shares))).indices.tolist()
    values = {f"concept {concept}": float(shares[concept]) for concept in order}
    left = len(shares) - len(order)
    if left:
        values[f"{left} more concepts"] = float(shares.sum() - shares[order].sum())
    values |= {"no concept": float(decomposition.rest[image]), "bias, other paths": float(decomposition.other[image])}
    return Bars("contributions to the logit", list(values), list(values.values()))


def class_shares(
    model: nn.Module,
    dataset: LabeledImages,
    concepts: Concepts,
    num_classes: int,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Mean contribution of each concept to the logit of the labeled class, over each class's images.

    Several processes share the batches (`timm_bcos.distributed`).

    Args:
        model: A B-cos model in eval mode.
        dataset: Data set from `timm.data.create_dataset`.
        concepts: Concepts of one of the model's layers.
        num_classes: Number of classes.
        batch_size: Number of images per batch.
        progress: Show a progress bar.

    Returns:
        Contributions (num_classes, K + 2) of the K concepts, of the rest, and of everything else; NaN for classes
        without images.
    """
    total, count = torch.zeros(num_classes, len(concepts) + 2, dtype=torch.float64), torch.zeros(num_classes)

    def shares(indices: Sequence[int], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        decomposition = explain_concepts(model, images, concepts, labels, top=0)
        rows = torch.cat([decomposition.shares, decomposition.rest[:, None], decomposition.other[:, None]], 1)
        return rows.double().cpu(), labels

    bar = "shares" if progress else None
    for rows, labels in map_batches(shares, model, dataset, range(len(dataset)), batch_size, bar):
        total.index_add_(0, labels, rows)
        count += labels.bincount(minlength=num_classes)
    return total / count[:, None]


def save_shares(shares: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Write the result of `class_shares` as CSV, with a row per concept and a column per class."""
    names = [*range(shares.shape[1] - 2), "no concept", "bias, other paths"]
    rows = ([name, *(f"{value:.4f}" for value in row)] for name, row in zip(names, shares.T, strict=True))
    write_csv(path, ["concept", *class_names], rows)
