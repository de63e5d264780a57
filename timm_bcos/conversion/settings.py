"""Settings of a B-cos model that its weights do not show, stored as a tensor in the state dict.

Weights for one B fit a model with another B: names and shapes are the same. Therefore the state dict of a converted
model has one more entry, `bcos_settings`: B, γ, T, how images are read and so on, as the bytes of a JSON text. Unlike
metadata, a tensor survives whatever is done to checkpoints (safetensors, averaging, prefixes). Weights without that
entry (official releases, plain models) can be loaded as usual.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.stems import BcosStem, ImageReader
from .config import BcosConfig

__all__ = [
    "SETTINGS",
    "Contradiction",
    "adopt_logit_bias",
    "contradictions",
    "encode_settings",
    "in_words",
    "is_settings",
    "refuse_contradictions",
]

SETTINGS = "bcos_settings"  # name of the entry
LENGTH = 4096  # bytes, padded with spaces: transformers does not accept entries of another shape
# Fields of the config that do not affect names or shapes of weights. The second ones matter if a classifier is loaded.
FIELDS = (
    "b", "gamma", "gamma_scale", "normalize_weight", "max_out", "activation", "max_pool", "positions", "antialias",
    "linear",
)  # fmt: skip
HEAD_FIELDS = ("temperature", "logit_bias")
HEADS = (BcosConvClassifier, BcosLinearClassifier)

Settings = dict[str, Any]


def is_settings(name: str) -> bool:
    """Whether the entry of a state dict with this name holds settings instead of a weight."""
    return SETTINGS in name.split(".")


def _settings_of(model: nn.Module, config: BcosConfig) -> Settings:
    """Settings of a model in JSON's types."""
    named = list(model.named_modules())
    settings = dict(
        {name: getattr(config, name) for name in (*FIELDS, *HEAD_FIELDS)},
        fused=any(getattr(module, "is_fused", False) for _, module in named),
        images={name: _statistics(m) for name, m in named if isinstance(m, BcosStem | ImageReader)},
    )
    return json.loads(json.dumps(settings))


def _statistics(module: Any) -> Settings:
    channels = module.image_channels
    return {
        name: None if values is None else [float(f"{value:.6g}") for value in values] * (channels // len(values))
        for name, values in module.statistics.items()
    }


def encode_settings(model: nn.Module, config: BcosConfig, device: torch.device | str | None = None) -> Tensor:
    """The settings of a model that was converted with `config`, as bytes (L,) of type uint8."""
    text = json.dumps(_settings_of(model, config), separators=(",", ":")).encode()
    padded = text.ljust(-(-len(text) // LENGTH) * LENGTH)
    return torch.tensor(list(padded), dtype=torch.uint8, device=device)


def decode_settings(entry: Tensor) -> Settings:
    """The settings in an entry; empty if it cannot be read, for instance after `to_empty`."""
    try:
        found = json.loads(bytes(entry.detach().cpu().round().long().tolist()))  # averages are floats
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return {}
    return found if isinstance(found, dict) else {}


class Contradiction(NamedTuple):
    """A setting that differs between weights and a model."""

    name: str
    theirs: object
    own: object


def contradictions(
    model: nn.Module, config: BcosConfig, weights: Mapping[str, Tensor], prefix: str = ""
) -> list[Contradiction]:
    """Settings in which weights differ from a model.

    Args:
        model: A converted model.
        config: Config of its conversion.
        weights: State dict, with or without settings.
        prefix: Prefix of the model's names in the state dict.
    """
    entry = weights.get(prefix + SETTINGS)
    if entry is None:
        return []
    return list(_differences(model, decode_settings(entry), _settings_of(model, config), weights, prefix))


def _differences(
    model: nn.Module, theirs: Settings, own: Settings, weights: Mapping[str, Tensor], prefix: str
) -> Iterator[Contradiction]:
    # without a classifier in the weights, the model keeps its own
    for name in ("fused", *FIELDS, *(HEAD_FIELDS if _have_classifier(weights, model, prefix) else ())):
        if name in theirs and theirs[name] != own[name]:
            yield Contradiction(name, theirs[name], own[name])
    for path, statistics in own["images"].items():
        for name, values in theirs.get("images", {}).get(path, {}).items():
            fits = (
                not values or not statistics[name] or len(values) == len(statistics[name])
            )  # False for color and gray images
            if fits and values != statistics[name]:
                yield Contradiction(name, values, statistics[name])


def _have_classifier(weights: Mapping[str, Tensor], model: nn.Module, prefix: str = "") -> bool:
    """Whether weights have a classifier that fits the model's."""
    heads = {f"{prefix}{name}.weight": module for name, module in model.named_modules() if isinstance(module, HEADS)}
    return any(key in weights and weights[key].shape == head.weight.shape for key, head in heads.items())


def adopt_logit_bias(
    model: Any, weights: Mapping[str, Tensor], chosen: Collection[str] = (), trained: BcosConfig | None = None
) -> None:
    """Give the classifier the logit bias with which the weights were trained, unless the user chose another one.

    The default depends on whether the classifier is new, which is known only when there are weights.

    Args:
        model: A converted model, which is changed.
        weights: State dict of the model, with or without settings.
        chosen: Names of settings that the user chose.
        trained: Config of weights without settings; None for the model's own.
    """
    settings = decode_settings(weights[SETTINGS]) if SETTINGS in weights else {}
    value = settings.get("logit_bias", (trained or model.bcos_config).logit_bias)
    is_number = value is None or (isinstance(value, float | int) and not isinstance(value, bool))
    is_same = value == model.bcos_config.logit_bias
    if is_same or "logit_bias" in chosen or not is_number or not _have_classifier(weights, model):
        return
    config: BcosConfig = model.bcos_config.change(logit_bias=value)
    for module in model.modules():
        if isinstance(module, HEADS):
            module.logit_bias = config.class_bias(model.num_classes)
    model.bcos_config = config
    model.register_buffer(SETTINGS, encode_settings(model, config, getattr(model, SETTINGS).device))


def refuse_contradictions(
    model: nn.Module, config: BcosConfig, weights: Mapping[str, Tensor], prefix: str = "", source: str = "state dict"
) -> None:
    """Refuse weights whose settings differ from the model's, see `contradictions`.

    Raises:
        CheckpointError: Names both values of each setting.
    """
    found = contradictions(model, config, weights, prefix)
    if found:
        raise CheckpointError(
            f"{source}: these weights are of {in_words(found, 'theirs')}, while this model has "
            f"{in_words(found, 'own')}: create it with the same, or remove {prefix + SETTINGS!r} from the state dict "
            f"to start another function from these weights"
        )


def in_words(found: Collection[Contradiction], whose: str) -> str:
    """The values of one side (`theirs` or `own`) as keyword arguments."""
    return ", ".join(dict.fromkeys(f"{one.name}={getattr(one, whose)!r}" for one in found))
