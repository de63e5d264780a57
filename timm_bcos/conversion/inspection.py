"""First step of a conversion: find out about a model, without changing it.

`inspect_model` reads, in this order: how many channels images have, how they are normalized, which layers read them,
which layers give the logits, and from that the role of every module. `reference_activations` runs a copy of the model
on a gray image.
"""

import inspect
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.transforms import Normalize
from torchvision.transforms.v2 import Normalize as NormalizeV2

from .._compat import private, timm_layers, timm_models
from ..errors import InputError
from ..files import first_line
from ..nn.layers import ShiftedActivation
from ..nn.module_utils import frozen_copy, get_classifiers, image_size
from ..nn.stems import BcosStem, ImageReader, image_channels
from .config import BcosConfig
from .replacements.base import LayerRole, hidden_role

__all__ = ["IN_ORDER", "Inspection", "image_statistics", "inspect_model", "name_in_backbone", "reference_activations"]

Statistics = tuple[float, ...] | None  # one number per channel, or one for all

AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")  # names of auxiliary heads in timm and torchvision
# timm's backbones; the first two run their children one after the other
IN_ORDER = (timm_models.FeatureDictNet, timm_models.FeatureHookNet)
WITHOUT_CLASSIFIER = (*IN_ORDER, private.FeatureGetterNet)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose2d)
NORMALIZERS = (Normalize, NormalizeV2)


@dataclass(frozen=True)
class Inspection:
    """What is known about a model before its conversion.

    Attributes:
        model: The model, unchanged.
        config: The conversion that is asked for.
        channels: Number of channels of its images.
        mean: Mean that its images are normalized by; None if unknown, or if it is not needed.
        std: Standard deviation that its images are normalized by; None as for `mean`.
        reads_encoded_images: Whether the model, or a part of it, has been converted, and encodes its images.
        roles: Role of each module by its path; a module that is registered twice has two.
    """

    model: nn.Module
    config: BcosConfig
    channels: int
    mean: Statistics
    std: Statistics
    reads_encoded_images: bool
    roles: dict[str, LayerRole]


def inspect_model(model: nn.Module, config: BcosConfig) -> Inspection:
    """Find out what a conversion needs to know about a model.

    Args:
        model: A plain model, or one that has been converted in part. Not changed.
        config: The conversion that is asked for.

    Raises:
        InputError: If the config's mean or std does not have one number per image channel.
    """
    channels = _count_channels(model, config)
    is_encoded = any(isinstance(m, BcosStem | ImageReader) for m in model.modules())
    mean, std = (None, None) if is_encoded else _normalization(model, config, channels)
    stems = () if is_encoded else _stem_names(model, channels)
    roles = _find_roles(model, config, {path: LayerRole(path, "stem", mean, std) for path in stems})
    return Inspection(model, config, channels, mean, std, is_encoded, roles)


# Channels


def _count_channels(model: nn.Module, config: BcosConfig) -> int:
    """Number of channels of the images that a model takes.

    Most models say so. For the others it follows from the length of the config's statistics, or else from the
    convolutions: 3 if one of them takes 3 channels, otherwise what the first one takes.
    """
    channels = image_channels(model)
    lengths = {len(values) for values in (config.mean, config.std) if values is not None} - {1}
    inputs = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    if channels is None:
        likely = [*(length for length in lengths if length in inputs or not inputs), *(3 for n in inputs if n == 3)]
        channels = (likely or inputs or [3])[0]
    if lengths - {channels}:
        raise InputError(
            f"BcosConfig(mean={config.mean}, std={config.std}): images of {type(model).__name__} have {channels} "
            f"channel{'s' * (channels > 1)}; give one number for each, or one for all"
        )
    return channels


# Normalization


