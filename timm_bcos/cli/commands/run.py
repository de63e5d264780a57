"""`timm-bcos run`: timm's scripts with the B-cos models registered."""

from pathlib import Path
from typing import Annotated

import typer

from ..exceptions import as_python_does

__all__ = ["run"]


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
    from ..script_runner import run_script

    with as_python_does():
        run_script(script, arguments or [], explanation_weight, delete_cells)
