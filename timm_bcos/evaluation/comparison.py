"""Paired comparison of models on the same labeled images: accuracies and bootstrap intervals of their differences.

Images of one contributor resemble each other, so they are not independent: the bootstrap resamples whole clusters.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution.registry import AttributionModel
from ..data.datasets import LabeledImages
from ..errors import InputError
from ..files import write_csv
from .paired import bootstrap_interval
from .pointing_game import confidences

__all__ = [
    "Agreement",
    "Comparison",
    "accuracies",
    "agreement",
    "compare",
    "contributors",
    "correct",
    "mcnemar",
    "report",
    "series",
    "write_clusters",
    "write_images",
    "write_table",
]

Correct = Mapping[str, Sequence[np.ndarray]]  # by model: for each seed, (N,) whether it is right


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test.

    Args:
        first: (N,) whether the first model is right.
        second: (N,) whether the second model is right.
    """
    alone, differing = int((first & ~second).sum()), int((first != second).sum())
    tail = sum(math.comb(differing, k) for k in range(min(alone, differing - alone) + 1))
    return min(1.0, 2 * tail / 2**differing)


def contributors(path: Path, names: Sequence[str]) -> list[str]:
    """The contributor of each image.

    Raises:
        InputError: If the file lists no contributor for an image.
    """
    try:
        with path.open(newline="") as file:
            senders = {Path(row["file"]).name: row["contributor"] for row in csv.DictReader(file)}
        return [senders[Path(name).name] for name in names]
    except (OSError, KeyError) as error:
        raise InputError(
            f"{path} lists no contributor for {error}: give a CSV file with the columns file and contributor"
        ) from error


def series(names: Sequence[str]) -> list[str]:
    """The file names without the number behind the last underscore: a cluster for each series of images."""
    return [Path(name).stem.rsplit("_", 1)[0] for name in names]


def correct(model: nn.Module, dataset: LabeledImages) -> np.ndarray:
    """(N,) whether a B-cos or plain model classifies each image correctly."""
    return np.array([one.label == one.predicted for one in confidences(model, dataset)])


def write_images(path: Path, names: Sequence[str], clusters: Sequence[str], right: Correct) -> None:
    """Write a CSV file with a row per image: 1 for each model that is right, else 0."""
    columns = {f"{name}-{seed}": values for name, seeds in right.items() for seed, values in enumerate(seeds)}
    images = enumerate(zip(names, clusters, strict=True))
    rows = ([*image, *(int(values[i]) for values in columns.values())] for i, image in images)
    write_csv(path, ["image", "cluster", *columns], rows)


@dataclass(frozen=True)
class Agreement:
    """Agreement of two models on the same images.

    Attributes:
        images: Number of images.
        same: Number of images with the same prediction.
        difference: Largest difference of logits of an image, relative to the second model's largest absolute logit.
        first_right: Number of images that the first model classifies correctly.
        second_right: Number of images that the second model classifies correctly.
    """

    images: int
    same: int
    difference: float
    first_right: int
    second_right: int