def _normalization(model: nn.Module, config: BcosConfig, channels: int) -> tuple[Statistics, Statistics]:
    """Mean and std that the model's stem expects, those of the config first; None where they are unknown."""
    if config.stem == "encoded":
        return None, None
    mean, std = image_statistics(model)
    mean, std = config.mean or mean, config.std or std
    if mean is None or std is None:
        return None, None
    return _per_channel(tuple(mean), channels), _per_channel(tuple(std), channels)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics of color images for a model that takes another number of channels: their average."""
    return values if len(values) in (1, channels) else (sum(values) / len(values),)


def image_statistics(model: nn.Module) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation per channel that a model's images are normalized by.

    They are 0 and 1 for a model that normalizes images itself. Otherwise timm's `pretrained_cfg` tells them, or the
    weights that torchvision publishes for the model. Unknown ones are None.
    """
    if _normalizes_itself(model):
        return (0.0,), (1.0,)
    cfg = getattr(model, "pretrained_cfg", None) or _torchvision_cfg(model)
    mean, std = cfg.get("mean"), cfg.get("std")
    return mean and tuple(mean), std and tuple(std)


def _normalizes_itself(model: nn.Module) -> bool:
    return any(isinstance(m, NORMALIZERS) for m in model.modules())


def _torchvision_cfg(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Mean and std of the default weights of torchvision's builders; nothing if they differ.

    A torchvision model does not say which builder made it. The weights of a family have the same statistics, except
    for EfficientNet, where the number of parameters identifies the model.
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
    """Number of parameters with a classifier for ImageNet, as torchvision's weights record it."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    total = sum(p.numel() for p in model.parameters())
    return total + (1000 - head.out_features) * (head.in_features + (head.bias is not None))


# Stems


def _stem_names(model: nn.Module, channels: int) -> tuple[str, ...]:
    """The convolutions that read the image; none if that is not certain: the model then needs an `ImageReader`.

    timm's cfg names them. Otherwise it is the first layer of the model, if no other convolution takes as many channels
    as the image has.
    """
    if _changes_colors_itself(model):
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


def _changes_colors_itself(model: nn.Module) -> bool:
    """Whether the model transforms colors before its first layer: that code cannot read encoded images."""
    return _normalizes_itself(model) or getattr(model, "transform_input", False)  # torchvision's Inception models


def _is_backbone(model: nn.Module) -> bool:
    """Whether timm made the model with `features_only=True`; some architectures have a class of their own for it."""
    has_features_only = hasattr(model, "feature_info") and not hasattr(model, "get_classifier")
    return has_features_only or isinstance(model, WITHOUT_CLASSIFIER)


def name_in_backbone(name: str, layers: Container[str]) -> str:
    """Name in one of timm's backbones of a layer of the full model.

    Backbones hold the full model under a name of their own, or flatten its sequences.
    """
    possible = (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}")
    return next((candidate for candidate in possible if candidate in layers), name)


# Roles


def _find_roles(model: nn.Module, config: BcosConfig, stems: Mapping[str, LayerRole]) -> dict[str, LayerRole]:
    classifiers = _classifier_ids(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    roles = {}
    for path, module in modules.items():
        if path in stems:
            roles[path] = stems[path]
        elif id(module) in classifiers:
            siblings = list(modules[path.rpartition(".")[0]].children()) if path else [module]
            roles[path] = LayerRole(path, _classifier_role(model, siblings, classifiers, config))
        else:
            roles[path] = hidden_role(path, config)
    return roles


def _classifier_ids(model: Any) -> set[int]:
    """Ids of the layers that give the logits, those of auxiliary heads included.

    timm's models name them (`get_classifier`). Elsewhere it is the last layer.
    """
    if _is_backbone(model):
        return set()
    auxiliary = [child for name, child in model.named_children() if name in AUXILIARY]
    if hasattr(model, "get_classifier"):
        heads = get_classifiers(model)
    else:
        in_auxiliary = {id(m) for child in auxiliary for m in child.modules()}
        heads = [*_last_layers(m for m in model.modules() if id(m) not in in_auxiliary)]
    heads += [layer for child in auxiliary for layer in _last_layers(child.modules())]
    return {id(m) for m in heads}


def _last_layers(modules: Iterable[nn.Module]) -> Sequence[nn.Module]:
    """The last linear layer, or the last convolution if there is no linear layer."""
    layers = [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d)]
    return ([m for m in layers if isinstance(m, nn.Linear)] or layers)[-1:]


def _classifier_role(model: nn.Module, siblings: Sequence[Any], classifiers: Container[int], config: BcosConfig) -> str:
    """Whether the global average pooling before a classifier can be moved behind it ("positions"), or is absent."""
    own = next(i for i, m in enumerate(siblings) if id(m) in classifiers)
    pools = [i for i, m in enumerate(siblings[:own]) if isinstance(m, timm_layers.SelectAdaptivePool2d)]
    is_unpooled = bool(pools) and siblings[pools[-1]].is_identity()
    is_pooled_later = any(isinstance(m, nn.AdaptiveAvgPool2d) for m in siblings[own + 1 :])
    gives_map = is_pooled_later or is_unpooled or not hasattr(model, "get_classifier")
    if gives_map and isinstance(siblings[own], nn.Conv2d):
        return "map"
    if is_unpooled and getattr(model, "output_fmt", "NCHW") != "NCHW":
        return "classifier"  # reads the last axis of maps
    if not pools or not _commute_with_pooling(siblings[pools[-1] + 1 : own], config):
        return "classifier"
    return _role_behind(siblings[pools[-1]])


def _commute_with_pooling(layers: Iterable[nn.Module], config: BcosConfig) -> bool:
    """Whether the layers between pooling and classifier may act at each position instead."""
    if config.classify_positions == "never":
        return False
    transparent: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Flatten)
    if config.classify_positions == "always":
        transparent += (nn.LayerNorm,)
    return all(isinstance(m, transparent) for m in layers)


def _role_behind(pool: Any) -> str:
    """Role of a classifier right behind timm's global pooling, which has other layers for maps (N, H, W, C)."""
    if isinstance(pool.pool, nn.AdaptiveAvgPool2d) and pool.pool.output_size in (1, (1, 1)):
        return "positions"
    return "map" if pool.is_identity() else "classifier"


# Reference activations

NORMS_WITH_ACTIVATION = (timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct)


def reference_activations(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of the activations in batch norms for a gray image, at its center.

    With additive biases, features are those of a gray image (the mean that images are normalized by) plus the change
    that the image causes. `BcosConfig(bias="reference")` keeps that change: a(x + r) - a(r) for an activation a whose
    input is r for a gray image. At B = 1 this is the original model minus its response to gray, except near the
    borders, where convolutions pad with zeros.

    The gray image is twice as large as the model's own input size, so that its center hardly sees the borders, or of
    that size if the model takes no other.

    Args:
        model: A plain model. Not changed.

    Returns:
        Tensors (C,) by the path of the norm. Norms that did not run are missing, and so are all on the meta device.

    Raises:
        InputError: If the model does not run on images of its own input size.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta or not any(map(_has_activation, model.modules())):
        return {}
    found: dict[str, Tensor] = {}
    copy = frozen_copy(model).eval()
    for path, module in copy.named_modules():
        if _has_activation(module):
            module.act.register_forward_pre_hook(partial(_keep_center, found, path))
    return _run_on_gray(copy, parameter, found)


def _has_activation(module: nn.Module) -> bool:
    return type(module) in NORMS_WITH_ACTIVATION and not isinstance(module.act, nn.Identity | ShiftedActivation)


def _keep_center(found: dict[str, Tensor], path: str, act: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook."""
    found[path] = args[0][0, :, args[0].shape[2] // 2, args[0].shape[3] // 2].clone()


@torch.no_grad()
def _run_on_gray(model: Any, like: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found`, which the model's hooks fill."""
    channels: int = getattr(model, "in_chans", resolve_model_data_config(model)["input_size"][0])
    height, width = image_size(model)
    run = getattr(model, "forward_features", model)  # a head without pooling does not take larger maps
    for scale in (2, 1):
        try:
            run(like.new_zeros(1, channels, scale * height, scale * width))
            return found
        except Exception as error:  # models of a fixed input size raise errors of every kind
            found.clear()
            failure = error
    raise InputError(
        f"bias='reference' needs the model's response to a gray image, but {type(model).__name__} does not run on "
        f"one of {height} × {width} pixels ({first_line(failure)}): set its input size, "
        f"model.pretrained_cfg = dict(input_size=...)"
    ) from failure
