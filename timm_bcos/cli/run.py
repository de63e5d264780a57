"""Runs a script of timm's, unchanged, where the B-cos networks are registered."""

import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm.task
import torch
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..training.tasks import DeletionClassificationTask, ExplanationDistillationTask

__all__ = ["run_script"]


def run_script(
    script: Path, arguments: list[str], explanation_weight: float | None = None, delete_cells: bool = False
) -> None:
    """Run a Python script as `python script arguments...` would, in this process.

    Args:
        script: For instance timm's `train.py`.
        arguments: Its arguments.
        explanation_weight: Of `ExplanationDistillationTask`, which takes the place of timm's distillation of logits;
            None leaves that as it is.
        delete_cells: Let `DeletionClassificationTask` take the place of timm's classification.

    Raises:
        InputError: If there is no such script, or it would not use the task that was asked for.
    """
    if not script.is_file():
        raise InputError(f"no script {script}: give the path of one of timm's scripts, which its repository has")
    _check_task(arguments, explanation_weight, delete_cells)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        torch.nn.parallel.DistributedDataParallel = _DistributedDataParallel  # type: ignore[assignment,misc]
    if explanation_weight is not None:
        task = partial(ExplanationDistillationTask, explanation_weight=explanation_weight)
        timm.task.LogitDistillationTask = task  # type: ignore[misc,assignment]
    if delete_cells:
        timm.task.ClassificationTask = DeletionClassificationTask  # type: ignore[misc]
    runpy.run_path(str(script), run_name="__main__")


def _check_task(arguments: list[str], explanation_weight: float | None, delete_cells: bool) -> None:
    """Refuse what train.py would pass over in silence; a file of options (`--config`) may say more."""
    options = {argument.partition("=")[0] for argument in arguments}
    if options & {"-c", "--config"}:
        return
    has_teacher = "--kd-model-name" in options
    if explanation_weight is not None and not has_teacher:
        raise InputError("--explanation-weight is for a distillation: give train.py a teacher with --kd-model-name")
    if delete_cells and has_teacher:
        raise InputError("--delete-cells is for a classification without a teacher: leave --kd-model-name out")


class _DistributedDataParallel(DistributedDataParallel):
    """timm's train.py names the CPU as a process's device, which torch refuses: there, no device says the same."""

    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **kwargs: Any) -> None:
        on_cpu = device_ids is not None and all(torch.device(d).type == "cpu" for d in device_ids)
        super().__init__(module, None if on_cpu else device_ids, **kwargs)
