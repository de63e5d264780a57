"""B-cos networks for timm: inherently interpretable networks whose explanations are exact.

Importing this package registers its networks with timm:

    >>> import timm, timm_bcos
    >>> model = timm.create_model("bcos_densenet121").eval()
    >>> explanation = timm_bcos.explain(model, images)  # images (N, 3, H, W) in [0, 1]
    >>> explanation.plot()
"""

__version__ = "0.1.0"

import warnings
from types import ModuleType

import lazy_loader
import wrapt

from .integrations import registration  # noqa: F401  (tells other libraries of B-cos layers, when they are imported)

# `__init__.pyi` lists the public names; each is imported when it is first used, so that the command line starts fast
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("timm")  # at once where timm has been imported before
def _register_networks(timm: ModuleType) -> None:
    try:
        from .models import bcos_models  # noqa: F401
    except Exception as error:  # `import timm` must not fail because of us
        warnings.warn(f"timm_bcos cannot register its networks with timm {timm.__version__}: {error}", stacklevel=2)
