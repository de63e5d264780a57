"""The options that several commands share, each declared once.

A command takes a group of options as one argument, a dataclass such as `ModelOptions`; `expand_groups` makes each field
an option of the command line.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.devices import find_device

if TYPE_CHECKING:
    from ..data.datasets import LabeledImages

__all__ = [
    "MODEL_PANEL",
    "AnyModelOptions",
    "Checkpoint",
    "Classes",
    "DataOptions",
    "Device",
    "DisconnectMode",
    "DisconnectOption",
    "Layer",
    "Methods",
    "ModelOptions",
    "OptionalDataOptions",
    "Reuse",
    "Seed",
    "chosen_methods",
    "expand_groups",
    "find_device",
    "method_option",
]

MODEL_PANEL, DATA_PANEL = "Model", "Data"  # panels of the help

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="File with weights of the B-cos or the plain model. Checkpoints of train.py name their model themselves.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="Class names: a text file with one per line, or a directory with one folder per class. "
        "(default: those of the weights)",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, mps or xpu.", rich_help_panel=MODEL_PANEL)]
Layer = Annotated[
    str, typer.Option(help="Path of a layer whose output is a feature map or tokens, for instance blocks.4.")
]


def method_option(default: str) -> Any:
    """The option --method.

    Args:
        default: Description of the methods that are used without the option.
    """
    return typer.Option(
        "--method",
        help="Attribution method; repeatable. input_x_gradient and integrated_gradients have the aliases ixg and ig. "
        f"(default: {default})",
    )


def chosen_methods(given: Sequence[str] | None, default: Iterable[str]) -> list[str]:
    """The methods of a command: those of --method, or the default ones that are installed; others cause a warning."""
    from ..attribution.registry import available_methods

    methods, left_out = available_methods(given, default)
    for reason in left_out:
        typer.echo(f"warning: left out {reason}", err=True)
    return methods


Methods = Annotated[list[str] | None, method_option("all that support the model")]
Reuse = Annotated[bool, typer.Option("--reuse", help="Reuse images when a class has too few.")]
Seed = Annotated[int, typer.Option(help="Random seed for sampling classes.")]
DataDir = Annotated[
    str,
    typer.Option(
        help="Directory with one folder per class, a tar file, or the root of --dataset.", rich_help_panel=DATA_PANEL
    ),
]


class DisconnectMode(str, Enum):
    """How the cells of a grid are kept separate."""

    NONE, FULL, PART = "none", "full", "part"


DisconnectOption = Annotated[
    DisconnectMode,
    typer.Option(
        help="Compute each cell's logits separately: by the whole model (full, DiFull) or the head (part, DiPart)."
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """The model to load; None for the embedded one."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a B-cos model, or of a timm model, which is converted. "
            "(default: the model of the checkpoint, or the embedded bcos_efficientnet_lite0.in1k)",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    checkpoint: Checkpoint = None

    def load(self, device: str = "cpu") -> Any:
        """Load the model in eval mode on a device.

        Raises:
            BcosError: If the model, its weights or the device are not available.
        """
        from ..models.loading import load_model

        return _load(load_model, self, device)


@dataclass(frozen=True)
class AnyModelOptions(ModelOptions):
    """The model to load, with or without conversion."""

    plain: Annotated[
        bool,
        typer.Option("--plain", help="Load a plain timm model without converting it.", rich_help_panel=MODEL_PANEL),
    ] = False

    def load(self, device: str = "cpu") -> Any:
        """Load the model as `ModelOptions.load` does, or a plain timm model."""
        from ..models.loading import load_plain_model

        return _load(load_plain_model, self, device) if self.plain else super().load(device)


@dataclass(frozen=True)
class DataOptions:
    """Labeled images, named as in timm's scripts."""

    data_dir: DataDir
    dataset: Annotated[
        str,
        typer.Option(
            help="Type of data set, as in timm's scripts: hfds/NAME for Hugging Face's datasets, torch/cifar10, ... "
            "(default: a folder per class)",
            rich_help_panel=DATA_PANEL,
        ),
    ] = ""
    split: Annotated[str, typer.Option(help="Split of the data set.", rich_help_panel=DATA_PANEL)] = "validation"
    class_map: Annotated[
        str,
        typer.Option(
            help="File with the class names in index order, as in timm's scripts.", rich_help_panel=DATA_PANEL
        ),
    ] = ""
    input_key: Annotated[
        str,
        typer.Option(help="Column of the images in an hfds/ data set. (default: image)", rich_help_panel=DATA_PANEL),
    ] = ""
    target_key: Annotated[
        str,
        typer.Option(help="Column of the classes in an hfds/ data set. (default: label)", rich_help_panel=DATA_PANEL),
    ] = ""

    def load(self, num_classes: int) -> "LabeledImages":
        """Load the data set.

        Raises:
            InputError: If the data set cannot be read, or has images of another number of classes.
        """
        from ..data.datasets import load_dataset

        return load_dataset(
            self.data_dir, num_classes, kind=self.dataset, split=self.split, class_map=self.class_map,
            input_key=self.input_key, target_key=self.target_key,
        )  # fmt: skip


@dataclass(frozen=True)
class OptionalDataOptions(DataOptions):
    """Labeled images, or none."""

    data_dir: DataDir = ""


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each argument whose type is a dataclass by the dataclass's fields.

    Args:
        command: Function whose arguments are options, arguments or groups of options.

    Returns:
        A function for typer, which builds the dataclasses and calls the command with them.
    """
    declared = inspect.signature(command, eval_str=True).parameters
    groups = {name: _parameters_of(p.annotation) for name, p in declared.items() if is_dataclass(p.annotation)}

    @functools.wraps(command)
    def call(**given: Any) -> None:
        built = {
            name: declared[name].annotation(**{option.name: given.pop(option.name) for option in options})
            for name, options in groups.items()
        }
        command(**given, **built)

    flat = [option for name, parameter in declared.items() for option in groups.get(name, [parameter])]
    keywords = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in flat]
    call.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in keywords}
    return call


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(group, eval_str=True).parameters.values())


def _load(load: Callable[..., Any], options: ModelOptions, device: str) -> Any:
    found = find_device(device)  # first, so that a wrong name fails before a download
    return load(options.model, options.checkpoint).eval().to(found)