@torch.no_grad()
def agreement(first: nn.Module, second: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Compare the logits of two models, for instance of a conversion and its original.

    Args:
        first: A B-cos or plain model in eval mode.
        second: A model of the same classes, on the same device.
        batches: Images (N, C, H, W) in [0, 1] on the device, and labels (N,).

    Raises:
        InputError: If there are no images, or if the models have different numbers of classes.
    """
    readers, logits, labels = (AttributionModel(first), AttributionModel(second)), [], []
    for x, y in batches:
        logits.append([reader(reader.prepare(x)).flatten(1).cpu() for reader in readers])
        labels.append(y)
    if not labels:
        raise InputError("no images to compare the models on")
    (a, b), truth = (torch.cat(parts) for parts in zip(*logits, strict=True)), torch.cat(labels)
    if a.shape != b.shape:
        raise InputError(f"the models have {a.shape[1]} and {b.shape[1]} classes: compare models of the same classes")
    predicted, expected = a.argmax(1), b.argmax(1)
    scale = b.abs().amax(1).clamp_min(torch.finfo(b.dtype).tiny)
    return Agreement(
        images=len(truth),
        same=int((predicted == expected).sum()),
        difference=float(((a - b).abs().amax(1) / scale).max()),
        first_right=int((predicted == truth).sum()),
        second_right=int((expected == truth).sum()),
    )


@dataclass(frozen=True)
class Comparison:
    """A model's accuracy and its difference to the first model's on the same images.

    Attributes:
        model: Name of the model.
        seeds: Number of trainings.
        images: Number of images.
        top1: Mean over the seeds, in percent.
        by_seed: Each seed's, in percent.
        gain: Difference to the first model in percentage points; None for the first model.
        low: Lower end of the gain's 95 % interval, from a bootstrap over clusters.
        high: Its upper end.
        images_low: Lower end from a bootstrap over single images, as if they were independent.
        images_high: Its upper end.
        mcnemar: P-values of McNemar's test, by pairs of seeds.
    """

    model: str
    seeds: int
    images: int
    top1: float
    by_seed: str
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    images_low: float | None = None
    images_high: float | None = None
    mcnemar: str = ""


def compare(right: Correct, clusters: Sequence[str]) -> list[Comparison]:
    """Compare each model with the first one.

    Args:
        right: For each model and seed, (N,) whether it is right.
        clusters: The cluster of each image.
    """
    means = {name: 100 * np.mean(seeds, 0) for name, seeds in right.items()}
    first = next(iter(right))
    found = []
    for name, seeds in right.items():
        by_seed = " ".join(f"{100 * seed.mean():.1f}" for seed in seeds)
        own = (name, len(seeds), len(clusters), float(means[name].mean()), by_seed)
        if name == first:
            found.append(Comparison(*own))
            continue
        gain = means[name] - means[first]
        tests = " ".join(f"{mcnemar(b, a):.2g}" for a, b in zip(right[first], seeds, strict=False))
        intervals = (*bootstrap_interval(gain, clusters), *bootstrap_interval(gain))
        found.append(Comparison(*own, float(gain.mean()), *intervals, tests))
    return found


def write_table(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a CSV file with a row per model; percentages have one decimal place."""
    found = [asdict(one) | dict(top1=f"{one.top1:.1f}") for one in comparisons]
    rows = ([f"{value:+.1f}" if isinstance(value, float) else value for value in row.values()] for row in found)
    write_csv(path, [field.name for field in fields(Comparison)], rows)


def accuracies(right: Correct, clusters: Sequence[str], rows: int = 10) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Accuracy by cluster: name and size of the largest clusters and "all", with each model's accuracy in percent.

    Args:
        right: For each model and seed, (N,) whether it is right.
        clusters: The cluster of each image.
        rows: Number of clusters.
    """
    means = {name: 100 * np.mean(seeds, 0) for name, seeds in right.items()}
    for group in [*(name for name, _ in Counter(clusters).most_common(rows)), "all"]:
        own = np.array([cluster == group or group == "all" for cluster in clusters])
        yield group, int(own.sum()), {name: f"{mean[own].mean():.1f}" for name, mean in means.items()}


def write_clusters(path: Path, right: Correct, clusters: Sequence[str]) -> None:
    """Write a CSV file with a row per cluster and model."""
    rows = (
        (cluster, images, model, top1)
        for cluster, images, found in accuracies(right, clusters)
        for model, top1 in found.items()
    )
    write_csv(path, ["cluster", "images", "model", "top1"], rows)


def report(right: Correct, clusters: Sequence[str], rows: int = 10) -> str:
    """Tables of accuracies and differences, in percent; arguments as in `accuracies`."""
    lines = ["| cluster | images | " + " | ".join(right) + " |", "| --- | ---: |" + " ---: |" * len(right)]
    for cluster, images, found in accuracies(right, clusters, rows):
        lines.append(f"| {cluster} | {images} | {' | '.join(found.values())} |")
    first, *others = compare(right, clusters)
    for one in others:
        lines += [
            "",
            f"{one.model} (seeds {one.by_seed}) − {first.model}: {one.gain:+.1f} points, 95 % interval over "
            f"{len(set(clusters))} clusters {one.low:+.1f} to {one.high:+.1f}, over images {one.images_low:+.1f} to "
            f"{one.images_high:+.1f}; McNemar's p by pairs of seeds: {one.mcnemar}",
        ]
    return "\n".join(lines)
