"""Runs a script of timm's, unchanged, where the B-cos networks are registered."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError

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
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        torch.nn.parallel.DistributedDataParallel = _DistributedDataParallel  # type: ignore[assignment,misc]
    runpy.run_path(str(script), run_name="__main__")


class _DistributedDataParallel(DistributedDataParallel):
    """timm's train.py names the CPU as a process's device, which torch refuses: there, no device says the same."""

    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **kwargs: Any) -> None:
        on_cpu = device_ids is not None and all(torch.device(d).type == "cpu" for d in device_ids)
        super().__init__(module, None if on_cpu else device_ids, **kwargs)
