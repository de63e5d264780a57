"""Explanations of many images on one picture.

    python scripts/gallery.py classes --checkpoint model_best.pth.tar --data-dir data/clothing --split test
    python scripts/gallery.py methods --checkpoint model_best.pth.tar --data-dir data/clothing --split test

`classes` shows the images of each class that the network is most confident of, with their explanations in colour;
`methods` one image per class, explained by every attribution method that suits the network.
"""

import argparse
from pathlib import Path

import torch

from timm_bcos.attribution.registry import METHODS
from timm_bcos.cli.arguments import add_arguments, load_network_and_data, parse_and_run
from timm_bcos.data.datasets import image_loader
from timm_bcos.explaining.figures import save_figure
from timm_bcos.judging.galleries import most_confident, plot_classes, plot_methods
from timm_bcos.judging.pointing_game import confidences
from timm_bcos.models.classes import class_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, classes=True)
    parser.add_argument("kind", choices=("classes", "methods"))
    parser.add_argument("--show", nargs="+", metavar="CLASS", type=int, help="indices; the first six by default")
    parser.add_argument("--images", type=int, default=6, help="per class, for `classes`")
    parser.add_argument("--methods", nargs="+", metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    parse_and_run(parser, run)


def run(args: argparse.Namespace) -> None:
    model, dataset = load_network_and_data(args)
    names, load = class_names(model, args.classes), image_loader(model, dataset)
    shown = args.show or range(min(6, len(names)))
    chosen = most_confident(list(confidences(model, dataset)), args.images if args.kind == "classes" else 1, shown)
    x = torch.stack([load(item.index)[0] for item in chosen]).to(args.device)
    targets = [item.label for item in chosen]
    if args.kind == "classes":
        save_figure(plot_classes(model, x, targets, names), args.out)
    else:
        save_figure(plot_methods(model, x, targets, args.methods or list(METHODS), names), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
