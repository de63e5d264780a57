"""Runs a script of timm's, unchanged, where the B-cos networks are registered."""

import runpy
import sys
from pathlib import Path

from .errors import InputError

__all__ = ["run_script"]


def run_script(script: Path, arguments: list[str]) -> None:
    """Run a Python script as `python script arguments...` would, in this process.

    Args:
        script: For instance timm's `train.py`.
        arguments: Its arguments.

    Raises:
        InputError: If there is no such script.
    """
    if not script.is_file():
        raise InputError(f"no script {script}: give the path of one of timm's scripts, which its repository has")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
