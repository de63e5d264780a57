"""Accuracy and alignment of models against their B, as a table and a figure.

    python scripts/experiments/compare_exponents.py data/clothing/test.tar exponents \
        runs/clothes/taught-0/last.pth.tar \
        runs/clothes/taught_b150-0/last.pth.tar runs/clothes/taught_b200-0/last.pth.tar

A model is a checkpoint of timm's train.py or a name of timm's, `local-dir:FOLDER` too. Alignment is the cosine of the
predicted class's row of W(x) and the encoded image. Writes exponents.csv, with intervals of 95 % (Wilson's for
accuracy, by the standard error for alignment), and exponents.png.
"""

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from inputs import data_parser, find_model, load_data
from scipy.stats import binomtest
from torch import nn

from timm_bcos import explain
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import LabeledImages, image_batches
from timm_bcos.explanation.visualization import save_figure
from timm_bcos.files import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """A model's accuracy (percent) and alignment (cosine), with the ends of their intervals."""

    network: str
    b: float
    right: int
    images: int
    top1: float
    top1_low: float
    top1_high: float
    alignment: float
    alignment_low: float
    alignment_high: float


def measure(choice: str, model: nn.Module, dataset: LabeledImages) -> Point:
    """A model on all images."""
    right, cosines = 0, []
    for _, images, labels in image_batches(model, dataset, range(len(dataset)), 16, choice):
        explanation = explain(model, images)
        right += int((explanation.target == labels).sum())
        weights, inputs = explanation.weights.flatten(1), explanation.inputs.flatten(1)
        cosines.append(torch.nn.functional.cosine_similarity(weights, inputs))
    found = torch.cat(cosines)
    mean, error = float(found.mean()), 1.96 * float(found.std()) / len(found) ** 0.5
    interval = binomtest(right, len(found)).proportion_ci(method="wilson")
    shares = (100 * right / len(found), 100 * interval.low, 100 * interval.high)
    return Point(choice, model.bcos_config.b, right, len(found), *shares, mean, mean - error, mean + error)  # type: ignore[union-attr]


def figure(points: Sequence[Point]) -> "Figure":
    """Both against B."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.5), layout="constrained")
    ordered = sorted(points, key=lambda point: point.b)
    for ax, name, label in zip(picture.subplots(1, 2), ("top1", "alignment"), ("top-1 (%)", "alignment"), strict=True):
        values, low, high = ([getattr(point, name + end) for point in ordered] for end in ("", "_low", "_high"))
        ends = [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]
        ax.errorbar([point.b for point in ordered], values, ends, fmt="o-", capsize=3)
        ax.set(xlabel="B", ylabel=label)
    return picture


def run(args: argparse.Namespace) -> None:
    dataset = load_data(args)
    points = []
    for choice in args.networks:
        points.append(measure(choice, find_model(choice), dataset))
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "exponents.csv", [field.name for field in fields(Point)], map(astuple, points))
        save_figure(figure(points), args.out / "exponents.png")
    print((args.out / "exponents.csv").read_text())


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder for the table and the figure")
    parser.add_argument("networks", nargs="+", help="checkpoints of train.py, or names of models with weights")
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
