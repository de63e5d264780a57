"""The role of each module in a network: which reads the image, which gives the logits, which stay linear."""

from collections.abc import Container, Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from .._compat import private, timm_layers, timm_models
from ..errors import InputError, UnsupportedModuleError
from ..nn.module_utils import get_classifiers
from ..nn.stems import BcosStem, ImageReader, image_channels
from .config import BcosConfig
from .problems import unread_layers
from .rules import PROBABILITIES, LayerRole
from .statistics import Stats, image_statistics, reads_image_itself

__all__ = ["IN_ORDER", "LayerRoles", "name_in_backbone"]

AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")  # what timm and torchvision call their auxiliary heads
# timm's backbones, of which the first two run what they contain one after the other
IN_ORDER = (timm_models.FeatureDictNet, timm_models.FeatureHookNet)
WITHOUT_CLASSIFIER = (*IN_ORDER, private.FeatureGetterNet)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose2d)


class LayerRoles:
    """The role of each module: which reads the image, which gives the logits, which stay linear."""

    def __init__(self, model: nn.Module, config: BcosConfig) -> None:
        self.config = config
        self.model = model
        self.classifiers = _classifier_ids(model)
        is_fresh = not any(isinstance(m, BcosStem | ImageReader) for m in model.modules())
        self.channels = _channels_of(model, config)
        self.stems = _stem_names(model, self.channels) if is_fresh else ()
        self.problems: list[str] = []
        self.mean: Stats = None
        self.std: Stats = None
        if is_fresh:
            self._take_statistics()
        else:
            self.problems += unread_layers(model, self.channels)

    def _take_statistics(self) -> None:
        try:
            found = _normalization(self.model, self.config)
        except UnsupportedModuleError as refusal:
            self.problems += refusal.problems
            return
        self.mean, self.std = (_per_channel(values, self.channels) for values in found)

    def of(self, name: str, module: nn.Module) -> LayerRole:
        if name in self.stems:
            return LayerRole(name, "stem", self.mean, self.std)
        if id(module) in self.classifiers:
            return LayerRole(name, self._classifier_role(name))
        if any(fnmatch(name, pattern) for pattern in self.config.linear):
            return LayerRole(name, "linear")
        return LayerRole(name)

    def _classifier_role(self, name: str) -> str:
        """Whether the classifier's global pooling can be moved behind it."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        children = list(parent.children()) if name else [self.model]
        own = next(i for i, m in enumerate(children) if id(m) in self.classifiers)
        if probabilities := [m for m in children[own + 1 :] if isinstance(m, PROBABILITIES)]:
            kind = type(probabilities[0]).__name__
            problem = (
                f"{name}: {kind} follows the classifier, while explanations are of logits: replace it by nn.Identity()"
            )
            raise UnsupportedModuleError([problem])
        is_pooled_later = any(isinstance(m, nn.AdaptiveAvgPool2d) for m in children[own + 1 :])
        pools = [i for i, m in enumerate(children[:own]) if isinstance(m, timm_layers.SelectAdaptivePool2d)]
        is_unpooled = bool(pools) and children[pools[-1]].is_identity()  # type: ignore[operator]
        gives_map = is_pooled_later or is_unpooled or not hasattr(self.model, "get_classifier")
        if gives_map and isinstance(children[own], nn.Conv2d):
            return "map"
        if is_unpooled and getattr(self.model, "output_fmt", "NCHW") != "NCHW":
            return "classifier"  # which reads the last axis of maps
        if not pools or self.config.classify_positions == "never":
            return "classifier"
        pool: Any = children[pools[-1]]
        between = children[pools[-1] + 1 : own]
        transparent: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Flatten)
        if self.config.classify_positions == "always":
            transparent += (nn.LayerNorm,)
        if not all(isinstance(m, transparent) for m in between):
            return "classifier"
        # timm's pools for NHWC maps are others
        averages = isinstance(pool.pool, nn.AdaptiveAvgPool2d) and pool.pool.output_size in (1, (1, 1))
        return "positions" if averages else "map" if pool.is_identity() else "classifier"


def _classifier_ids(model: Any) -> set[int]:
    """timm models tell; elsewhere it is the last layer. Auxiliary heads count too."""
    if _is_backbone(model):
        return set()
    auxiliary = [child for name, child in model.named_children() if name in AUXILIARY]
    if hasattr(model, "get_classifier"):
        heads = get_classifiers(model)
    else:
        theirs = {id(m) for child in auxiliary for m in child.modules()}
        heads = [*_last_layers(m for m in model.modules() if id(m) not in theirs)]
    heads += [layer for child in auxiliary for layer in _last_layers(child.modules())]
    return {id(m) for m in heads}


def _is_backbone(model: nn.Module) -> bool:
    """Of timm's `features_only=True`; some architectures have a class of their own for it."""
    is_own = hasattr(model, "feature_info") and not hasattr(model, "get_classifier")
    return is_own or isinstance(model, WITHOUT_CLASSIFIER)


