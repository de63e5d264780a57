"""Explanations as pictures: weights in color, contribution maps."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from textwrap import fill
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..files import AUTHOR, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "Bars",
    "Row",
    "color_layer",
    "draw_rows",
    "drawable",
    "map_to_rgba",
    "overlay",
    "save_figure",
    "save_image",
    "to_pil",
    "weights_to_rgba",
]

EPS = 1e-12  # keeps 0 / 0 at 0


def weights_to_rgba(weights: Tensor, contribution_map: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """Decode rows of W(x) into pictures (section 4.3 of https://arxiv.org/abs/2205.10268).

    Each pixel's weight vector, in the encoding [r, g, b, 1-r, 1-g, 1-b], is read as a color; its opacity is the
    vector's norm where the pixel speaks for the target and 0 elsewhere, smoothed, 1 at the given percentile.

    Args:
        weights: (N, 2C, H, W), C being 3, or 1 for gray.
        contribution_map: (N, H, W).
        smooth: Odd side length of the box filter on the opacity, 0 for none.
        percentile: Percentile of each picture's opacity that is scaled to 1, in [0, 100].

    Returns:
        (N, H, W, 4) in [0, 1].
    """
    channels = weights.shape[1] // 2
    if channels not in (1, 3):
        raise InputError(f"pictures need 1 or 3 image channels, these weights have {channels}")
    direction = (weights / (weights.abs().amax(1, keepdim=True) + EPS)).clamp_min(0)
    positive, negative = direction.split(channels, dim=1)
    color = (positive / (positive + negative + EPS)).expand(-1, 3, -1, -1)
    opacity = weights.norm(dim=1, keepdim=True).masked_fill(contribution_map[:, None] < 0, 0)
    if smooth:
        opacity = F.avg_pool2d(opacity, smooth, stride=1, padding=(smooth - 1) // 2)
    full = opacity.double().flatten(1).quantile(percentile / 100, dim=1).to(opacity.dtype)
    opacity = (opacity / full.clamp_min(EPS)[:, None, None, None]).clamp(0, 1)
    return torch.cat([color, opacity], 1).permute(0, 2, 3, 1)


def on_white(rgba: Tensor) -> Tensor:
    """(..., 4) pictures laid on white, (..., 3)."""
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def map_to_rgba(contribution_map: Tensor, percentile: float = 99.5) -> Tensor:
    """Contribution maps in diverging colors, red for and blue against, over a range symmetric about 0 (white).

    Args:
        contribution_map: (N, H, W), or a single (H, W).
        percentile: Percentile of a map's |contribution| at which its colors saturate, in [0, 100].

    Returns:
        (N, H, W, 4) in [0, 1]; (H, W, 4) for a single map.
    """
    from matplotlib import colormaps

    if contribution_map.ndim == 2:
        return map_to_rgba(contribution_map[None], percentile)[0]

    full = contribution_map.abs().double().flatten(1).quantile(percentile / 100, dim=1).clamp_min(EPS)
    unit = (contribution_map.double() / full[:, None, None]).clamp(-1, 1) / 2 + 0.5
    return torch.from_numpy(colormaps["bwr"](unit.detach().cpu().numpy()))


def color_layer(contribution_map: Tensor, opacity: float = 0.9) -> Tensor:
    """Contribution maps as layers in diverging colors, which are as opaque as the contributions are strong.

    Args:
        contribution_map: (N, H, W).
        opacity: Opacity of the strongest contributions, in [0, 1].

    Returns:
        (N, H, W, 4) in [0, 1].
    """
    colors = map_to_rgba(contribution_map)[..., :3]
    return torch.cat([colors, (1 - colors.amin(-1, keepdim=True)) * opacity], -1)


def overlay(image: Tensor, contribution_map: Tensor, opacity: float = 0.9) -> Tensor:
    """Contribution maps over the images in gray; the color is as strong as the contribution.

    Args:
        image: (N, C, H, W) in [0, 1].
        contribution_map: (N, H, W).
        opacity: Opacity of the strongest contributions, in [0, 1].

    Returns:
        (N, H, W, 3) in [0, 1].
    """
    colors, strength = color_layer(contribution_map, opacity).split([3, 1], -1)
    gray = 0.5 + image.detach().cpu().double().mean(1)[..., None] / 2  # light enough for blue to show
    return gray * (1 - strength) + colors * strength


def faded(image: Tensor, region: Tensor, opacity: float = 0.35) -> Tensor:
    """Images (N, C, H, W) in [0, 1] that are pale outside a region (N, rows, columns) of booleans."""
    inside = F.interpolate(region[:, None].to(image.dtype), image.shape[-2:], mode="nearest")
    return 1 - (1 - image) * (opacity + (1 - opacity) * inside)


def to_pil(picture: Tensor) -> "Image":
    """Convert a picture (H, W, 3 or 4) in [0, 1] to an RGB or RGBA image of Pillow."""
    from PIL import Image

    return Image.fromarray((picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def save_image(picture: Tensor, path: str | os.PathLike[str]) -> None:
    """Write one picture (H, W, 3 or 4) in [0, 1], whole or not at all; a PNG names this package as its maker."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_text("Software", AUTHOR)
    with atomic_path(path) as temporary:
        to_pil(picture).save(temporary, pnginfo=notes)


@dataclass(frozen=True)
class Bars:
    """A horizontal bar chart.

    Attributes:
        title: Title above the bars.
        names: Names of the bars, from top to bottom.
        values: Lengths of the bars.
        marked: Index of the bar in red; None for none.
        limit: End of the axis; None fits it to the bars.
    """

    title: str
    names: Sequence[str]
    values: Sequence[float]
    marked: int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a figure.

    Attributes:
        pictures: Title and picture, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in [0, 1].
        bars: Bar charts at the end of the row.
    """

    pictures: Sequence[tuple[str, Tensor]]
    bars: Bars


def draw_rows(rows: Sequence[Row]) -> "Figure":
    """A matplotlib figure, to which no window or global state refers."""
    from matplotlib.figure import Figure

    columns = len(rows[0].pictures)
    figure = Figure(figsize=(3.4 * (columns + 1), 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1.0] * columns + [1.3])
    for row, axes in zip(rows, grid, strict=True):
        for ax, (title, picture) in zip(axes, row.pictures, strict=False):
            ax.imshow(picture.detach().cpu().float().numpy(), cmap="gray", vmin=0, vmax=1)
            ax.set_title(fill(drawable(title), 40), fontsize=10, parse_math=False)  # names are not formulas
            ax.axis("off")
        _draw_bars(axes[-1], row.bars)
    return figure


def _draw_bars(axes: "Axes", bars: Bars) -> None:
    colors = ["tab:red" if i == bars.marked else "tab:gray" for i in range(len(bars.names))]
    axes.barh(range(len(bars.names)), bars.values, color=colors)
    axes.set_yticks(range(len(bars.names)), [drawable(name[:24]) for name in bars.names], parse_math=False)
    axes.invert_yaxis()
    axes.set_title(bars.title, fontsize=10)
    if bars.limit is not None:
        axes.set_xlim(0, bars.limit)


def drawable(name: str) -> str:
    """Replace bytes that are not text, which names of directories may contain and fonts refuse."""
    return name.encode(errors="replace").decode()


def save_figure(figure: "Figure", path: str | PathLike[str]) -> None:
    """Write a figure, whole or not at all; the suffix says the format. A PNG names this package as its maker."""
    with atomic_path(path) as temporary:
        is_png = temporary.suffix.lower() == ".png"
        figure.savefig(temporary, dpi=100, metadata={"Software": AUTHOR} if is_png else None)
