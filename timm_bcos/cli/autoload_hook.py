"""Imports timm_bcos right after timm. `autoload` copies this source into a start-up file; nothing else runs it."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec


class ImportAfterTimm:
    """A finder that asks the others for timm and prolongs its execution."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Timm's own spec, or None for other modules."""
        if name != "timm" or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = cls.prolonged(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    @staticmethod
    def prolonged(exec_module: Callable[..., object]) -> Callable[..., None]:
        """Execute timm, then us; without us timm still works."""

        def execute(module: object) -> None:
            exec_module(module)
            try:
                import timm_bcos  # noqa: F401
            except Exception as error:
                print(f"timm-bcos autoload: import timm_bcos failed ({error}); remove {__file__}", file=sys.stderr)

        return execute


# Python reads site-packages twice where `lib64` links to `lib`
if not any(getattr(finder, "__module__", None) == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, ImportAfterTimm)
