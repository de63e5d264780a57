"""Other libraries and B-cos layers, which are `nn.Linear` and `nn.Conv2d` but do not compute y = Wx.

Each library gets to know them when it is imported, before or after this package.
"""

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import wrapt

__all__ = ["marked", "original", "register_when_imported"]

# What is called when a module of another library is imported: our module and a function in it.
REGISTRATIONS = {
    "peft": ("peft", "register"),
    "thop.profile": ("thop", "register"),
    "torchao.float8.float8_linear_utils": ("torchao", "refuse_float8"),
    "torchao.quantization.quant_api": ("torchao", "refuse_unfused"),
    "zennit.core": ("zennit", "warn_of_rules"),
}


def register_when_imported(library: str, register: Callable[[], None]) -> None:
    """Call a function once a library is imported. A version of it that the function cannot handle causes a warning.

    Args:
        library: Name of the module to wait for.
        register: Function that makes the library handle B-cos layers.
    """

    @wrapt.when_imported(library)
    def call(module: ModuleType) -> None:
        try:
            register()
        except (AttributeError, ImportError, TypeError) as error:
            warnings.warn(
                f"timm_bcos does not know this version of {library} ({error}): its results for B-cos layers may be "
                f"wrong, see docs/adapters.md",
                stacklevel=2,
            )


def _call(module: str, function: str) -> None:
    """Call one of our functions, importing its module only now, because that imports the library."""
    getattr(import_module(f".{module}", __package__), function)()


# A function of another library is wrapped once, even if this package is imported again.

MARK = "_wrapped_by_timm_bcos"
F = TypeVar("F", bound=Callable[..., Any])


def marked(wrapper: F) -> F:
    """Mark a wrapper, made with `functools.wraps`, as one of ours."""
    setattr(wrapper, MARK, True)
    return wrapper


def original(function: Any) -> Any:
    """A function without our wrappers."""
    while getattr(function, MARK, False):
        function = function.__wrapped__
    return function


# At the end, because for a library that is imported already the function is called now.
for _library, _names in REGISTRATIONS.items():
    register_when_imported(_library, partial(_call, *_names))
