"""Opt-in: B-cos networks wherever timm is imported, so that plain `python train.py --model bcos_resnet18` finds them.

Python executes the lines of `.pth` files in site-packages that start with `import` when it starts. Ours puts a finder
in front, which waits for `import timm` and imports timm_bcos after it (`autoload_hook.py`).
"""

import sysconfig
from pathlib import Path

from ..errors import BcosError
from ..files import atomic_path

__all__ = ["autoload_file", "disable_autoload", "enable_autoload"]

HOOK = Path(__file__).with_name("autoload_hook.py")


def autoload_file() -> Path:
    """The start-up file, whether it exists or not."""
    return Path(sysconfig.get_path("purelib")) / "timm_bcos_autoload.pth"


def enable_autoload() -> Path:
    """Write the start-up file.

    Returns:
        Where it is.

    Raises:
        BcosError: If site-packages cannot be written.
    """
    path = autoload_file()
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(start_up_line(path))
    except OSError as error:
        raise _not_writable(path, error) from error
    return path


def disable_autoload() -> bool:
    """Remove the start-up file.

    Returns:
        Whether there was one.

    Raises:
        BcosError: If site-packages cannot be written.
    """
    path = autoload_file()
    found = path.exists()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    return found


def start_up_line(path: Path) -> str:
    """What Python executes when it starts: the hook, which will take itself for the file at `path`."""
    names = {"__name__": path.stem, "__file__": str(path)}
    return f"import sys; exec({HOOK.read_text()!r}, {names!r})\n"


def _not_writable(path: Path, error: OSError) -> BcosError:
    return BcosError(f"cannot change {path} ({error.strerror}): use a virtual environment that you own")
