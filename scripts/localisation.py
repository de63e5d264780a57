"""Play the grid pointing game with a model and any number of attribution methods.

    python scripts/localisation.py --checkpoint model_best.pth.tar --data-dir data/clothing --split test --n 2 3
    python scripts/localisation.py --plain --model tf_efficientnet_lite0 --checkpoint lite0.safetensors \
        --data-dir imagenet_photos.tar --class-map imagenet_class_map.txt --methods gradcam ixg

Writes into --out: confidences.csv (made once), values.csv (every value), both appended to as they come, so that an
interrupted run resumes, summary.md and boxes.png.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import timm_bcos
from timm_bcos import MethodError
from timm_bcos.attribution.registry import check_methods
from timm_bcos.cli.arguments import add_arguments, load_network_and_data, parse_and_run, remember_settings
from timm_bcos.cli.results import append_rows, drop_torn_line, read_rows
from timm_bcos.explaining.figures import save_figure
from timm_bcos.files import atomic_path
from timm_bcos.judging.pointing_game import Confidence, Grid, confidences, localisation, sample_grids

FIELDS = {"n": int, "smooth": int, "method": str, "grid": int, "cell": int, "class": int, "image": int, "value": float}
CONFIDENCES = dict(index=int, label=int, predicted=int, confidence=float)
Key = tuple[int, int, str, int]  # cells per side, smoothing window, method, grid
METHODS = ("bcos", "gradient", "ixg", "ig", "deeplift", "smoothgrad", "guided_backprop", "gradcam", "lrp",
           "attention_rollout", "occlusion", "lime", "rise")  # fmt: skip


def cached_confidences(model: Any, dataset: Any, path: Path) -> list[Confidence]:
    """From the file, which is completed first."""
    drop_torn_line(path)
    done = len(path.read_text().splitlines()) - 1 if path.exists() else 0
    if done < len(dataset):
        append_rows(path, list(CONFIDENCES), map(dataclasses.astuple, confidences(model, dataset, start=done)))
    return [Confidence(**row) for row in read_rows(path, CONFIDENCES)]


def read_values(path: Path) -> dict[Key, list[float]]:
    """Values of whole grids; what an interruption cut short is played again."""
    found: dict[Key, dict[int, float]] = {}
    for row in read_rows(path, FIELDS):
        found.setdefault((row["n"], row["smooth"], row["method"], row["grid"]), {})[row["cell"]] = row["value"]
    return {key: list(cells.values()) for key, cells in found.items() if len(cells) == key[0] ** 2}


def play(
    model: Any, dataset: Any, grids: Sequence[Grid], method: str, path: Path, windows: Sequence[int], batch_size: int
) -> None:
    """Play the grids that the file of values does not have."""
    done = read_values(path)
    for number, grid in enumerate(tqdm(grids, f"{method} {grids[0].n}×{grids[0].n}", disable=None)):
        missing = [window for window in windows if (grid.n, window, method, number) not in done]
        if not missing:
            continue
        shares = localisation(model, dataset, grid, method, smooth=missing, batch_size=batch_size).tolist()
        for window, values in zip(missing, shares, strict=True):
            cells = zip(range(len(values)), grid.classes, grid.indices, values, strict=True)
            rows = ((grid.n, window, method, number, cell, c, i, f"{v:.6f}") for cell, c, i, v in cells)
            append_rows(path, list(FIELDS), rows)


Panel = tuple[int, int]  # cells per side, smoothing window


def summarise(path: Path, methods: Iterable[str]) -> dict[Panel, dict[str, np.ndarray]]:
    """Values by grid size and window, then by method, in the order of the methods."""
    found: dict[Panel, dict[str, list[float]]] = {}
    for (n, window, method, _), values in sorted(read_values(path).items()):
        found.setdefault((n, window), {}).setdefault(method, []).extend(values)
    asked = {
        panel: {method: np.array(values[method]) for method in methods if method in values}
        for panel, values in sorted(found.items())
    }
    return {panel: values for panel, values in asked.items() if values}


def table(panels: dict[Panel, dict[str, np.ndarray]]) -> str:
    """Median and quartiles; a row per method, a column per grid size and window."""
    titles = [f"{n}×{n}, {_smoothing(window)}" for n, window in panels]
    lines = ["| method | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for method in dict.fromkeys(method for values in panels.values() for method in values):
        cells = [_quartiles(values[method]) if method in values else "" for values in panels.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _smoothing(window: int) -> str:
    return "raw" if window == 1 else f"smoothed {window}×{window}"


def _quartiles(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f}; {len(values)})"


def box_plots(panels: dict[Panel, dict[str, np.ndarray]], path: Path) -> None:
    """A row per grid size, a column per window, a box per method, and what a uniform map scores."""
    from matplotlib.figure import Figure

    sizes, windows = (sorted(set(values)) for values in zip(*panels, strict=True))
    figure = Figure(figsize=(1 + 4 * len(windows), 3.6 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), len(windows), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for (n, window), values in panels.items():
        ax = axes[sizes.index(n), windows.index(window)]
        ax.set_visible(True)
        ax.boxplot(list(values.values()), tick_labels=list(values), showfliers=False)
        ax.axhline(1 / n**2, color="grey", linestyle="--", linewidth=1)
        ax.set(title=f"{n}×{n}, {_smoothing(window)}", ylabel="share in the cell", ylim=(0, 1))
        ax.tick_params(axis="x", rotation=90)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--n", nargs="+", type=int, default=[2, 3], help="cells per side")
    parser.add_argument("--grids", type=int, default=500)
    parser.add_argument("--threshold", type=float, default=0.5, help="of the confidence, below which no image is taken")
    parser.add_argument("--reuse", action="store_true", help="use images again when a class has no more")
    parser.add_argument("--smooth", nargs="+", type=int, default=[1, 15], help="windows of a mean filter over the map")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=9, help="classes of a grid at a time; less takes less memory")
    parser.add_argument("--out", type=Path, default=Path("localisation"))
    parse_and_run(parser, run)


def run(args: argparse.Namespace) -> None:
    check_methods(args.methods)
    model, dataset = load_network_and_data(args)
    remember_settings(args, args.out, "reuse", "seed", "threshold")
    found = cached_confidences(model, dataset, args.out / "confidences.csv")
    right = sum(item.predicted == item.label for item in found)
    print(f"{right} of {len(found)} images are classified correctly")
    drop_torn_line(args.out / "values.csv")
    sample = partial(sample_grids, found, count=args.grids, threshold=args.threshold, seed=args.seed, reuse=args.reuse)
    for grids in [sample(n) for n in args.n]:  # all of them before the first is played
        for method in args.methods:
            try:
                play(model, dataset, grids, method, args.out / "values.csv", args.smooth, args.batch_size)
            except MethodError as error:
                print(f"left out: {error}")
        report(args.out, args.methods)


def report(out: Path, methods: Iterable[str]) -> None:
    """Write and print the summary of what has been played."""
    panels = summarise(out / "values.csv", methods)
    if not panels:
        raise timm_bcos.InputError("no method suits this model")
    with atomic_path(out / "summary.md") as path:
        path.write_text(table(panels))
    box_plots(panels, out / "boxes.png")
    print(table(panels))


if __name__ == "__main__":
    main()
