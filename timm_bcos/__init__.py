"""B-cos models for timm: inherently interpretable models whose explanations are exact.

Importing this package registers its models with timm:

    >>> import timm, timm_bcos
    >>> model = timm.create_model("bcos_efficientnet_lite0", pretrained=True).eval()
    >>> explanation = timm_bcos.Explainer(model)("photo.jpg")
    >>> explanation.overlay().save("why.png")
"""

__version__ = "0.1.0"

import warnings
from types import ModuleType

import lazy_loader
import wrapt

from .integrations import registration  # noqa: F401  (describes B-cos layers to other libraries when they are imported)

# `__init__.pyi` lists the public names. Each is imported on first use, so that the command line starts fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("timm")  # immediately if timm has been imported already
def _register_models(timm: ModuleType) -> None:
    try:
        from . import _compat  # noqa: F401  (refuses versions of timm that are too old)
        from .models import bcos_models  # noqa: F401
    except Exception as error:  # `import timm` must not fail because of us
        where = f"timm {timm.__version__} in {next(iter(timm.__path__))}"
        warnings.warn(f"timm_bcos cannot register its models with {where}: {error}", stacklevel=2)
