"""The models and the data set that a script is given on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from timm_bcos import InputError
from timm_bcos.data.datasets import LabeledImages, load_dataset
from timm_bcos.models.loading import load_model

__all__ = ["data_parser", "find_model", "find_models", "load_data"]


def data_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments that `load_data` needs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labeled photos, as for --data-dir")
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--split", default="test")
    parser.add_argument("--class-map", default="")
    return parser


def load_data(args: argparse.Namespace) -> LabeledImages:
    """Load the data set of parsed arguments."""
    return load_dataset(args.data, args.num_classes, split=args.split, class_map=args.class_map)


def find_model(choice: str) -> nn.Module:
    """Load the B-cos model of a checkpoint of train.py, or of a timm name, in eval mode."""
    model = load_model(checkpoint=Path(choice)) if Path(choice).exists() else load_model(choice)
    return model.eval()


def find_models(arguments: Sequence[str]) -> dict[str, nn.Module]:
    """Load the models of arguments NAME=CHOICE, by name."""
    return {name: find_model(choice) for name, choice in map(_name_and_choice, arguments)}


def _name_and_choice(argument: str) -> tuple[str, str]:
    """The two sides of NAME=CHOICE.

    Raises:
        InputError: If there is no "=".
    """
    name, is_given, choice = argument.partition("=")
    if not is_given:
        raise InputError(f"{argument}: give NAME=CHECKPOINT")
    return name, choice