def _last_layers(modules: Iterable[nn.Module]) -> Sequence[nn.Module]:
    """The last linear layer, or, where there is none, the last convolution."""
    layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    return ([m for m in layers if isinstance(m, nn.Linear)] or layers)[-1:]


def _stem_names(model: nn.Module, channels: int) -> tuple[str, ...]:
    """The convolutions that read the image; none if something else does or may, which then needs an `ImageReader`.

    timm's cfg names them. Elsewhere it is the first layer of the network, if that is the only convolution with as many
    inputs as the image: of several, all may read it, or some other one than the first.
    """
    if reads_image_itself(model):
        return ()
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    readers = [name for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.in_channels == channels]
    if _is_backbone(model):
        names = tuple(name_in_backbone(name, layers) for name in names)
    if names:
        return names if set(names) <= set(readers) else ()
    return tuple(readers) if len(readers) == 1 and readers == list(layers)[:1] else ()


def name_in_backbone(name: str, layers: Container[str]) -> str:
    """What timm's backbones call a layer of the whole network: they hold it as a whole, or flatten its sequences."""
    possible = (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}")
    return next((candidate for candidate in possible if candidate in layers), name)


def _channels_of(model: nn.Module, config: BcosConfig) -> int:
    """Channels of the images that a network takes.

    Most networks tell. Of others, the config's statistics may; then a convolution that could read colors, or else the
    first one.
    """
    told = image_channels(model)
    lengths = {len(values) for values in (config.mean, config.std) if values is not None} - {1}
    inputs = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    if told is None:
        likely = [*(length for length in lengths if length in inputs or not inputs), *(3 for n in inputs if n == 3)]
        told = (likely or inputs or [3])[0]
    if lengths - {told}:
        raise InputError(
            f"BcosConfig(mean={config.mean}, std={config.std}): images of {type(model).__name__} have {told} "
            f"channel{'s' * (told > 1)}; give one number for each, or one for all"
        )
    return told


def _normalization(model: nn.Module, config: BcosConfig) -> tuple[Stats, Stats]:
    if config.stem == "encoded":
        return None, None
    mean, std = image_statistics(model)
    mean, std = config.mean or mean, config.std or std
    if mean is None or std is None:
        problem = (
            f"(root): {type(model).__name__} does not say how its images are normalized: pass BcosConfig(mean=..., "
            f"std=...), or mean=(0.0,) and std=(1.0,) if it takes pixels in [0, 1]"
        )
        raise UnsupportedModuleError([problem])
    return tuple(mean), tuple(std)


def _per_channel(values: Stats, channels: int) -> Stats:
    """A cfg's statistics of color images for a network that takes another number of channels: their average."""
    if values is None or len(values) in (1, channels):
        return values
    return (sum(values) / len(values),)
