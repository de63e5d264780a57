"""A training by timm's train.py, as scripts that start several of them need it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_bcos import BcosError

__all__ = ["train"]


def train(folder: Path, train_script: Path, options: Sequence[str], task: Sequence[str] = ()) -> Path:
    """Train into `folder`, go on with what was interrupted, or do nothing where it is done.

    Args:
        folder: For checkpoints and `log.txt`; `done` marks a finished training.
        train_script: timm's train.py.
        options: Its options, without those of output.
        task: Options of `timm-bcos run`.

    Returns:
        `folder`.

    Raises:
        BcosError: If train.py fails.
    """
    if (folder / "done").exists():
        return folder
    command = [sys.executable, "-m", "timm_bcos", "run", *task, str(train_script), "--output", str(folder.parent),
               "--experiment", folder.name, "--checkpoint-hist", "1", *options]  # fmt: skip
    if (folder / "last.pth.tar").exists():
        command += ["--resume", str(folder / "last.pth.tar")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise BcosError(f"training {folder.name} failed: see {folder / 'log.txt'}")
    (folder / "done").touch()
    return folder
