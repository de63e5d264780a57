"""Two networks on the same photos: accuracy by contributor, and intervals for their difference that know of clusters.

    python scripts/paired_comparison.py data/clothing/test.tar --contributors contributors.csv \
        plain=plain-0.pth.tar plain=plain-1.pth.tar bcos=bcos-0.pth.tar bcos=bcos-1.pth.tar
    python scripts/paired_comparison.py data/grocery/test.tar plain=plain-0.pth.tar bcos=bcos-0.pth.tar

Photos of one person resemble each other (floor, light, camera), so that they are no independent draws: intervals come
from a bootstrap over contributors. Where these are not known, photos whose names differ in the number behind the last
underscore alone are taken for one series. Several checkpoints of one name are seeds, whose mean counts for each photo.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from timm_bcos.data.datasets import LabelledImages, load_dataset
from timm_bcos.files import atomic_path
from timm_bcos.judging.intervals import bootstrap_interval
from timm_bcos.judging.pointing_game import confidences
from timm_bcos.models.loading import load_plain_model


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test: of photos that one network alone gets right, half are each's.

    Args:
        first: (N,) whether it is right.
        second: Likewise.
    """
    alone, both = int((first & ~second).sum()), int((first != second).sum())
    return float(binomtest(alone, both).pvalue) if both else 1.0


def contributors(path: Path, names: Sequence[str]) -> list[str]:
    """Who has sent each photo."""
    with path.open(newline="") as file:
        senders = {Path(row["file"]).name: row["contributor"] for row in csv.DictReader(file)}
    return [senders[Path(name).name] for name in names]


def series(names: Sequence[str]) -> list[str]:
    """The file names without their numbers."""
    return [Path(name).stem.rsplit("_", 1)[0] for name in names]


def correct(checkpoint: Path, dataset: LabelledImages) -> np.ndarray:
    """(N,) whether a network, B-cos or plain, is right."""
    model = load_plain_model(checkpoint=checkpoint).eval()
    return np.array([one.label == one.predicted for one in confidences(model, dataset, batch_size=32)])


def write_photos(path: Path, names: Sequence[str], clusters: Sequence[str], right: dict[str, list[np.ndarray]]) -> None:
    """A CSV file with a line for each photo: 1 for each network that is right, else 0."""
    columns = {f"{name}-{seed}": values for name, seeds in right.items() for seed, values in enumerate(seeds)}
    with atomic_path(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "cluster", *columns])
        for i, photo in enumerate(zip(names, clusters, strict=True)):
            writer.writerow([*photo, *(int(values[i]) for values in columns.values())])


def report(right: dict[str, list[np.ndarray]], clusters: Sequence[str], rows: int = 10) -> str:
    """Tables of accuracies and differences, in percent.

    Args:
        right: By name, for each seed (N,) whether the network is right.
        clusters: N names, of whose photos each is one.
        rows: The largest clusters, which are listed.
    """
    means = {name: np.mean(seeds, 0) for name, seeds in right.items()}
    lines = ["| cluster | photos | " + " | ".join(right) + " |", "| --- | ---: |" + " ---: |" * len(right)]
    groups = [name for name, _ in Counter(clusters).most_common(rows)]
    for group in [*groups, "all"]:
        own = np.array([cluster == group or group == "all" for cluster in clusters])
        cells = " | ".join(f"{100 * mean[own].mean():.1f}" for mean in means.values())
        lines.append(f"| {group} | {own.sum()} | {cells} |")
    first, *others = right
    for name in others:
        gain = 100 * (means[name] - means[first])
        low, high = bootstrap_interval(gain, clusters)
        tests = ", ".join(f"{mcnemar(b, a):.2g}" for a, b in zip(right[first], right[name], strict=False))
        seeds = " ".join(f"{100 * seed.mean():.1f}" for seed in right[name])
        lines += [
            "",
            f"{name} (seeds {seeds}) − {first}: {gain.mean():+.1f} points, 95 % interval over {len(set(clusters))} "
            f"clusters {low:+.1f} to {high:+.1f}; McNemar's p by pairs of seeds: {tests}",
        ]
    return "\n".join(lines)


def main() -> None:
    """Compare checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled photos, as --data-dir takes them")
    parser.add_argument(
        "networks", nargs="+", help="NAME=CHECKPOINT of train.py; names that start with 'plain' are plain"
    )
    parser.add_argument("--contributors", type=Path, help="CSV file with the columns file and contributor")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--split", default="test")
    parser.add_argument("--class-map", default="")
    parser.add_argument("--photos", type=Path, metavar="FILE", help="CSV file to write: who is right on which photo")
    args = parser.parse_args()
    dataset: Any = load_dataset(args.data, args.num_classes, split=args.split, class_map=args.class_map)
    names = [dataset.filename(i) for i in range(len(dataset))]
    clusters = contributors(args.contributors, names) if args.contributors else series(names)
    right: dict[str, list[np.ndarray]] = {}
    for network in args.networks:
        name, checkpoint = network.split("=", 1)
        right.setdefault(name, []).append(correct(Path(checkpoint), dataset))
    if args.photos:
        write_photos(args.photos, names, clusters, right)
    print(report(right, clusters))


if __name__ == "__main__":
    main()
