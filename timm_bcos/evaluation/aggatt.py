"""Maps of a whole data set on one picture: AggAtt, the mean map of each range of localization (arXiv 2205.10435, 3.3).

Single examples may be chosen; here all grids are played for the class of their first cell, sorted by the share that
lies in it, and averaged in ranges, which are narrow at both ends: the best, the typical and the worst.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..attribution.registry import attribute, method_names
from ..data.datasets import LabeledImages
from ..errors import InputError, MethodError
from ..prefetch import prefetch
from .pointing_game import Grid, cell_shares, compose, grid_targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bin_edges", "mean_maps", "plot_bins"]

PERCENTILES = (0, 2, 5, 50, 95, 98, 100)
SIDE = 120  # of the maps that are kept, in pixels


def bin_edges(count: int) -> list[int]:
    """Ranks between which the ranges lie; of few maps the outer ranges take one each, if there is one to take."""
    upper = [math.ceil(count * percent / 100) for percent in PERCENTILES[:4]]
    return [*upper, *(max(count - edge, upper[3]) for edge in reversed(upper[:3]))]


def mean_maps(maps: Tensor, shares: Tensor) -> list[Tensor | None]:
    """The mean positive map of each range, best first; None for a range without maps.

    Args:
        maps: Signed (G, H, W). Each counts alike: its positive part is divided by its sum.
        shares: (G,) by which they are sorted.

    Returns:
        As many (H, W) as there are ranges.
    """
    positive = maps.clamp_min(0)
    total = positive.sum((1, 2), keepdim=True)
    ranked = (positive / total.where(total > 0, 1))[shares.argsort(descending=True, stable=True)]
    edges = bin_edges(len(maps))
    return [ranked[a:b].mean(0) if b > a else None for a, b in pairwise(edges)]


def plot_bins(
    model: nn.Module, dataset: LabeledImages, grids: Sequence[Grid], methods: Sequence[str], smooth: int = 1
) -> tuple["Figure", list[str]]:
    """A matplotlib figure: a row per method, a column per range, best first, with the mean share in the first cell.

    Args:
        model: A B-cos network or a plain timm model, in eval mode, or a `Disconnected` one.
        dataset: What the grids' indices are of.
        grids: Of one size.
        methods: Of `timm_bcos.attribution.registry.METHODS`.
        smooth: Window of a mean filter, as in `cell_shares`.

    Returns:
        The figure, and why methods were left out.

    Raises:
        InputError: If no method suits the model, or there are no grids.
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
        raise InputError(f"no method suits this model: {left_out[0]}")
    return _draw(rows, grids[0].n), left_out


def _play(
    model: nn.Module, dataset: LabeledImages, grids: Sequence[Grid], method: str, smooth: int
) -> tuple[Tensor, Tensor]:
    """(G, h, w) maps of the first cells' classes, and (G,) their shares in it."""
    maps, shares = [], []
    pictures = prefetch(compose(model, dataset, grid) for grid in grids)
    for grid, picture in tqdm(zip(grids, pictures, strict=True), method, len(grids), disable=None):
        found = attribute(model, picture, int(grid_targets(model, grid)[0]), method)
        shares.append(cell_shares(found, grid.n, smooth)[0, 0, 0].cpu())
        even = F.avg_pool2d(found[:, None], smooth, 1, smooth // 2)
        maps.append(F.adaptive_avg_pool2d(even.clamp_min(0), SIDE)[0, 0].cpu())
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
