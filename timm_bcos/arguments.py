"""What the scripts that look at a network and a data set ask for on the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm

from .errors import BcosError
from .load import load_model, load_plain_model

__all__ = ["add_arguments", "load_network_and_data", "parse_and_run"]


def add_arguments(parser: argparse.ArgumentParser, *, plain: bool = True, classes: bool = False) -> None:
    """Add the options of `load_network_and_data`.

    Args:
        parser: Of the script.
        plain: Offer plain timm models.
        classes: Offer class names.
    """
    parser.add_argument("--model", help="timm's name; not needed for a checkpoint of train.py")
    parser.add_argument("--checkpoint", type=Path)
    if plain:
        parser.add_argument("--plain", action="store_true", help="a plain timm model as it is, not converted")
    parser.add_argument("--dataset", default="", help="kind of data set, as in timm's scripts")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--class-map", default="")
    if classes:
        parser.add_argument("--classes", type=Path, help="class names: a file, or a directory of directories")
    parser.add_argument("--device", default="cpu")


def load_network_and_data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The network, in eval mode on its device, and the data set, as timm makes it.

    Raises:
        BcosError: For a network, checkpoint or weights that cannot be had.
    """
    load = load_plain_model if getattr(args, "plain", False) else load_model
    model = load(args.model, args.checkpoint).eval().to(args.device)
    dataset = timm.data.create_dataset(args.dataset, root=args.data_dir, split=args.split, class_map=args.class_map)
    return model, dataset


def parse_and_run(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Run a script; errors that we raise on purpose are one line, without a traceback."""
    args = parser.parse_args()
    try:
        run(args)
    except BcosError as error:
        raise SystemExit(str(error)) from error
