"""What a rule is, and what several rules share.

A rule takes a module, its role and the config, and returns the module's replacement, which reuses the module's
parameters, or the module itself, which explanation mode (`timm_bcos.dynamic_linear`) makes dynamic linear. It never
changes the module. It raises `UnsupportedModuleError` for a module that it cannot convert (`refuse`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NoReturn

import torch
from torch import nn

from ...errors import UnsupportedModuleError
from ...nn.module_utils import buffer_device, clone
from ..config import BcosConfig


@dataclass(frozen=True)
class LayerRole:
    """A module's path and its role in the model.

    Attributes:
        name: Path of the module.
        role: 'stem' reads the image, 'classifier' gives the logits, 'positions' is a classifier whose global average
            pooling can come after it, 'map' is a classifier without pooling, 'linear' stays linear, 'hidden' is
            everything else.
        mean: For a stem, the mean of the images that its weights expect, or None.
        std: For a stem, the standard deviation of the images that its weights expect, or None.
    """

    name: str
    role: str = "hidden"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def is_linear(name: str, config: BcosConfig) -> bool:
    """Whether the module with this path stays linear."""
    return any(fnmatch(name, pattern) for pattern in config.linear)


def hidden_role(name: str, config: BcosConfig) -> LayerRole:
    """The role of a module that neither reads the image nor gives the logits."""
    return LayerRole(name, "linear" if is_linear(name, config) else "hidden")


Rule = Callable[[Any, LayerRole, BcosConfig], nn.Module]


def keep(module: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Keep the module; its children are converted by their own rules."""
    return module


def keep_leaf(module: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Keep the module with everything in it: a gate or a statistic, which only scales the linear path."""
    return module


def refuse(layer_role: LayerRole, module: nn.Module, advice: str) -> NoReturn:
    """Refuse to convert a module; the plan collects the problems of all modules."""
    kind = type(module)
    raise UnsupportedModuleError([f"{layer_role.name or '(root)'}: {kind.__module__}.{kind.__name__} {advice}"])


def with_class(module: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """A clone with the class that a table gives for the module's own; the module itself if it gives none."""
    kind = table.get(type(module))
    if kind is None:
        return module
    new = clone(module)
    new.__class__ = kind
    return new


BIASES = ("bias", "beta", "q_bias", "v_bias", "mlp_bias")  # names of additive biases of modules


def remove_biases(module: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Remove the additive biases that a module owns itself; its children are converted by their own rules.

    timm's forward methods accept None for `q_bias` and similar ones. They always add a `bias`, so it becomes a buffer
    of zeros.
    """
    if config.adds_bias:
        return module
    owned = [name for name in BIASES if module._parameters.get(name) is not None]
    new = clone(module, **dict.fromkeys(owned))
    for name in owned:
        if "_" not in name:
            del new._parameters[name]
            zeros = torch.zeros_like(getattr(module, name), device=buffer_device(getattr(module, name)))
            new.register_buffer(name, zeros, persistent=False)
    return new
