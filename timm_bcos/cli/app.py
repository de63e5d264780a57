"""The command `timm-bcos`: a table of its commands.

No module that this one imports may import torch or timm, which takes seconds: commands import them when they run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import typer

from .. import __version__
from .commands.check_model import check
from .commands.concepts import concepts
from .commands.convert_model import convert
from .commands.demo import demo
from .commands.evaluate import aggatt, compare, metrics, pointing_game
from .commands.explain_photos import explain
from .commands.export_model import export
from .commands.gallery import of_classes, of_methods
from .commands.models import models
from .commands.neurons import neurons
from .commands.probe import probe
from .commands.publish_model import publish
from .commands.run import run
from .processes import in_one_process, in_shared_processes, print_in_all, print_in_first

__all__ = ["app", "start"]

SUMMARY = "B-cos models for timm, with exact explanations."


@dataclass(frozen=True)
class Command:
    """A command, or a group of commands.

    Attributes:
        function: Function that runs the command.
        example: Arguments of an example call.
        processes: What torchrun's processes do: `in_shared_processes`, `in_one_process` or `print_in_all`.
        name: Name of the command, if it is not the function's.
        settings: Click's context settings.
    """

    function: Callable[..., None]
    example: str
    processes: Callable[[Callable[..., None]], Callable[..., None]] = in_one_process
    name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


COMMANDS = (
    Command(explain, "explain photo.jpg --model bcosv2_resnet50 --top 2 --out explanations", in_shared_processes),
    Command(check, "check --model starnet_s1"),
    Command(convert, "convert --model resnet50 --b 2 --out converted"),
    Command(probe, "probe photos --out mine", in_shared_processes),
    Command(models, "models 'bcosv2_*' --pretrained"),
    Command(neurons, "neurons --layer blocks.4 --data-dir photos --split test --out neurons", in_shared_processes),
    Command(
        concepts,
        "concepts photo.jpg --layer blocks.4 --data-dir photos --split test --method nmf --count 6",
        in_shared_processes,
    ),
    Command(publish, "publish ORG/NAME --checkpoint model_best.pth.tar --classes photos/train --photo cat.jpg --space"),
    Command(export, "export --model bcos_cifar_resnet20 --out cifar.pt2"),
    Command(demo, "demo --model bcosv2_resnet50 --port 8080"),
    Command(
        run,
        "run validate.py --model bcos_densenet121 --data-dir imagenet",
        print_in_all,
        settings=dict(allow_interspersed_args=False, ignore_unknown_options=True),
    ),
)
GROUPS = {
    ("evaluate", "Evaluate attribution methods and models on labeled images."): (
        Command(
            pointing_game,
            "evaluate pointing-game --data-dir photos --split test --method bcos --method gradcam --cells 2 --grids 50",
            in_shared_processes,
        ),
        Command(
            metrics,
            "evaluate metrics --data-dir photos --split test --metric deletion --images 20",
            in_shared_processes,
        ),
        Command(
            aggatt,
            "evaluate aggatt --data-dir photos --split test --method bcos --method gradcam",
            in_shared_processes,
        ),
        Command(
            compare,
            "evaluate compare plain.pth.tar bcos.pth.tar --data-dir photos --split test",
            in_shared_processes,
        ),
    ),
    ("gallery", "Plot explanations of many images in one figure."): (
        Command(
            of_classes,
            "gallery classes --data-dir photos --split test --show hat --out classes.png",
            in_shared_processes,
            "classes",
        ),
        Command(
            of_methods,
            "gallery methods --data-dir photos --split test --method bcos --method lrp",
            in_shared_processes,
            "methods",
        ),
    ),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"timm-bcos {__version__}, timm {version('timm')}, torch {version('torch')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _group(summary: str, commands: tuple[Command, ...]) -> typer.Typer:
    group = typer.Typer(help=summary, no_args_is_help=True, pretty_exceptions_enable=False)
    for command in commands:
        epilog = f"Example: timm-bcos {command.example}"
        group.command(command.name, epilog=epilog, context_settings=command.settings)(
            command.processes(command.function)
        )
    return group


app = _group(SUMMARY, COMMANDS)
app.callback()(_options)
for (name, summary), commands in GROUPS.items():
    app.add_typer(_group(summary, commands), name=name)


def start(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Of several processes, only process 0 prints.

    Args:
        arguments: Arguments; None for those of the process.
    """
    with print_in_first():
        app(arguments)
