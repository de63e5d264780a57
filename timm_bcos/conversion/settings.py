"""What a B-cos network computes besides its weights, as a tensor that travels with them.

Weights of one B load into a network of another: names and shapes are the same. So a converted network's state dict has
one entry more, `bcos_settings`: B, γ, T, how images are read, and what else no weight shows, as the bytes of a JSON
text. A tensor survives whatever is done to checkpoints (safetensors, averaging, prefixes); metadata would not. Weights
without that entry (official releases, plain networks) load as ever.
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
    "contradictions",
    "encode_settings",
    "in_words",
    "is_settings",
    "refuse_contradictions",
]

SETTINGS = "bcos_settings"  # the entry of state dicts
LENGTH = 4096  # bytes, spaces included: for transformers an entry of another length is one of another network
# Fields of the conversion that no name or shape of a weight shows; the second ones matter where a classifier is loaded.
FIELDS = (
    "b", "gamma", "gamma_scale", "normalize_weight", "max_out", "activation", "max_pool", "positions", "antialias",
    "linear",
)  # fmt: skip
HEAD_FIELDS = ("temperature", "logit_bias")
HEADS = (BcosConvClassifier, BcosLinearClassifier)

Settings = dict[str, Any]


def is_settings(name: str) -> bool:
    """Whether a state dict's entry of that name is no weight."""
    return SETTINGS in name.split(".")


def _describe(network: nn.Module, config: BcosConfig) -> Settings:
    """In JSON's types."""
    named = list(network.named_modules())
    settings = dict(
        {name: getattr(config, name) for name in (*FIELDS, *HEAD_FIELDS)},
        fused=any(getattr(module, "is_fused", False) for _, module in named),
        images={name: _statistics(m) for name, m in named if isinstance(m, BcosStem | ImageReader)},
    )
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _statistics(module: Any) -> Settings:
    channels = module.image_channels
    return {
        name: None if values is None else [float(f"{value:.6g}") for value in values] * (channels // len(values))
        for name, values in module.statistics.items()
    }


def encode_settings(network: nn.Module, config: BcosConfig, device: torch.device | str | None = None) -> Tensor:
    """The settings of a network whose conversion was `config`, as bytes (L,) of type uint8."""
    text = json.dumps(_describe(network, config), separators=(",", ":")).encode()
    padded = text.ljust(-(-len(text) // LENGTH) * LENGTH)
    return torch.tensor(list(padded), dtype=torch.uint8, device=device)


def decode_settings(entry: Tensor) -> Settings:
    """What an entry says; nothing if it says nothing that can be read, as after `to_empty`."""
    try:
        found = json.loads(bytes(entry.detach().cpu().round().long().tolist()))  # averages are floats
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return {}
    return found if isinstance(found, dict) else {}


class Contradiction(NamedTuple):
    """A setting that weights were made with, and a network's own."""

    name: str
    theirs: object
    own: object


def contradictions(
    network: nn.Module, config: BcosConfig, weights: Mapping[str, Tensor], prefix: str = ""
) -> list[Contradiction]:
    """Where weights say that they are of another function.

    Args:
        network: A converted network.
        config: Its conversion.
        weights: A state dict, with or without the entry.
        prefix: Of the network's names in it.
    """
    entry = weights.get(prefix + SETTINGS)
    return (
        []
        if entry is None
        else list(_differences(network, decode_settings(entry), _describe(network, config), weights, prefix))
    )


def _differences(
    network: nn.Module, theirs: Settings, own: Settings, weights: Mapping[str, Tensor], prefix: str
) -> Iterator[Contradiction]:
    heads = [name for name, module in network.named_modules() if isinstance(module, HEADS)]
    has_head = any(f"{prefix}{name}.weight" in weights for name in heads)  # else the network keeps its own
    for name in ("fused", *FIELDS, *(HEAD_FIELDS if has_head else ())):
        if name in theirs and theirs[name] != own[name]:
            yield Contradiction(name, theirs[name], own[name])
    for path, statistics in own["images"].items():
        for name, values in theirs.get("images", {}).get(path, {}).items():
            fits = not values or not statistics[name] or len(values) == len(statistics[name])  # color, or gray
            if fits and values != statistics[name]:
                yield Contradiction(name, values, statistics[name])


def refuse_contradictions(
    network: nn.Module, config: BcosConfig, weights: Mapping[str, Tensor], prefix: str = "", source: str = "state dict"
) -> None:
    """Refuse the weights of another function.

    Raises:
        CheckpointError: Naming both values of each setting.
    """
    found = contradictions(network, config, weights, prefix)
    if found:
        raise CheckpointError(
            f"{source}: these weights are of {in_words(found, 'theirs')}, while this network has "
            f"{in_words(found, 'own')}: create it with the same, or remove {prefix + SETTINGS!r} from the state dict "
            f"to start another function from these weights"
        )


def in_words(found: Collection[Contradiction], whose: str) -> str:
    """One side of contradictions, as keywords."""
    return ", ".join(dict.fromkeys(f"{one.name}={getattr(one, whose)!r}" for one in found))
