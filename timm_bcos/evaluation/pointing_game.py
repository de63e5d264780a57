"""The grid pointing game (arXiv 2205.10268, section 4): how much attribution of a class lies in its own cell.

A map that lies completely in the cell of its class scores 1, a uniform map 1 / n². Grids are composed of the images
with the highest confidence, so that the model recognizes each class.

`Disconnected` restricts what can influence a logit (arXiv 2205.10435, section 3.1). In a fully disconnected grid
(DiFull), the model processes each cell separately, so attribution outside the cell is certainly wrong. In a partially
disconnected grid (DiPart), the model processes the whole grid, but each cell's features get a classifier of their own:
only receptive fields across the border connect cells.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attribution.registry import AttributionModel, attribute, check_counts
from ..data.datasets import LabeledImages, image_loader, map_batches
from ..data.regions import cell_of_pixels, cut_cells, join_cells
from ..errors import InputError, MethodError
from ..explanation.scale import cell_means, check_scale

__all__ = [
    "Confidence", "Disconnected", "Disconnection", "Grid", "cell_shares", "compose", "confidences", "grid_shares",
    "grid_targets", "localization", "sample_grids",
]  # fmt: skip


@dataclass(frozen=True)
class Confidence:
    """The prediction of a model for one image of a data set.

    Attributes:
        index: Index of the image.
        label: Class of the image.
        predicted: Predicted class.
        confidence: Probability of the label.
    """

    index: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Grid:
    """n² images of different classes, row by row.

    Attributes:
        n: Number of cells per side.
        indices: Indices of the images in the data set.
        classes: Classes of the cells.
    """

    n: int
    indices: tuple[int, ...]
    classes: tuple[int, ...]


def confidences(
    model: nn.Module, dataset: LabeledImages, *, start: int = 0, batch_size: int = 32, progress: bool = True
) -> Iterator[Confidence]:
    """Iterate over the predictions for all images of a labeled data set. Several processes share its batches.

    Batches are counted from the first image of the data set, so that a resumed run computes the same numbers.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        dataset: Data set from `timm.data.create_dataset`.
        start: Index of the first image.
        batch_size: Number of images per batch.
        progress: Show a progress bar.

    Raises:
        InputError: If the data set has no labels, or a label is not a class of the model.
    """
    check_counts(batch_size=batch_size)
    subject, first = AttributionModel(model), start - start % batch_size

    def predict(indices: Sequence[int], images: Tensor, labels: Tensor) -> list[Confidence]:
        probability = subject.probability(images).cpu()
        count = probability.shape[1]
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong):
            raise InputError(f"the data set has class {int(wrong[0])}, the model {count} classes from 0")
        predicted = probability.argmax(1).tolist()
        rows = zip(indices, labels.tolist(), predicted, probability, strict=True)
        return [Confidence(i, label, guess, p[label].item()) for i, label, guess, p in rows if i >= start]

    bar = "confidences" if progress else None
    for batch in map_batches(predict, model, dataset, range(first, len(dataset)), batch_size, bar):
        yield from batch


def sample_grids(
    found: Sequence[Confidence], n: int, count: int, *, threshold: float = 0.5, seed: int = 0, reuse: bool = False
) -> list[Grid]:
    """Sample grids of n² random classes. Each class shows its unused image with the highest confidence.

    Args:
        found: Predictions, from `confidences`.
        n: Number of cells per side.
        count: Number of grids.
        threshold: Minimum confidence of an image; only correctly classified images are used.
        seed: Random seed for sampling classes.
        reuse: Start again with a class's first image when all are used.

    Raises:
        InputError: If there are too few images; the message says how many are missing.
        MethodError: If a count is below 1.
    """
    check_counts(n=n, count=count)
    ranked: dict[int, list[int]] = {}
    for item in sorted(found, key=lambda item: -item.confidence):
        if item.predicted == item.label and item.confidence >= threshold:
            ranked.setdefault(item.label, []).append(item.index)
    if len(ranked) < n * n:
        raise InputError(
            f"{n}×{n} grids need {n * n} classes with correctly classified images of a confidence of at least "
            f"{threshold:g}; {len(ranked)} classes have some, {n * n - len(ranked)} more are missing: "
            f"use fewer cells, a lower threshold, or a model of at least {n * n} classes"
        )
    rng = random.Random(seed)
    used = dict.fromkeys(ranked, 0)
    grids: list[Grid] = []
    while len(grids) < count:
        free = [c for c in sorted(ranked) if reuse or used[c] < len(ranked[c])]
        if len(free) < n * n:
            missing = count - len(grids)
            raise InputError(
                f"{count} grids of {n}×{n} need more images: after {len(grids)} grids only {len(free)} classes have "
                f"unused ones; {missing} grids ({missing * n * n} images) are missing: ask for fewer (--grids), or let "
                f"grids share images (reuse=True, on the command line --reuse)"
            )
        classes = rng.sample(free, n * n)
        grids.append(Grid(n, tuple(ranked[c][used[c] % len(ranked[c])] for c in classes), tuple(classes)))
        for c in classes:
            used[c] += 1
    return grids


def cell_shares(maps: Tensor, n: int, smooth: int = 1, scale: int = 1) -> Tensor:
    """Share of the positive attribution in each cell of an n×n grid.

    Args:
        maps: Signed maps (N, H, W). If n does not divide a side, a pixel belongs to the cell that contains its center.
        n: Number of cells per side.
        smooth: Window of a mean filter over the signed map, odd; 1 for no smoothing. The paper's code uses 15.
        scale: Side of the square cells of pixels over which the signed map is summed before the positive part is taken,
            as in `Explanation.at_scale`; 1 for single pixels. They are counted within each cell of the grid, so that no
            sum mixes two images.

    Returns:
        Shares (N, n, n). They sum to 1, or are 0 for a map without positive attribution.

    Raises:
        InputError: If the window is even, which would shift the map, the scale is not an integer of at least 1, or it
            is larger than 1 and n does not divide the sides.
    """
    check_counts(n=n)
    if smooth < 1 or smooth % 2 == 0:
        raise InputError(f"smooth={smooth}: give an odd window, 1 for no smoothing")
    smoothed = F.avg_pool2d(maps[:, None], smooth, 1, smooth // 2)
    positive = _sum_within_cells(smoothed, n, check_scale(scale)).to(maps).clamp(min=0)
    rows, columns = (cell_of_pixels(side, n).to(positive) for side in maps.shape[1:])
    sums = torch.einsum("ih,bhw,jw->bij", rows, positive[:, 0], columns)
    total = sums.sum((1, 2), keepdim=True)
    return torch.where(total > 0, sums / total.clamp(min=torch.finfo(sums.dtype).tiny), torch.zeros_like(sums))


def _sum_within_cells(maps: Tensor, n: int, scale: int) -> Tensor:
    """Average (..., H, W) maps over squares of scale × scale pixels within each cell of an n×n grid."""
    height, width = maps.shape[-2:]
    if scale == 1:
        return maps
    if height % n or width % n:
        raise InputError(f"scale={scale}: {n}×{n} cells do not divide maps of {height} × {width} pixels; use scale 1")
    cells = maps.unflatten(-1, (n, -1)).unflatten(-3, (n, -1)).transpose(-2, -3)
    return cell_means(cells, scale).transpose(-2, -3).flatten(-2).flatten(-3, -2)


def localization(model: nn.Module, dataset: LabeledImages, grid: Grid, method: str = "bcos", **options: Any) -> Tensor:
    """Play one grid of images of a data set; arguments and result as in `grid_shares`."""
    return grid_shares(model, compose(model, dataset, grid), grid, method, **options)


def grid_shares(
    model: nn.Module,
    image: Tensor,
    grid: Grid,
    method: str = "bcos",
    *,
    smooth: Sequence[int] = (1, 15),
    scale: Sequence[int] = (1,),
    **options: Any,
) -> Tensor:
    """Play one grid: for each cell's class, the share of its positive attribution that lies in the cell.

    Args:
        model: A B-cos model or a plain timm model, in eval mode, or a `Disconnected` one.
        image: Image (1, C, H, W) of the grid, from `compose`.
        grid: Grid from `sample_grids`.
        method: Attribution method, a name in `timm_bcos.attribution.registry.METHODS`.
        smooth: Smoothing windows, as in `cell_shares`. The maps are computed once.
        scale: Scales, as in `cell_shares`. Each is combined with each window.
        options: Options of `attribute`.

    Returns:
        Shares (windows · scales, n²) in [0, 1]; all scales of the first window come first.
    """
    classes = grid_targets(model, grid).to(image.device)
    maps = attribute(model, image.expand(len(classes), -1, -1, -1), classes, method, **options)
    return torch.stack([cell_shares(maps, grid.n, *pair).flatten(1).diagonal() for pair in product(smooth, scale)])


def grid_targets(model: nn.Module, grid: Grid) -> Tensor:
    """(n²,) index of the logit of each cell's class."""
    classes = torch.tensor(grid.classes)
    return model.targets(classes) if isinstance(model, Disconnected) else classes


