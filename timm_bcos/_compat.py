"""What this package uses of other libraries' insides, in one place, and what becomes of it where it is missing.

timm, torch and captum rename, move and remove what is not documented, and timm its layers too. An import of such a name
would let all of this package fail with it, and, since `import timm` imports our models, timm as well. So every such
name is looked up here. What the installed version lacks is replaced by a stand-in: a class that nothing is an instance
of, and that says what is missing when it is called. Whatever does not need it goes on working.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from torch.torch_version import TorchVersion

from .errors import MissingError

__all__ = ["LEAST_TIMM", "Library", "check_timm", "describe_timm", "find", "private", "timm_layers", "timm_models"]

LEAST_TIMM = "1.0.31"  # as in pyproject.toml


def check_timm() -> None:
    """Refuse a timm that is too old, such as a clone beside the script that hides the installed one.

    Raises:
        MissingError: Naming the version, its folder, and the least version.
    """
    version, _ = _found_timm()
    if version is not None and TorchVersion(version) < LEAST_TIMM:
        raise MissingError(describe_timm())


def describe_timm() -> str:
    """Which timm was found where, which one is needed, and how to get it."""
    version, folder = _found_timm()
    if folder is None:
        return f"timm is not installed: pip install 'timm>={LEAST_TIMM}'"
    found = f"found timm {version or 'of an unknown version'} in {folder}, timm_bcos needs timm>={LEAST_TIMM}"
    return f"{found}: {_advice(folder)}"


def _found_timm() -> tuple[str | None, Path | None]:
    """Version and folder of the timm that is imported, or would be, without importing it; None where unknown."""
    loaded = sys.modules.get("timm")
    spec = None if loaded is not None else importlib.util.find_spec("timm")
    origin = getattr(loaded, "__file__", None) or (spec and spec.origin)
    if not origin:
        return None, None
    folder = Path(origin).parent
    version = getattr(loaded, "__version__", None)
    if version is None and (folder / "version.py").is_file():
        stated = re.search(r"__version__\s*=\s*['\"](.+?)['\"]", (folder / "version.py").read_text())
        version = stated[1] if stated else None
    return version, folder


def _advice(folder: Path) -> str:
    try:
        installed = importlib.metadata.distribution("timm")
    except importlib.metadata.PackageNotFoundError:
        return "pip install --upgrade timm"
    place = Path(str(installed.locate_file("timm")))
    if place.resolve() == folder.resolve() or TorchVersion(installed.version) < LEAST_TIMM:
        return "pip install --upgrade timm"
    return (
        f"this folder hides the installed timm {installed.version} ({place}); rename or update it, or run the script "
        f"from another folder"
    )


def find(name: str) -> Any:
    """A class or function of another library.

    Args:
        name: Qualified, 'timm.layers.LayerNorm2d'.

    Returns:
        It, or a stand-in.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return _stand_in(name)


@cache
def _stand_in(name: str) -> type[nn.Module]:
    def refuse(*_: object, **__: object) -> NoReturn:
        library = name.partition(".")[0]
        raise MissingError(
            f"{library} {_version(library)} has no {name}, which is needed here: install another version of {library}, "
            f"or report this to timm_bcos"
        )

    return type(name.rpartition(".")[2], (nn.Module,), {"__init__": refuse, "__module__": __name__})


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class Library:
    """A module of another library whose attributes are always there: see `find`.

    Examples:
        >>> Library("timm.layers").LayerNorm2d
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(f"{self._name}.{name}")


timm_layers: Any = Library("timm.layers")
timm_models: Any = Library("timm.models")


class _Private:
    """Names that their libraries do not document, looked up when they are asked for: see `PRIVATE`."""

    def __getattr__(self, name: str) -> Any:
        if name not in PRIVATE:
            raise AttributeError(name)
        return find(PRIVATE[name])


# The private ones, by what they are called here.
PRIVATE = {
    "checkpoint": "timm.models._manipulate.checkpoint",
    "checkpoint_seq": "timm.models._manipulate.checkpoint_seq",
    "FeatureGetterNet": "timm.models._features.FeatureGetterNet",
    "feature_take_indices": "timm.models._features.feature_take_indices",
    "get_cache_dir": "timm.models._hub.get_cache_dir",
    "load_model_config_from_path": "timm.models._hub.load_model_config_from_path",
    "load_state_dict_from_path": "timm.models._hub.load_state_dict_from_path",
    "BatchNorm": "torch.nn.modules.batchnorm._BatchNorm",
    "make_fx": "torch.fx.experimental.proxy_tensor.make_fx",
    "are_functorch_transforms_active": "torch._C._are_functorch_transforms_active",
    "is_gradtrackingtensor": "torch._C._functorch.is_gradtrackingtensor",
    "is_functorch_wrapped_tensor": "torch._C._functorch.is_functorch_wrapped_tensor",
    "get_unwrapped": "torch._C._functorch.get_unwrapped",
    "is_legacy_batchedtensor": "torch._C._functorch.is_legacy_batchedtensor",
    "get_eval_frame_callback": "torch._C._dynamo.eval_frame.get_eval_frame_callback",
    "StorageWeakRef": "torch.multiprocessing.reductions.StorageWeakRef",
    "top_saved_tensors_hooks": "torch._C._autograd._top_saved_tensors_default_hooks",
    "tree_leaves": "torch.utils._pytree.tree_leaves",
    "WeakIdKeyDictionary": "torch.utils.weak.WeakIdKeyDictionary",
    "register_backward_hook": "captum._utils.common._register_backward_hook",
}

private: Any = _Private()

check_timm()  # before anything else of this package imports timm
