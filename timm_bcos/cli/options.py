"""The options that several commands share: one way to say which network, which data, and where to compute."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..errors import InputError
from ..files import first_line

if TYPE_CHECKING:
    from ..data.datasets import LabeledImages

__all__ = [
    "Checkpoint",
    "ClassMap",
    "Classes",
    "DataChoice",
    "DataDir",
    "Dataset",
    "Device",
    "Disconnect",
    "Methods",
    "Model",
    "NetworkChoice",
    "Plain",
    "Split",
    "find_device",
]


def find_device(name: str) -> torch.device:
    """A device by torch's name.

    Raises:
        InputError: If there is none here.
    """
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # which 'meta' cannot give
    except Exception as error:  # each backend raises its own
        raise InputError(f"no device {name!r} here ({first_line(error)}): choose {', '.join(_devices())}") from error
    return device


def _devices() -> list[str]:
    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available())]


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


@dataclass(frozen=True)
class NetworkChoice:
    """Which network.

    Attributes:
        model: timm's name; None for the one of the checkpoint, or the one that comes with the package.
        checkpoint: Weights.
        plain: Take a plain timm model as it is.
    """

    model: str | None = None
    checkpoint: Path | None = None
    plain: bool = False

    def load(self, device: str = "cpu") -> Any:
        """The network in eval mode on its device.

        Raises:
            BcosError: For a network, checkpoint, weights or device that cannot be had.
        """
        from ..models.loading import load_model, load_plain_model

        place = find_device(device)
        load = load_plain_model if self.plain else load_model
        return load(self.model, self.checkpoint).eval().to(place)


@dataclass(frozen=True)
class DataChoice:
    """Which labeled images, as timm's scripts say it."""

    data_dir: str
    dataset: str = ""
    split: str = "validation"
    class_map: str = ""

    def load(self, num_classes: int) -> "LabeledImages":
        """The data set.

        Raises:
            InputError: For a data set that cannot be had, or with images of another number of classes.
        """
        from ..data.datasets import load_dataset

        return load_dataset(self.data_dir, num_classes, kind=self.dataset, split=self.split, class_map=self.class_map)
