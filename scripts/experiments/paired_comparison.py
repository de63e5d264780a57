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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from networks import name_and_choice
from scipy.stats import binomtest

from timm_bcos import InputError
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import LabeledImages, load_dataset
from timm_bcos.evaluation.paired import bootstrap_interval
from timm_bcos.evaluation.pointing_game import confidences
from timm_bcos.files import write_csv
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
    """Who has sent each photo.

    Raises:
        InputError: If the file does not say it.
    """
    try:
        with path.open(newline="") as file:
            senders = {Path(row["file"]).name: row["contributor"] for row in csv.DictReader(file)}
        return [senders[Path(name).name] for name in names]
    except (OSError, KeyError) as error:
        raise InputError(
            f"{path} does not say who sent each photo: {error}; give a file with file and contributor"
        ) from error


def series(names: Sequence[str]) -> list[str]:
    """The file names without their numbers."""
    return [Path(name).stem.rsplit("_", 1)[0] for name in names]


def correct(checkpoint: Path, dataset: LabeledImages) -> np.ndarray:
    """(N,) whether a network, B-cos or plain, is right."""
    model = load_plain_model(checkpoint=checkpoint).eval()
    return np.array([one.label == one.predicted for one in confidences(model, dataset, batch_size=32)])


def write_photos(path: Path, names: Sequence[str], clusters: Sequence[str], right: dict[str, list[np.ndarray]]) -> None:
    """A CSV file with a line for each photo: 1 for each network that is right, else 0."""
    columns = {f"{name}-{seed}": values for name, seeds in right.items() for seed, values in enumerate(seeds)}
    photos = enumerate(zip(names, clusters, strict=True))
    rows = ([*photo, *(int(values[i]) for values in columns.values())] for i, photo in photos)
    write_csv(path, ["photo", "cluster", *columns], rows)


@dataclass(frozen=True)
class Comparison:
    """A network's accuracy, and how far it is from the first network's on the same photos.

    Attributes:
        network: Its name.
        seeds: Number of trainings.
        photos: Number of them.
        top1: Mean over the seeds, in percent.
        by_seed: Each seed's, in percent.
        gain: Over the first network, in points; None for itself.
        low: Lower end of the gain's 95 % interval, from a bootstrap over clusters.
        high: Its upper end.
        photos_low: Lower end from a bootstrap over photos, which are taken for independent draws.
        photos_high: Its upper end.
        mcnemar: P-values of McNemar's test, by pairs of seeds.
    """

    network: str
    seeds: int
    photos: int
    top1: float
    by_seed: str
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    photos_low: float | None = None
    photos_high: float | None = None
    mcnemar: str = ""


def compare(right: dict[str, list[np.ndarray]], clusters: Sequence[str]) -> list[Comparison]:
    """Each network with the first one.

    Args:
        right: By name, for each seed (N,) whether the network is right.
        clusters: N names, of whose photos each is one.
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
    """A CSV file with a line for each network; percentages and points have one decimal place."""
    found = [asdict(one) | dict(top1=f"{one.top1:.1f}") for one in comparisons]
    rows = ([f"{value:+.1f}" if isinstance(value, float) else value for value in row.values()] for row in found)
    write_csv(path, [field.name for field in fields(Comparison)], rows)


def accuracies(
    right: dict[str, list[np.ndarray]], clusters: Sequence[str], rows: int = 10
) -> Iterator[tuple[str, int, dict[str, str]]]:
    """The largest clusters and "all", the number of their photos, and each network's mean accuracy in percent.

    Args:
        right: As in `compare`.
        clusters: As there.
        rows: How many clusters.
    """
    means = {name: 100 * np.mean(seeds, 0) for name, seeds in right.items()}
    for group in [*(name for name, _ in Counter(clusters).most_common(rows)), "all"]:
        own = np.array([cluster == group or group == "all" for cluster in clusters])
        yield group, int(own.sum()), {name: f"{mean[own].mean():.1f}" for name, mean in means.items()}


def write_clusters(path: Path, right: dict[str, list[np.ndarray]], clusters: Sequence[str]) -> None:
    """A CSV file with a line for each cluster and network."""
    rows = (
        (cluster, photos, network, top1)
        for cluster, photos, found in accuracies(right, clusters)
        for network, top1 in found.items()
    )
    write_csv(path, ["cluster", "photos", "network", "top1"], rows)


def report(right: dict[str, list[np.ndarray]], clusters: Sequence[str], rows: int = 10) -> str:
    """Tables of accuracies and differences, in percent; arguments as in `accuracies`."""
    lines = ["| cluster | photos | " + " | ".join(right) + " |", "| --- | ---: |" + " ---: |" * len(right)]
    for cluster, photos, found in accuracies(right, clusters, rows):
        lines.append(f"| {cluster} | {photos} | {' | '.join(found.values())} |")
    first, *others = compare(right, clusters)
    for one in others:
        lines += [
            "",
            f"{one.network} (seeds {one.by_seed}) − {first.network}: {one.gain:+.1f} points, 95 % interval over "
            f"{len(set(clusters))} clusters {one.low:+.1f} to {one.high:+.1f}, over photos {one.photos_low:+.1f} to "
            f"{one.photos_high:+.1f}; McNemar's p by pairs of seeds: {one.mcnemar}",
        ]
    return "\n".join(lines)


def checkpoints(choices: Sequence[str]) -> dict[str, list[Path]]:
    """The checkpoints of each name, its seeds."""
    found: dict[str, list[Path]] = {}
    for choice in choices:
        name, path = name_and_choice(choice)
        found.setdefault(name, []).append(Path(path))
    return found


def run(args: argparse.Namespace) -> None:
    dataset: Any = load_dataset(args.data, args.num_classes, split=args.split, class_map=args.class_map)
    names = [dataset.filename(i) for i in range(len(dataset))]
    clusters = contributors(args.contributors, names) if args.contributors else series(names)
    right = {name: [correct(path, dataset) for path in paths] for name, paths in checkpoints(args.networks).items()}
    if args.photos:
        write_photos(args.photos, names, clusters, right)
    if args.table:
        write_table(args.table, compare(right, clusters))
    if args.clusters:
        write_clusters(args.clusters, right, clusters)
    print(report(right, clusters))


def main() -> None:
    """Compare checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labeled photos, as --data-dir takes them")
    parser.add_argument("networks", nargs="+", help="NAME=CHECKPOINT of train.py, plain ones first")
    parser.add_argument("--contributors", type=Path, help="CSV file with the columns file and contributor")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--split", default="test")
    parser.add_argument("--class-map", default="")
    parser.add_argument("--photos", type=Path, metavar="FILE", help="CSV file to write: who is right on which photo")
    parser.add_argument("--table", type=Path, metavar="FILE", help="CSV file to write: accuracies and differences")
    parser.add_argument("--clusters", type=Path, metavar="FILE", help="CSV file to write: accuracies by cluster")
    raise SystemExit(exit_status(partial(run, parser.parse_intermixed_args())))


if __name__ == "__main__":
    main()
