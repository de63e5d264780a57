"""Python programs in processes of their own that need not import torch again.

multiprocessing's fork server imports torch once; each program runs in a fork of it, in which neither timm nor timm_bcos
has been imported.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

PRELOADED = ("torch", "torchvision")


def run_python(code: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> tuple[int, str]:
    """Run a program in a fresh namespace.

    Args:
        code: The program.
        environment: All its environment variables; None for those of this process.
        folder: Its working directory; None for that of this process.

    Returns:
        Its exit status, and its standard output followed by its standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary, name) for name in ("out", "err")]
        given = (code, dict(environment or os.environ), str(folder or Path.cwd()), *map(str, files))
        process = context.Process(target=_run, args=given)
        process.start()
        process.join()
        return process.exitcode or 0, "".join(file.read_text() for file in files)


def _run(code: str, environment: dict[str, str], folder: str, out: str, err: str) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0:0] = ["", *environment.get("PYTHONPATH", "").split(os.pathsep)]
    warnings.simplefilter("ignore")
    loaded = {"timm", "timm_bcos"} & set(sys.modules)
    assert not loaded, loaded
    try:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
