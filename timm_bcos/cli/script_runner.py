"""Runs a script of timm, unchanged, with the B-cos models registered."""

import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm.task
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..training.tasks import DeletionClassificationTask, ExplanationDistillationTask

__all__ = ["run_script"]

# A sitecustomize module that registers the models by importing timm_bcos, after the sitecustomize module that it hides
START_UP = """
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

sys.path.remove(__file__.rpartition("sitecustomize")[0][:-1])
spec = PathFinder.find_spec("sitecustomize", sys.path)
if spec is not None and spec.loader is not None:
    spec.loader.exec_module(module_from_spec(spec))
import timm_bcos
"""
CLASSIFIERS = (BcosConvClassifier, BcosLinearClassifier)


def run_script(
    script: Path, arguments: list[str], explanation_weight: float | None = None, delete_cells: bool = False
) -> None:
    """Run a Python script like `python script arguments...`, in this process.

    Args:
        script: Path of the script, for instance timm's `train.py`.
        arguments: Arguments of the script.
        explanation_weight: Weight of `ExplanationDistillationTask`, which replaces timm's `LogitDistillationTask`; None
            for no replacement.
        delete_cells: Replace timm's `ClassificationTask` by `DeletionClassificationTask`.

    Raises:
        InputError: If the script does not exist, or would not use the replaced task.
    """
    if not script.is_file():
        raise InputError(f"no script {script}: give the path of a script in timm's repository")
    _check_task(arguments, explanation_weight, delete_cells)
    _check_script(script, explanation_weight, delete_cells)
    _clip_all_but_heads()
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        torch.nn.parallel.DistributedDataParallel = _DistributedDataParallel  # type: ignore[assignment,misc]
    if explanation_weight is not None:
        task = partial(ExplanationDistillationTask, explanation_weight=explanation_weight)
        timm.task.LogitDistillationTask = task  # type: ignore[misc,assignment]
    if delete_cells:
        timm.task.ClassificationTask = DeletionClassificationTask  # type: ignore[misc]
    with _models_in_subprocesses():
        runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _models_in_subprocesses() -> Iterator[None]:
    """Register the B-cos models also in Python processes that the script starts, as bulk_runner.py does."""
    before = os.environ.get("PYTHONPATH")
    with TemporaryDirectory(prefix="timm-bcos-") as folder:
        Path(folder, "sitecustomize.py").write_text(START_UP, encoding="utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def _check_script(script: Path, explanation_weight: float | None, delete_cells: bool) -> None:
    """Check that the script uses the tasks that options replace."""
    wanted = {
        "--explanation-weight": "LogitDistillationTask" if explanation_weight is not None else None,
        "--delete-cells": "ClassificationTask" if delete_cells else None,
    }
    source = script.read_text(encoding="utf-8", errors="replace")
    for option, task in wanted.items():
        if task is not None and not re.search(rf"\b{task}\b", source):
            raise InputError(f"{option} is for timm's train.py: {script} does not use {task}; leave the option out")


def _check_task(arguments: list[str], explanation_weight: float | None, delete_cells: bool) -> None:
    """Check that train.py will use the tasks that options replace. A configuration file (`--config`) is not checked."""
    options = {argument.partition("=")[0] for argument in arguments}
    if options & {"-c", "--config"}:
        return
    has_teacher = "--kd-model-name" in options
    if explanation_weight is not None and not has_teacher:
        raise InputError("--explanation-weight needs distillation: give train.py a teacher with --kd-model-name")
    if delete_cells and has_teacher:
        raise InputError("--delete-cells is for training without a teacher: leave --kd-model-name out")


def _clip_all_but_heads() -> None:
    """Let timm's adaptive gradient clipping exclude the whole classifier, not the last two parameters of the model."""
    tasks: list[Any] = [kind for kind in vars(timm.task).values() if isinstance(kind, type)]
    for kind in {base for task in tasks for base in task.__mro__ if "get_clip_parameters" in vars(base)}:
        setattr(kind, "get_clip_parameters", _without_heads(vars(kind)["get_clip_parameters"]))  # noqa: B010


def _without_heads(original: Callable[..., Iterable[nn.Parameter]]) -> Callable[..., Iterable[nn.Parameter]]:
    @wraps(original)
    def get_clip_parameters(task: nn.Module, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        everything = list(original(task))
        heads = {id(p) for m in task.modules() if isinstance(m, CLASSIFIERS) for p in m.parameters()}
        left = [parameter for parameter in everything if id(parameter) not in heads]
        is_bcos = len(left) < len(everything)
        return left if exclude_head and is_bcos else original(task, exclude_head=exclude_head)

    return get_clip_parameters


class _DistributedDataParallel(DistributedDataParallel):
    """timm's train.py passes the CPU as `device_ids`, which torch refuses; None means the same."""

    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **kwargs: Any) -> None:
        on_cpu = device_ids is not None and all(torch.device(d).type == "cpu" for d in device_ids)
        super().__init__(module, None if on_cpu else device_ids, **kwargs)
