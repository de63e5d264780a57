"""The options that several commands share: which model, which data, which device."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..files import first_line

if TYPE_CHECKING:
    import torch

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
    "ModelToCheck",
    "NetworkChoice",
    "OptionalDataDir",
    "Plain",
    "Split",
    "find_device",
]


def find_device(name: str) -> "torch.device":
    """A device by torch's name.

    Raises:
        InputError: If there is none here.
    """
    import torch

    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # which 'meta' cannot give
    except Exception as error:  # each backend raises its own
        raise InputError(f"no device {name!r} here ({first_line(error)}): choose {', '.join(_devices())}") from error
    return device


def _devices() -> list[str]:
    import torch

    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available())]


MODEL, DATA = "Model", "Data"  # panels of the help

Model = Annotated[
    str | None,
    typer.Option(
        help="Name of a B-cos model, or of a timm model, which is converted to a B-cos model that computes the same. "
        "(default: the model of the checkpoint, or the embedded bcos_efficientnet_lite0.in1k)",
        rich_help_panel=MODEL,
    ),
]
ModelToCheck = Annotated[
    str | None,
    typer.Option(
        help="Name of a B-cos model, or of a timm model, which is converted. (default: the model of the checkpoint, or "
        "the embedded bcos_efficientnet_lite0.in1k)",
        rich_help_panel=MODEL,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="File with weights of the B-cos or the plain model. Checkpoints of train.py name their model themselves.",
        rich_help_panel=MODEL,
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Load a plain timm model without converting it.", rich_help_panel=MODEL)
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="File with a class name per line, or directory with a folder per class.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, mps or xpu.", rich_help_panel=MODEL)]

_DATA_DIR = typer.Option(
    help="Directory with a folder per class, a tar file, or the root of --dataset.", rich_help_panel=DATA
)
DataDir = Annotated[str, _DATA_DIR]
OptionalDataDir = Annotated[str, _DATA_DIR]
Dataset = Annotated[str, typer.Option(help="Type of data set, as in timm's scripts.", rich_help_panel=DATA)]
Split = Annotated[str, typer.Option(help="Split of the data set.", rich_help_panel=DATA)]
ClassMap = Annotated[
    str, typer.Option(help="File with the class names in index order, as in timm's scripts.", rich_help_panel=DATA)
]

Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="Attribution method; repeatable. (default: all that suit the model)"),
]


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
