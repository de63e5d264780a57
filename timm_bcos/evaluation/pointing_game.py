"""The grid pointing game: in a grid of images of different classes, how much of a class's attribution is in its cell?

Section 4 of arXiv 2205.10268. A map that lies wholly in the cell of its class scores 1, a uniform one 1 / n². Grids are
made of the images that the model is most confident of, so that it surely sees the class.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attribution.registry import AttributionModel, attribute, check_counts
from ..data.datasets import LabeledImages, image_batches, image_loader
from ..data.regions import cell_of_pixels
from ..errors import InputError
from .disconnected import Disconnected

__all__ = [
    "Confidence", "Grid", "cell_shares", "confidences", "grid_shares", "grid_targets", "localization", "sample_grids",
]  # fmt: skip


@dataclass(frozen=True)
class Confidence:
    """What a model says of one image of a data set.

    Attributes:
        index: Of the image in the data set.
        label: Its class.
        predicted: The model's.
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
        n: Cells per side.
        indices: Of the images in the data set.
        classes: Of the cells.
    """

    n: int
    indices: tuple[int, ...]
    classes: tuple[int, ...]


def confidences(
    model: nn.Module, dataset: LabeledImages, *, start: int = 0, batch_size: int = 32, progress: bool = True
) -> Iterator[Confidence]:
    """What a model says of every image of a labeled data set, as it comes.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        dataset: As `timm.data.create_dataset` makes it.
        start: The first image.
        batch_size: Images at a time.
        progress: Show a bar.

    Raises:
        InputError: For a data set without labels, or with other classes than the model's.
    """
    check_counts(batch_size=batch_size)
    subject, indices = AttributionModel(model), range(start, len(dataset))
    bar = "confidences" if progress else None
    for some, images, labels in image_batches(model, dataset, indices, batch_size, bar):
        probability = subject.probability(images).cpu()
        count = probability.shape[1]
        wrong = labels[(labels < 0) | (labels >= count)]
        if len(wrong):
            raise InputError(f"the data set has class {int(wrong[0])}, the model {count} classes from 0")
        predicted = probability.argmax(1).tolist()
        for i, label, guess, p in zip(some, labels.tolist(), predicted, probability, strict=True):
            yield Confidence(i, label, guess, p[label].item())


def sample_grids(
    found: Sequence[Confidence], n: int, count: int, *, threshold: float = 0.5, seed: int = 0, reuse: bool = False
) -> list[Grid]:
    """Random sets of n² classes, each with its most confident image that no grid has used yet.

    Args:
        found: What the model says of the images.
        n: Cells per side.
        count: Grids.
        threshold: Only images that the model gets right with at least this probability are taken.
        seed: Of the choice of classes.
        reuse: Start again with a class's first image when all have been used.

    Raises:
        InputError: If there are too few images, saying how many are missing.
        MethodError: For counts below 1.
    """
    check_counts(n=n, count=count)
    ranked: dict[int, list[int]] = {}
    for item in sorted(found, key=lambda item: -item.confidence):
        if item.predicted == item.label and item.confidence >= threshold:
            ranked.setdefault(item.label, []).append(item.index)
    if len(ranked) < n * n:
        raise InputError(
            f"{n}×{n} grids need {n * n} classes with images that the model gets right with a probability of at least "
            f"{threshold:g}, {len(ranked)} have some: images of {n * n - len(ranked)} more are missing"
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
                f"unused ones, so that {missing} grids ({missing * n * n} images) are missing; ask for fewer, or reuse"
            )
        classes = rng.sample(free, n * n)
        grids.append(Grid(n, tuple(ranked[c][used[c] % len(ranked[c])] for c in classes), tuple(classes)))
        for c in classes:
            used[c] += 1
    return grids


def cell_shares(maps: Tensor, n: int, smooth: int = 1) -> Tensor:
    """Share of the positive attribution in each cell of an n×n grid.

    Args:
        maps: Signed (N, H, W). Where n divides no side, a pixel is of the cell that its center lies in.
        n: Cells per side.
        smooth: Window of a mean filter over the signed map, odd; 1 for none. The paper's code takes 15.

    Returns:
        (N, n, n); sums to 1, or is 0 everywhere for a map without positive attribution.

    Raises:
        InputError: For an even window, which would shift the map.
    """
    check_counts(n=n)
    if smooth < 1 or smooth % 2 == 0:
        raise InputError(f"smooth={smooth}: give an odd window, 1 for no smoothing")
    positive = F.avg_pool2d(maps[:, None], smooth, 1, smooth // 2).clamp(min=0)
    rows, columns = (cell_of_pixels(side, n).to(positive) for side in maps.shape[1:])
    sums = torch.einsum("ih,bhw,jw->bij", rows, positive[:, 0], columns)
    total = sums.sum((1, 2), keepdim=True)
    return torch.where(total > 0, sums / total.clamp(min=torch.finfo(sums.dtype).tiny), torch.zeros_like(sums))


def localization(
    model: nn.Module,
    dataset: LabeledImages,
    grid: Grid,
    method: str = "bcos",
    *,
    smooth: Sequence[int] = (1, 15),
    **options: Any,
) -> Tensor:
    """Play one grid: for each cell's class, the share of its positive attribution that lies in the cell.

    Args:
        model: A B-cos network or a plain timm model, in eval mode; or one that is `Disconnected`.
        dataset: What the grid's indices are of.
        grid: From `sample_grids`.
        method: Of `timm_bcos.attribution.registry.METHODS`.
        smooth: Windows, as in `cell_shares`; the maps are made once for all.
        options: Of `attribute`.

    Returns:
        (windows, n²), in [0, 1].
    """
    return grid_shares(model, compose(model, dataset, grid), grid, method, smooth=smooth, **options)


def grid_shares(
    model: nn.Module,
    image: Tensor,
    grid: Grid,
    method: str = "bcos",
    *,
    smooth: Sequence[int] = (1, 15),
    **options: Any,
) -> Tensor:
    """The same for a picture (1, C, H, W) that `compose` has made; arguments and result are those of `localization`."""
    classes = grid_targets(model, grid).to(image.device)
    maps = attribute(model, image.expand(len(classes), -1, -1, -1), classes, method, **options)
    return torch.stack([cell_shares(maps, grid.n, window).flatten(1).diagonal() for window in smooth])


def grid_targets(model: nn.Module, grid: Grid) -> Tensor:
    """(n²,) the logit that stands for the class of each cell."""
    classes = torch.tensor(grid.classes)
    return model.targets(classes) if isinstance(model, Disconnected) else classes


def compose(model: nn.Module, dataset: LabeledImages, grid: Grid) -> Tensor:
    """The picture of a grid, (1, C, H, W); a model of fixed input size sees smaller cells, others a larger picture."""
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
