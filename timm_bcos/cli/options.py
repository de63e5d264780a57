"""The options that several commands share: one way to say which network, which data, and where to compute."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Checkpoint",
    "ClassMap",
    "Classes",
    "DataDir",
    "Dataset",
    "Device",
    "Disconnect",
    "Methods",
    "Model",
    "Plain",
    "Split",
]

NETWORK, DATA = "Network", "Data"  # panels of the help

Model = Annotated[
    str | None,
    typer.Option(
        help="Name of a B-cos model, or of a timm model, which is converted to one that computes the same. Without a "
        "model and a checkpoint: bcos_efficientnet_lite0.in1k, whose weights come with the package.",
        rich_help_panel=NETWORK,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights, of the B-cos network or of the plain one; a checkpoint of train.py says which model it is of.",
        rich_help_panel=NETWORK,
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="A plain timm model as it is, not converted.", rich_help_panel=NETWORK)
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="Class names, one a line, or a directory of a directory per class.",
        rich_help_panel=NETWORK,
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps, xpu.", rich_help_panel=NETWORK)]

DataDir = Annotated[
    str, typer.Option(help="Images in a directory per class, or what --dataset reads.", rich_help_panel=DATA)
]
Dataset = Annotated[str, typer.Option(help="Kind of data set, as in timm's scripts.", rich_help_panel=DATA)]
Split = Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=DATA)]
ClassMap = Annotated[str, typer.Option(help="File of the class names, as in timm's scripts.", rich_help_panel=DATA)]

Methods = Annotated[list[str] | None, typer.Option("--method", help="Attribution method; repeat for several.")]


class Disconnect(str, Enum):
    """How cells of a grid are kept apart."""

    NONE, FULL, PART = "none", "full", "part"
