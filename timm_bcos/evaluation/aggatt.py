"""AggAtt: mean attribution maps of a whole data set, by ranges of localization (arXiv 2205.10435, section 3.3).

Each grid is explained for the class of its first cell. The maps are sorted by the share of attribution in that cell and
averaged in ranges of percentiles, which are narrow for the best and the worst maps.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..attribution.registry import attribute, method_names
from ..data.datasets import LabeledImages
from ..distributed import distributed_map
from ..errors import InputError, MethodError
from ..prefetch import prefetch
from .pointing_game import Grid, cell_shares, compose, grid_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bin_edges", "mean_maps", "plot_aggatt"]

PERCENTILES = (0, 2, 5, 50, 95, 98, 100)
SIDE = 120  # size in pixels to which maps are reduced


def bin_edges(count: int) -> list[int]:
    """Ranks that separate the ranges. With few maps, the outer ranges get one map each, as far as there are any."""
    upper = [math.ceil(count * percent / 100) for percent in PERCENTILES[:4]]
    return [*upper, *(max(count - edge, upper[3]) for edge in reversed(upper[:3]))]


def mean_maps(maps: Tensor, shares: Tensor) -> list[Tensor | None]:
    """Mean positive map of each range, best first.

    Args:
        maps: Signed maps (G, H, W). The positive part of each is divided by its sum, so that all have equal weight.
        shares: Share of attribution in the first cell (G,), by which the maps are sorted.

    Returns:
        A map (H, W) per range; None for a range without maps.
    """
    positive = maps.clamp_min(0)
    total = positive.sum((1, 2), keepdim=True)
    ranked = (positive / total.where(total > 0, 1))[shares.argsort(descending=True, stable=True)]
    edges = bin_edges(len(maps))
    return [ranked[a:b].mean(0) if b > a else None for a, b in pairwise(edges)]


def plot_aggatt(
    model: nn.Module, dataset: LabeledImages, grids: Sequence[Grid], methods: Sequence[str], smooth: int = 1
) -> tuple["Figure", list[str]]:
    """Plot a row per method and a column per range, best first, with the mean share in the first cell.

    Args:
        model: A B-cos model or a plain timm model, in eval mode, or a `Disconnected` one.
        dataset: Data set of the grids' images.
        grids: Grids of the same size.
        methods: Attribution methods, names in `timm_bcos.attribution.registry.METHODS`.
        smooth: Window of the mean filter, as in `cell_shares`.

    Returns:
        The matplotlib figure, and the reasons why methods were left out.

    Raises:
        InputError: If no method supports the model, or there are no grids.
    """
    if not grids:
        raise InputError("no grids to play")
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    left_out = []
    for method in method_names(methods):
        try:
            rows[method] = _play(model, dataset, grids, method, smooth)
        except MethodError as error:
            left_out.append(str(error))
    if not rows:
        raise InputError(f"no method supports this model: {left_out[0]}")
    return _draw(rows, grids[0].n), left_out


def _play(
    model: nn.Module, dataset: LabeledImages, grids: Sequence[Grid], method: str, smooth: int
) -> tuple[Tensor, Tensor]:
    """Maps (G, h, w) of the classes of the first cells, and their shares (G,) in these cells."""

    def compute(own: Sequence[Grid]) -> Iterator[tuple[Tensor, Tensor]]:
        pictures = prefetch(compose(model, dataset, grid) for grid in own)
        for grid, picture in tqdm(zip(own, pictures, strict=True), method, len(own), disable=None):
            found = attribute(model, picture, int(grid_targets(model, grid)[0]), method)
            even = F.avg_pool2d(found[:, None], smooth, 1, smooth // 2)
            small = F.adaptive_avg_pool2d(even.clamp_min(0), SIDE)
            yield small[0, 0].cpu(), cell_shares(found, grid.n, smooth)[0, 0, 0].cpu()

    maps, shares = zip(*distributed_map(compute, grids), strict=True)
    return torch.stack(maps), torch.stack(shares)


def _draw(rows: dict[str, tuple[Tensor, Tensor]], n: int) -> "Figure":
    from matplotlib.figure import Figure

    count = len(PERCENTILES) - 1
    figure = Figure(figsize=(1.5 * count, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (method, (maps, shares)) in enumerate(rows.items()):
        ranked, edges = shares.sort(descending=True).values, bin_edges(len(shares))
        for column, mean in enumerate(mean_maps(maps, shares)):
            ax = axes[row, column]
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(f"{PERCENTILES[column]} to {PERCENTILES[column + 1]} %", fontsize=9)
            if mean is None:
                continue
            ax.imshow(mean.float().numpy(), cmap="inferno", vmin=0)
            for k in range(1, n):
                ax.axhline(k * SIDE / n - 0.5, color="white", linewidth=0.5)
                ax.axvline(k * SIDE / n - 0.5, color="white", linewidth=0.5)
            ax.set_xlabel(f"{ranked[edges[column] : edges[column + 1]].mean():.2f}", fontsize=8)
        axes[row, 0].set_ylabel(method, fontsize=9)
    return figure
