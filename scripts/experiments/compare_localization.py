"""Models side by side: accuracy, and the grid pointing game on the same grids of photos, with paired differences.

    python scripts/experiments/compare_localization.py data/clothing/test.tar \
        plain=output/train/plain/last.pth.tar antialiased=output/train/antialiased/last.pth.tar

Grids are made of the photos that the first model is most confident of, for all alike.
"""

import argparse
from functools import partial
from typing import Any

import torch
from inputs import find_models
from torch import nn
from tqdm import tqdm

from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import LabeledImages, load_dataset
from timm_bcos.evaluation.pointing_game import Grid, confidences, localization, sample_grids

WINDOWS = dict(raw=1, smoothed=15)


def compare(models: dict[str, nn.Module], dataset: LabeledImages, count: int) -> list[Grid]:
    """Print accuracies, median shares of the cells, and the gains per grid over the first model.

    Args:
        models: B-cos models by name.
        dataset: Labeled photos.
        count: Grids of 2 × 2.

    Returns:
        The grids.
    """
    found = {name: list(confidences(model, dataset, batch_size=32)) for name, model in models.items()}
    grids = sample_grids(next(iter(found.values())), 2, count, reuse=True)
    shares = {}
    for name, model in models.items():
        right = sum(one.label == one.predicted for one in found[name])
        played = [
            localization(model, dataset, grid, smooth=list(WINDOWS.values()))
            for grid in tqdm(grids, name, disable=None)
        ]
        shares[name] = torch.stack(played)  # (grids, windows, cells)
        medians = shares[name].movedim(1, 0).flatten(1).median(1).values.tolist()
        listed = ", ".join(f"{median:.3f} {kind}" for kind, median in zip(WINDOWS, medians, strict=True))
        print(f"{name}: {right} of {len(found[name])} right, median share {listed}")
    first, *others = shares
    for name in others:
        gains = (shares[name] - shares[first]).mean(2)
        for kind, gain in zip(WINDOWS, gains.T, strict=True):
            error = gain.std() / len(gain) ** 0.5
            print(f"{name} over {first}, {kind}: gain per grid {gain.mean():+.3f}, standard error {error:.3f}")
    return grids


def run(args: argparse.Namespace) -> None:
    models: Any = find_models(args.networks)
    compare(models, load_dataset(args.data, next(iter(models.values())).num_classes, split="test"), args.grids)


def main() -> None:
    """Compare checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labeled photos, as --data-dir takes them")
    parser.add_argument(
        "networks", nargs="+", help="NAME=CHECKPOINT of train.py, or NAME=MODEL; compared with the first"
    )
    parser.add_argument("--grids", type=int, default=40, help="of 2 × 2 photos")
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
