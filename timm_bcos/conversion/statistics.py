"""How a network's images are normalized: told by timm's cfg, by torchvision's weights, or by the network itself."""

import inspect
import sys
from types import ModuleType

from torch import nn
from torchvision.models import WeightsEnum
from torchvision.transforms import Normalize
from torchvision.transforms.v2 import Normalize as NormalizeV2

__all__ = ["NORMALIZERS", "Stats", "image_statistics", "reads_image_itself"]

Stats = tuple[float, ...] | None
NORMALIZERS = (Normalize, NormalizeV2)


def image_statistics(model: nn.Module) -> tuple[Stats, Stats]:
    """Mean and standard deviation per channel that a network's images need; None where nothing says so."""
    if _normalizes_itself(model):
        return (0.0,), (1.0,)
    cfg = getattr(model, "pretrained_cfg", None) or _torchvision_cfg(model)
    mean, std = cfg.get("mean"), cfg.get("std")
    return mean and tuple(mean), std and tuple(std)


def reads_image_itself(model: nn.Module) -> bool:
    """Whether the network treats the colors before its first layer: it cannot take their encoding."""
    return _normalizes_itself(model) or getattr(model, "transform_input", False)  # torchvision's Inception networks


def _normalizes_itself(model: nn.Module) -> bool:
    return any(isinstance(m, NORMALIZERS) for m in model.modules())


def _torchvision_cfg(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """What the default weights of torchvision's builders say, if those that this network may come from agree.

    A torchvision network does not say where it comes from. All its family's weights have the same statistics, but for
    EfficientNet's: there the number of parameters tells.
    """
    family = type(model).__module__
    if not family.startswith("torchvision.models."):
        return {}
    defaults = _default_weights(sys.modules[family])
    found = {_statistics(weights) for weights in defaults}
    if len(found) > 1:
        found = {_statistics(w) for w in defaults if w.meta["num_params"] == _parameters_at_1000_classes(model)}
    return dict(zip(("mean", "std"), found.pop(), strict=True)) if len(found) == 1 else {}


def _default_weights(module: ModuleType) -> list[WeightsEnum]:
    enums = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, WeightsEnum)]
    return [enum.DEFAULT for enum in enums if "DEFAULT" in enum.__members__]  # type: ignore[attr-defined]


def _statistics(weights: WeightsEnum) -> tuple[tuple[float, ...], tuple[float, ...]]:
    transform = weights.transforms()
    return tuple(transform.mean), tuple(transform.std)


def _parameters_at_1000_classes(model: nn.Module) -> int:
    """The network's size with a classifier for ImageNet, as weights record it."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    total = sum(p.numel() for p in model.parameters())
    return total + (1000 - head.out_features) * (head.in_features + (head.bias is not None))
