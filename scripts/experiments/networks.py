"""The networks that scripts are told to look at."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from timm_bcos import InputError
from timm_bcos.models.loading import load_model

__all__ = ["find_network", "find_networks"]


def find_network(choice: str) -> nn.Module:
    """The B-cos network that a checkpoint of train.py holds, or timm knows by its name, in evaluation mode."""
    model = load_model(checkpoint=Path(choice)) if Path(choice).exists() else load_model(choice)
    return model.eval()


def find_networks(arguments: Sequence[str]) -> dict[str, nn.Module]:
    """The networks of arguments NAME=CHOICE, by name."""
    return {name: find_network(choice) for name, choice in map(_name_and_choice, arguments)}


def _name_and_choice(argument: str) -> tuple[str, str]:
    """The two sides of NAME=CHOICE.

    Raises:
        InputError: For an argument without "=".
    """
    name, is_given, choice = argument.partition("=")
    if not is_given:
        raise InputError(f"{argument}: give NAME=CHECKPOINT")
    return name, choice
