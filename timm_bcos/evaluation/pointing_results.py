"""The pointing game with results in a directory, where an interrupted run resumes.

Rows are appended to `confidences.csv` (predictions for all images) and `values.csv` (all shares) as they are computed.
`summary.csv`, `gains.csv`, `summary.md` and `boxes.png` summarize them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from ..attribution.registry import method_name, method_names
from ..data.datasets import LabeledImages
from ..distributed import distributed_map, on_main
from ..errors import InputError, MethodError
from ..explanation.visualization import save_figure
from ..files import atomic_path, write_csv
from ..prefetch import prefetch
from .paired import Gain, gains_table, paired_gains, view_name
from .pointing_game import Confidence, Disconnected, Disconnection, Grid, compose, confidences, grid_shares
from .results import append_rows, drop_torn_line, read_rows

__all__ = ["play", "play_all", "read_confidences", "read_values", "summarize", "write_summary"]

FIELDS: dict[str, Callable[[str], Any]] = {
    "n": int,
    "smooth": int,
    "scale": int,
    "method": method_name,
    "grid": int,
    "cell": int,
    "class": int,
    "image": int,
    "value": float,
}
CONFIDENCES: dict[str, Callable[[str], Any]] = dict(index=int, label=int, predicted=int, confidence=float)
ROWS = 32  # predictions that are written together
SUMMARY = ("method", "cells", "smooth", "scale", "values", "median", "q25", "q75")
GAINS = [field.name for field in dataclasses.fields(Gain)]

Key = tuple[int, int, int, str, int]  # cells per side, smoothing window, scale, method, grid
View = tuple[int, int]  # smoothing window, scale
Panel = tuple[int, View]  # cells per side, view of the maps
Panels = dict[Panel, dict[str, np.ndarray]]


def read_confidences(model: nn.Module, dataset: LabeledImages, folder: Path) -> list[Confidence]:
    """Predictions for all images, read from the directory's file; missing ones are computed first."""
    path = folder / "confidences.csv"
    read = partial(read_rows, path, CONFIDENCES)
    on_main(partial(drop_torn_line, path))
    done = len(on_main(read))
    if done < len(dataset):
        found = confidences(model, dataset, start=done)
        while some := list(map(dataclasses.astuple, islice(found, ROWS))):
            on_main(partial(append_rows, path, list(CONFIDENCES), some))
    return [Confidence(**row) for row in on_main(read)]


def read_values(folder: Path) -> dict[Key, list[float]]:
    """Shares of complete grids, in the order of their cells. Grids that an interruption cut off are left out."""
    found: dict[Key, dict[int, float]] = {}
    for row in read_rows(folder / "values.csv", FIELDS):
        key = (row["n"], row["smooth"], row["scale"], row["method"], row["grid"])
        found.setdefault(key, {})[row["cell"]] = row["value"]
    return {key: list(cells.values()) for key, cells in found.items() if len(cells) == key[0] ** 2}


def play_all(
    model: nn.Module,
    dataset: LabeledImages,
    samples: Iterable[Sequence[Grid]],
    methods: Sequence[str],
    folder: Path,
    *,
    disconnect: Disconnection = "none",
    **options: Any,
) -> list[str]:
    """Play grids of several sizes with several methods, and write a summary after each size.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        dataset: Data set of the grids' images.
        samples: Lists of grids, each of one size.
        methods: Attribution methods, names in `timm_bcos.attribution.registry.METHODS`.
        folder: Directory of the results.
        disconnect: Use a `Disconnected` model of this kind, 'full' or 'part'.
        options: Options of `play`.

    Returns:
        The reasons why methods were left out.

    Raises:
        InputError: If no method supports the model.
    """
    on_main(partial(drop_torn_line, folder / "values.csv"))
    left_out: dict[str, str] = {}
    methods = method_names(methods)
    for grids in samples:
        player = model if disconnect == "none" else Disconnected(model, grids[0].n, disconnect)
        for method in methods:
            try:
                play(player, dataset, grids, method, folder, **options)
            except MethodError as error:
                left_out[method] = str(error)
        on_main(partial(write_summary, folder, methods, left_out))
    return list(left_out.values())


