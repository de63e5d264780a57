"""What the mean over small shifts does to accuracy and to localisation: the clothes network beside its `ShiftAveraged`.

python scripts/compare_shifts.py data/clothing/test.tar
"""

import argparse

import timm
from compare_localisation import compare

from timm_bcos import ShiftAveraged
from timm_bcos.data.datasets import load_dataset


def main() -> None:
    """Compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled photos of clothes, as --data-dir takes them")
    parser.add_argument("--size", type=int, default=4, help="of the shifts")
    parser.add_argument("--grids", type=int, default=40, help="of 2 × 2 photos")
    args = parser.parse_args()
    network = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    models = {"network": network, "mean over shifts": ShiftAveraged(network, args.size).eval()}
    compare(models, load_dataset(args.data, network.num_classes, split="test"), args.grids)


if __name__ == "__main__":
    main()
