"""What other libraries must know of B-cos layers, which are `nn.Linear` and `nn.Conv2d` but do not compute y = Wx.

Each is told when it is imported, before or after this package.
"""

import warnings
from collections.abc import Callable
from types import ModuleType

import wrapt

__all__ = ["register_when_imported"]


def register_when_imported(library: str, register: Callable[[], None]) -> None:
    """Call a function once a library is imported; a version of it that is not known costs a warning, no more.

    Args:
        library: Name of the module to wait for.
        register: Tells the library of our layers.
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


def _peft() -> None:
    from .peft import register

    register()


def _torchao_float8() -> None:
    from .torchao import refuse_float8

    refuse_float8()


def _torchao_quantization() -> None:
    from .torchao import refuse_unfused

    refuse_unfused()


def _thop() -> None:
    from .thop import register

    register()


register_when_imported("peft", _peft)
register_when_imported("torchao.float8.float8_linear_utils", _torchao_float8)
register_when_imported("torchao.quantization.quant_api", _torchao_quantization)
register_when_imported("thop.profile", _thop)