def play(
    model: nn.Module,
    dataset: LabeledImages,
    grids: Sequence[Grid],
    method: str,
    folder: Path,
    *,
    smooth: Sequence[int] = (1, 15),
    scale: Sequence[int] = (1,),
    batch_size: int | None = None,
) -> None:
    """Play all grids whose shares are not in the directory yet.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        dataset: Data set of the grids' images.
        grids: Grids of one size.
        method: Attribution method, a name in `timm_bcos.attribution.registry.METHODS`.
        folder: Directory of the results.
        smooth: Smoothing windows, as in `timm_bcos.evaluation.pointing_game.cell_shares`.
        scale: Scales, each of which is combined with each window.
        batch_size: Number of classes per pass, as in `attribute`; None for as many as memory allows.

    Raises:
        MethodError: If the method does not support the model.
    """
    (method,), done = method_names([method]), on_main(partial(read_values, folder))
    views = list(product(smooth, scale))
    todo = [
        (number, grid, missing)
        for number, grid in enumerate(grids)
        if (missing := [view for view in views if (grid.n, *view, method, number) not in done])
    ]

    def compute(own: Sequence[tuple[int, Grid, list[View]]]) -> Iterator[list[tuple[object, ...]]]:
        pictures = prefetch(compose(model, dataset, grid) for _, grid, _ in own)
        title, done_before = f"{method} {grids[0].n}×{grids[0].n}", len(grids) - len(todo)
        progress = tqdm(
            zip(own, pictures, strict=True), title, done_before + len(own), initial=done_before, disable=None
        )
        for (number, grid, missing), picture in progress:
            shares = grid_shares(
                model, picture, grid, method, smooth=smooth, scale=scale, batch_size=batch_size
            ).tolist()
            yield [
                (grid.n, *view, method, number, cell, c, i, f"{v:.6f}")
                for view, values in zip(views, shares, strict=True)
                if view in missing
                for cell, c, i, v in zip(range(len(values)), grid.classes, grid.indices, values, strict=True)
            ]

    for rows in distributed_map(compute, todo):
        on_main(partial(append_rows, folder / "values.csv", list(FIELDS), rows))


def summarize(folder: Path, methods: Iterable[str]) -> Panels:
    """Shares by grid size and view of the maps, then by method, in the order of the methods."""
    found: dict[Panel, dict[str, list[float]]] = {}
    for (n, window, scale, method, _), values in sorted(read_values(folder).items()):
        found.setdefault((n, (window, scale)), {}).setdefault(method, []).extend(values)
    asked = {
        panel: {method: np.array(values[method]) for method in methods if method in values}
        for panel, values in sorted(found.items())
    }
    return {panel: values for panel, values in asked.items() if values}


def write_summary(folder: Path, methods: Sequence[str], left_out: Mapping[str, str]) -> None:
    """Write tables and box plots of all results so far.

    Args:
        folder: Directory of the results.
        methods: Requested methods.
        left_out: Reasons why methods were left out.

    Raises:
        InputError: If there are no results.
    """
    panels = summarize(folder, methods)
    if not panels:
        raise InputError(f"no method supports this model: {'; '.join(left_out.values())}")
    gains = paired_gains(read_values(folder), methods)
    with atomic_path(folder / "summary.md") as path:
        path.write_text(_table(panels) + ("\n" + gains_table(gains) if gains else ""))
    write_csv(folder / "summary.csv", SUMMARY, _rows(panels))
    write_csv(folder / "gains.csv", GAINS, map(dataclasses.astuple, gains))
    _box_plots(panels, folder / "boxes.png")


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def _rows(panels: Panels) -> Iterable[tuple[object, ...]]:
    for (n, view), methods in panels.items():
        for method, values in methods.items():
            low, middle, high = _quartiles(values)
            yield method, n, *view, len(values), f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}"


def _table(panels: Panels) -> str:
    """Markdown table of medians and quartiles: a row per method, a column per grid size and view of the maps."""
    titles = [f"{n}×{n}, {view_name(*view)}" for n, view in panels]
    lines = ["| method | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for method in dict.fromkeys(method for values in panels.values() for method in values):
        cells = [_cell(values[method]) if method in values else "" for values in panels.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray) -> str:
    low, middle, high = _quartiles(values)
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f}; {len(values)})"


def _box_plots(panels: Panels, path: Path) -> None:
    """Box plots: a row per grid size, a column per view, a box per method, and the score of a uniform map."""
    from matplotlib.figure import Figure

    sizes, views = (sorted(set(values)) for values in zip(*panels, strict=True))
    figure = Figure(figsize=(1 + 4 * len(views), 3.6 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), len(views), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for (n, view), values in panels.items():
        ax = axes[sizes.index(n), views.index(view)]
        ax.set_visible(True)
        ax.boxplot(list(values.values()), tick_labels=list(values), showfliers=False)
        ax.axhline(1 / n**2, color="gray", linestyle="--", linewidth=1)
        ax.set(title=f"{n}×{n}, {view_name(*view)}", ylabel="share in the cell", ylim=(0, 1))
        ax.tick_params(axis="x", rotation=90)
    save_figure(figure, path)
