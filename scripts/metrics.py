"""Deletion, insertion, faithfulness, sensitivity and randomisation of attribution methods: one table per model.

    python scripts/metrics.py --checkpoint model_best.pth.tar --data-dir data/clothing --split test --images 20

Writes --out/metrics.csv (every value, appended as it comes: an interrupted run resumes) and --out/metrics.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from timm_bcos import MethodError
from timm_bcos.attribution.registry import check_counts, check_methods
from timm_bcos.cli.arguments import add_arguments, load_network_and_data, parse_and_run, remember_settings
from timm_bcos.cli.results import append_rows, drop_torn_line, read_rows
from timm_bcos.data.datasets import image_loader
from timm_bcos.files import atomic_path
from timm_bcos.judging.metrics import METRICS, evaluate

METHODS = ("bcos", "gradient", "ixg", "ig", "deeplift", "smoothgrad", "guided_backprop", "gradcam", "lrp")
FIELDS = dict(metric=str, method=str, image=int, value=float)
Values = dict[tuple[str, str], list[float]]


def read(path: Path, images: int) -> Values:
    """Values by metric and method, where all images have one."""
    found: Values = {}
    for row in read_rows(path, FIELDS):
        found.setdefault((row["metric"], row["method"]), []).append(row["value"])
    return {key: values[-images:] for key, values in found.items() if len(values) >= images}


def table(values: Values, methods: list[str], metrics: list[str]) -> str:
    """Means and standard deviations."""
    lines = ["| method | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
    for method in methods:
        found = [values.get((metric, method)) for metric in metrics]
        if any(found):
            cells = [f"{np.nanmean(v):.3f} ± {np.nanstd(v):.3f}" if v else "" for v in found]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=20, help="evenly spread over the data set")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--out", type=Path, default=Path("metrics"))
    parse_and_run(parser, run)


def run(args: argparse.Namespace) -> None:
    check_methods(args.methods)
    check_counts(images=args.images)
    path = args.out / "metrics.csv"
    model, dataset = load_network_and_data(args)
    remember_settings(args, args.out, "images")
    indices = np.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).round().astype(int).tolist()
    images, labels = zip(*map(image_loader(model, dataset), indices), strict=True)
    x, targets = torch.stack(images).to(args.device), torch.tensor(labels, device=args.device)
    pairs = [(metric, method) for metric in args.metrics for method in args.methods]
    drop_torn_line(path)
    done = read(path, len(indices))
    for metric, method in tqdm(pairs, "metrics", disable=None):
        if (metric, method) in done:
            continue
        try:
            values = evaluate(model, x, targets, metric, method).tolist()
        except MethodError as error:
            tqdm.write(f"left out: {error}")
            continue
        rows = ((metric, method, i, f"{v:.6g}") for i, v in zip(indices, values, strict=True))
        append_rows(path, list(FIELDS), rows)
    text = table(read(path, len(indices)), args.methods, args.metrics)
    with atomic_path(args.out / "metrics.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
