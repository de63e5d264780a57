"""Play the grid pointing game with a model and any number of attribution methods.

    python scripts/localisation.py --checkpoint model_best.pth.tar --data-dir data/clothing --split test --n 2 3
    python scripts/localisation.py --plain --model tf_efficientnet_lite0 --checkpoint lite0.safetensors \
        --data-dir imagenet_photos.tar --class-map imagenet_class_map.txt --methods gradcam ixg

Writes into --out: confidences.csv (made once), values.csv (every value, appended as it comes: an interrupted run
resumes), summary.md and boxes.png.
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import timm_bcos
from timm_bcos import MethodError
from timm_bcos.arguments import add_arguments, load_network_and_data, parse_and_run
from timm_bcos.evaluation import Confidence, Grid, confidences, localisation, sample_grids
from timm_bcos.files import atomic_path
from timm_bcos.render import save_figure

FIELDS = ("n", "method", "grid", "cell", "class", "image", "value")
METHODS = ("bcos", "gradient", "ixg", "ig", "deeplift", "smoothgrad", "guided_backprop", "gradcam", "lrp",
           "attention_rollout", "occlusion", "lime", "rise")  # fmt: skip


def cached_confidences(model: Any, dataset: Any, path: Path) -> list[Confidence]:
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in dataclasses.fields(Confidence)])
            writer.writerows(dataclasses.astuple(item) for item in confidences(model, dataset))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Confidence(int(r["index"]), int(r["label"]), int(r["predicted"]), float(r["confidence"])) for r in rows]


def read_values(path: Path) -> dict[tuple[int, str, int], list[float]]:
    """Values of whole grids, by (n, method, grid); what an interruption cut short is played again."""
    found: dict[tuple[int, str, int], dict[int, float]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():
                    key = (int(row["n"]), row["method"], int(row["grid"]))
                    found.setdefault(key, {})[int(row["cell"])] = float(row["value"])
    return {key: list(cells.values()) for key, cells in found.items() if len(cells) == key[0] ** 2}


def play(model: Any, dataset: Any, grids: Iterable[Grid], method: str, args: argparse.Namespace) -> None:
    """Play the grids that the file of values does not have."""
    path = args.out / "values.csv"
    done = read_values(path)
    for number, grid in enumerate(tqdm(list(grids), f"{method} {args.cells}×{args.cells}")):
        if (grid.n, method, number) in done:
            continue
        values = localisation(model, dataset, grid, method, smooth=args.smooth).tolist()
        rows = zip(range(len(values)), grid.classes, grid.indices, values, strict=True)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([FIELDS] if is_new else [])
            writer.writerows((grid.n, method, number, cell, c, i, f"{v:.6f}") for cell, c, i, v in rows)


def summarise(path: Path, methods: Iterable[str]) -> Iterator[tuple[int, str, np.ndarray]]:
    """(n, method, values), in the order of the methods."""
    by_method: dict[tuple[int, str], list[float]] = {}
    for (n, method, _), values in sorted(read_values(path).items()):
        by_method.setdefault((n, method), []).extend(values)
    for n in sorted({n for n, _ in by_method}):
        for method in methods:
            if (n, method) in by_method:
                yield n, method, np.array(by_method[n, method])


def table(rows: Iterable[tuple[int, str, np.ndarray]]) -> str:
    lines = [
        "| grid | method | lower quartile | median | upper quartile | values |",
        "| --- | --- " + "| ---: " * 4 + "|",
    ]
    for n, method, values in rows:
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        lines.append(f"| {n}×{n} | {method} | {low:.3f} | {middle:.3f} | {high:.3f} | {len(values)} |")
    return "\n".join(lines) + "\n"


def box_plots(rows: list[tuple[int, str, np.ndarray]], path: Path) -> None:
    """A panel per grid size, a box per method, and what a uniform map scores."""
    from matplotlib.figure import Figure

    sizes = sorted({n for n, _, _ in rows})
    figure = Figure(figsize=(1 + 5 * len(sizes), 4), layout="constrained")
    for axes, n in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        shown = [(method, values) for size, method, values in rows if size == n]
        axes.boxplot([values for _, values in shown], tick_labels=[method for method, _ in shown], showfliers=False)
        axes.axhline(1 / n**2, color="grey", linestyle="--", linewidth=1)
        axes.set(title=f"{n}×{n}", ylabel="share of positive attribution in the cell", ylim=(0, 1))
        axes.tick_params(axis="x", rotation=90)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--n", nargs="+", type=int, default=[2, 3], help="cells per side")
    parser.add_argument("--grids", type=int, default=500)
    parser.add_argument("--reuse", action="store_true", help="use images again when a class has no more")
    parser.add_argument("--smooth", type=int, default=1, help="window of a mean filter over the positive attribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("localisation"))
    parse_and_run(parser, run)


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    model, dataset = load_network_and_data(args)
    found = cached_confidences(model, dataset, args.out / "confidences.csv")
    right = sum(item.predicted == item.label for item in found)
    print(f"{right} of {len(found)} images are classified correctly")
    for n in args.n:
        args.cells = n
        grids = sample_grids(found, n, args.grids, seed=args.seed, reuse=args.reuse)
        for method in args.methods:
            try:
                play(model, dataset, grids, method, args)
            except MethodError as error:
                print(f"left out: {error}")
    rows = list(summarise(args.out / "values.csv", args.methods))
    if not rows:
        raise timm_bcos.InputError("no method suits this model")
    with atomic_path(args.out / "summary.md") as path:
        path.write_text(table(rows))
    box_plots(rows, args.out / "boxes.png")
    print(table(rows))


if __name__ == "__main__":
    main()
