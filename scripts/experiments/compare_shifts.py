"""What the mean over small shifts does to accuracy and to localization: a clothes model beside its `ShiftAveraged`.

    python scripts/experiments/compare_shifts.py data/clothing/test.tar runs/clothes/polished-0/last.pth.tar

A model is a checkpoint of timm's train.py or a name of timm's. Those without anti-aliased downsampling gain most.
"""

import argparse
from functools import partial

from compare_localization import compare
from inputs import find_model

from timm_bcos import ShiftAveraged
from timm_bcos.cli.exceptions import exit_status
from timm_bcos.data.datasets import load_dataset


def run(args: argparse.Namespace) -> None:
    model = find_model(args.network)
    models = {"network": model, "mean over shifts": ShiftAveraged(model, args.size).eval()}
    compare(models, load_dataset(args.data, model.num_classes, split="test"), args.grids)


def main() -> None:
    """Compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labeled photos, as --data-dir takes them")
    parser.add_argument("network", nargs="?", default="bcos_efficientnet_lite0.clothing")
    parser.add_argument("--size", type=int, default=4, help="of the shifts")
    parser.add_argument("--grids", type=int, default=40, help="of 2 × 2 photos")
    raise SystemExit(exit_status(partial(run, parser.parse_args())))


if __name__ == "__main__":
    main()