def compose(model: nn.Module, dataset: LabeledImages, grid: Grid) -> Tensor:
    """Compose the image (1, C, H, W) of a grid.

    For models of fixed input size the cells are reduced; otherwise the image is larger.
    """
    load = image_loader(model, dataset)
    images = torch.stack([load(index)[0] for index in grid.indices])
    is_fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
    if is_fixed:
        size = [s // grid.n for s in images.shape[-2:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    rows = [torch.cat(list(row), dim=-1) for row in images.split(grid.n)]
    picture = torch.cat(rows, dim=-2)[None].to(next(model.parameters()).device)
    if not is_fixed:
        return picture
    height, width = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    return F.interpolate(picture, (height, width), mode="bilinear") if picture.shape[-1] != width else picture


Disconnection = Literal["none", "full", "part"]


class Disconnected(nn.Module):
    """A model with separate logits for each cell of a grid.

    Maps images (N, C, n · H, n · W) to logits (N, n² · K), cell by cell.

    Args:
        model: A B-cos model or a plain timm model, with timm's `forward_features` and `forward_head`.
        n: Number of cells per side.
        kind: 'full' (DiFull) or 'part' (DiPart).

    Raises:
        MethodError: If the model lacks one of these methods.
    """

    def __init__(self, model: Any, n: int, kind: Disconnection) -> None:
        super().__init__()
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise MethodError(f"{type(model).__name__} has no forward_features and forward_head to disconnect")
        self.model, self.n, self.kind = model, n, kind
        self.maps = nn.Identity()  # of the whole grid, as the last feature map for Grad-CAM
        self.classes: int = model.num_classes
        self.num_classes = n * n * self.classes
        whole_size = (
            dict(fixed_input_size=False) if kind == "full" else {}
        )  # cells have the model's input size, the grid has not
        self.pretrained_cfg = dict(model.pretrained_cfg) | whole_size
        if hasattr(model, "bcos_config"):
            self.bcos_config = model.bcos_config
        self.train(model.training)

    def targets(self, classes: Tensor) -> Tensor:
        """(n²,) index of the logit of each cell's class."""
        return classes + self.classes * torch.arange(self.n**2, device=classes.device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, n² · K) of all cells."""
        features = self._apart(x) if self.kind == "full" else self._together(x)
        logits: Tensor = self.model.forward_head(features)
        return logits.unflatten(0, (len(x), -1)).flatten(1)

    def _apart(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(cut_cells(x, self.n))
        return cut_cells(self.maps(join_cells(features, self.n)), self.n) if self._are_maps(features) else features

    def _together(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(x)
        if not self._are_maps(features):
            raise MethodError(
                f"DiPart needs feature maps (N, C, H, W); {type(self.model).__name__} has features of shape "
                f"{tuple(features.shape)}: use 'full'"
            )
        return cut_cells(self.maps(features), self.n)

    def _are_maps(self, features: Tensor) -> bool:
        return features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NCHW"
