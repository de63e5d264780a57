"""`timm-bcos run` and `timm-bcos autoload`: scripts of timm's that have no option to import a package."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..failures import as_python_does

__all__ = ["autoload", "run"]


def run(
    script: Annotated[Path, typer.Argument(help="A script of timm's: train.py, validate.py, inference.py, ...")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    explanation_weight: Annotated[
        float | None,
        typer.Option(min=0, help="With train.py --kd-model-name: weight of the loss on the teacher's explanations."),
    ] = None,
    delete_cells: Annotated[
        bool, typer.Option("--delete-cells", help="With train.py: half of the photos lack one of 4 × 4 cells (IDSDS).")
    ] = False,
) -> None:
    """Run a script of timm's, unchanged, with the B-cos networks registered.

    train.py itself has an option for that: `python train.py --device-modules timm_bcos ...`.
    """
    from ..run import run_script

    with as_python_does():
        run_script(script, arguments or [], explanation_weight, delete_cells)


class Switch(str, Enum):
    """What `autoload` does."""

    ON, OFF, STATUS = "on", "off", "status"


def autoload(switch: Annotated[Switch, typer.Argument(help="on, off or status")] = Switch.STATUS) -> None:
    """Make every `import timm` of this Python find the B-cos networks, or no longer."""
    from ..autoload import autoload_file, disable_autoload, enable_autoload

    if switch is Switch.ON:
        enable_autoload()
    elif switch is Switch.OFF:
        disable_autoload()
    state = "on" if autoload_file().exists() else "off"
    typer.echo(f"autoload is {state} ({autoload_file()})")
