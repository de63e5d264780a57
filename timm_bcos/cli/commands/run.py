"""`timm-bcos run`: timm's scripts with the B-cos models registered."""

from pathlib import Path
from typing import Annotated

import typer

from ..exceptions import as_python_does

__all__ = ["run"]


def run(
    script: Annotated[Path, typer.Argument(help="Script of timm: train.py, validate.py, inference.py, ...")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    explanation_weight: Annotated[
        float | None,
        typer.Option(
            min=0, help="Weight of the loss on the teacher's explanations, for train.py with --kd-model-name."
        ),
    ] = None,
    delete_cells: Annotated[
        bool,
        typer.Option(
            "--delete-cells", help="Train with one of 4 × 4 cells deleted in half of the images (IDSDS), for train.py."
        ),
    ] = False,
) -> None:
    """Run one of timm's scripts, unchanged, with the B-cos models registered.

    train.py also has an option of its own for this: `python train.py --device-modules timm_bcos ...`.
    """
    from ..script_runner import run_script

    with as_python_does():
        run_script(script, arguments or [], explanation_weight, delete_cells)
