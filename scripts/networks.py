"""The networks that scripts are told to look at."""

from pathlib import Path

from torch import nn

from timm_bcos.models.loading import load_model

__all__ = ["find_network"]


def find_network(choice: str) -> nn.Module:
    """The B-cos network that a checkpoint of train.py holds, or timm knows by its name, in evaluation mode."""
    model = load_model(checkpoint=Path(choice)) if Path(choice).exists() else load_model(choice)
    return model.eval()
