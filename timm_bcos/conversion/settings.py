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
from ..nn.layers import BcosConv2d, BcosLinear
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
CONFIGURED = ("activation", "max_pool", "positions", "antialias", "normalize_weight", "max_out", "linear")
HEADS = (BcosConvClassifier, BcosLinearClassifier)

Settings = dict[str, Any]


def is_settings(name: str) -> bool:
    """Whether a state dict's entry of that name is no weight."""
    return SETTINGS in name.split(".")


def _describe(network: nn.Module, config: BcosConfig) -> Settings:
    """Taken from the layers themselves wherever they know; in JSON's types."""
    named = list(network.named_modules())
    hidden: list[Any] = [m for _, m in named if isinstance(m, BcosConv2d | BcosLinear) and not isinstance(m, HEADS)]
    exponents = {m.b for m in hidden} - {1.0} or {m.b for m in hidden}  # layers that stay linear aside
    settings = dict(
        b=sorted(exponents),
        gamma=sorted({_short(m.gamma) for m in hidden}),
        fused=any(m.is_fused for m in hidden),
        heads={name: _head(m) for name, m in named if isinstance(m, HEADS)},
        images={name: _statistics(m) for name, m in named if isinstance(m, BcosStem | ImageReader)},
        **{name: getattr(config, name) for name in CONFIGURED},
    )
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _head(module: Any) -> Settings:
    return {name: _short(getattr(module, name)) for name in ("b", "gamma", "temperature", "logit_bias")}


def _statistics(module: Any) -> Settings:
    channels = module.image_channels
    return {
        name: None if values is None else [_short(value) for value in values] * (channels if len(values) == 1 else 1)
        for name, values in module.statistics.items()
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def encode_settings(network: nn.Module, config: BcosConfig, device: torch.device | str | None = None) -> Tensor:
    """The settings of a network whose conversion was `config`, as bytes (L,) of type uint8."""
    text = json.dumps(_describe(network, config), separators=(",", ":")).encode()
    padded = text.ljust(-(-len(text) // LENGTH) * LENGTH)
    return torch.tensor(list(padded), dtype=torch.uint8, device=device)


def _decode(entry: Tensor) -> Settings:
    """What an entry says; nothing if it says nothing that can be read, as after `to_empty`."""
    try:
        found = json.loads(bytes(entry.detach().cpu().round().long().tolist()))  # averages are floats
    except (ValueError, RuntimeError, NotImplementedError):
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
    return [] if entry is None else list(_differences(_decode(entry), _describe(network, config), weights, prefix))


def _differences(
    theirs: Settings, own: Settings, weights: Mapping[str, Tensor], prefix: str
) -> Iterator[Contradiction]:
    for name in ("b", "gamma"):
        their_set, own_set = set(theirs.get(name, ())), set(own[name])
        if not (their_set <= own_set or own_set <= their_set):  # a part of a network has fewer
            yield Contradiction(name, _single(theirs[name]), _single(own[name]))
    for name in ("fused", *CONFIGURED):
        if name in theirs and theirs[name] != own[name]:
            yield Contradiction(name, theirs[name], own[name])
    for path, statistics in own["images"].items():
        for name, values in theirs.get("images", {}).get(path, {}).items():
            fits = not values or not statistics[name] or len(values) == len(statistics[name])  # colour, or grey
            if fits and values != statistics[name]:
                yield Contradiction(name, values, statistics[name])
    for path, head in own["heads"].items():
        if f"{prefix}{path}.weight" in weights:  # else the network keeps its own classifier
            found = theirs.get("heads", {}).get(path, {})
            yield from (Contradiction(name, found[name], head[name]) for name in found if found[name] != head.get(name))


def _single(values: list[float]) -> object:
    """One value as itself, many by their ends."""
    return values[0] if len(values) == 1 else values if len(values) < 4 else [values[0], ..., values[-1]]


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
