"""Figures: a row of pictures per explanation, beside bars of the strongest outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from ..files import AUTHOR, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bars", "Row", "draw_rows", "save_figure"]


@dataclass(frozen=True)
class Bars:
    """A horizontal bar chart.

    Attributes:
        title: Above it.
        names: Of the bars, from top to bottom.
        values: Their lengths.
        marked: The bar in red; None for none.
        limit: Where the axis ends; None fits it to the bars.
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
        bars: What stands at the end of the row.
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
            ax.set_title(fill(_drawable(title), 40), fontsize=10, parse_math=False)  # names are no formulas
            ax.axis("off")
        _draw_bars(axes[-1], row.bars)
    return figure


def _draw_bars(axes: "Axes", bars: Bars) -> None:
    colours = ["tab:red" if i == bars.marked else "tab:gray" for i in range(len(bars.names))]
    axes.barh(range(len(bars.names)), bars.values, color=colours)
    axes.set_yticks(range(len(bars.names)), [_drawable(name[:24]) for name in bars.names], parse_math=False)
    axes.invert_yaxis()
    axes.set_title(bars.title, fontsize=10)
    if bars.limit is not None:
        axes.set_xlim(0, bars.limit)


def _drawable(name: str) -> str:
    """Names of folders may hold bytes that are no text, which fonts refuse."""
    return name.encode(errors="replace").decode()


def save_figure(figure: "Figure", path: str | PathLike[str]) -> None:
    """Write a figure, whole or not at all; the suffix says the format. A PNG names this package as its maker."""
    with atomic_path(path) as temporary:
        is_png = temporary.suffix.lower() == ".png"
        figure.savefig(temporary, dpi=100, metadata={"Software": AUTHOR} if is_png else None)
