"""What the mean over small shifts does to accuracy and to localisation: the clothes network beside its `ShiftAveraged`.

    python scripts/compare_shifts.py data/clothing/test.tar

The grid pointing game is played with the images that the network itself is most confident of, for both alike.
"""

import argparse

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_bcos import ShiftAveraged
from timm_bcos.data.datasets import LabelledImages, load_dataset
from timm_bcos.judging.pointing_game import confidences, localisation, sample_grids


def accuracy(model: nn.Module, dataset: LabelledImages) -> float:
    """Top 1, in percent."""
    found = list(confidences(model, dataset, batch_size=32))
    return 100 * sum(one.label == one.predicted for one in found) / len(found)


def main() -> None:
    """Print both accuracies, the medians of the cells' shares, raw and smoothed, and their paired difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled photos of clothes, as --data-dir takes them")
    parser.add_argument("--size", type=int, default=4, help="of the shifts")
    parser.add_argument("--grids", type=int, default=40, help="of 2 × 2 photos")
    args = parser.parse_args()
    network = timm.create_model("bcos_efficientnet_lite0", pretrained=True).eval()
    models = {"network": network, "mean over shifts": ShiftAveraged(network, args.size).eval()}
    dataset = load_dataset(args.data, network.num_classes)
    grids = sample_grids(list(confidences(network, dataset)), 2, args.grids, reuse=True)
    shares = {}
    for name, model in models.items():
        found = [localisation(model, dataset, grid, smooth=(1, 15)) for grid in tqdm(grids, name, disable=None)]
        shares[name] = torch.stack(found)  # (grids, 2, cells)
        raw, smoothed = shares[name].movedim(1, 0).flatten(1).median(1).values.tolist()
        print(f"{name}: top 1 {accuracy(model, dataset):.1f} %, median share {raw:.3f} raw, {smoothed:.3f} smoothed")
    own, mean = (values.mean(2) for values in shares.values())
    for kind, gain in zip(("raw", "smoothed"), (mean - own).T, strict=True):
        print(f"{kind}: gain per grid {gain.mean():+.3f}, standard error {gain.std() / len(gain) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
