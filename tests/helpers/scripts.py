"""The repository's scripts as modules, and command lines as functions."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from timm_bcos.cli.app import app
from timm_bcos.cli.exceptions import exit_status

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def load_script(name: str) -> ModuleType:
    """A script as a module; its folder comes last on the import path, where `coverage.py` hides no package."""
    (path,) = SCRIPTS.glob(f"*/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_status(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> int:
    """The exit status of a script."""
    monkeypatch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return int(end.value.code or 0)


def command(*arguments: object) -> int:
    """The exit status of `timm-bcos`, as its entry point runs it."""
    return exit_status(lambda: app([*map(str, arguments)]))
