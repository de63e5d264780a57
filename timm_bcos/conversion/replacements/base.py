"""What a rule is: from a module, its role in the model and the config to the module's replacement.

A rule returns a replacement that adopts the module's parameters, or the module itself. It never changes the module.
Explanation mode (`timm_bcos.dynamic_linear`) makes modules that stay dynamic linear. A rule refuses a module by an
`UnsupportedModuleError`; the plan collects the lines of all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NoReturn

from torch import nn

from ...errors import UnsupportedModuleError
from ...nn.module_utils import clone
from ..config import BcosConfig


@dataclass(frozen=True)
class LayerRole:
    """A module's name and its role in the model.

    Attributes:
        name: Its path.
        role: 'stem' reads the image, 'classifier' gives the logits, 'positions' is a classifier whose global average
            pooling can come after it, 'map' one without pooling, 'linear' stays linear, 'hidden' is all else.
        mean: For a stem, the image mean that its weights expect, or None.
        std: Likewise.
    """

    name: str
    role: str = "hidden"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def hidden_role(name: str, config: BcosConfig) -> LayerRole:
    """The role of a module that neither reads the image nor gives the logits."""
    return LayerRole(name, "linear" if any(fnmatch(name, pattern) for pattern in config.linear) else "hidden")


Rule = Callable[[Any, LayerRole, BcosConfig], nn.Module]


def keep(module: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """The module stays; its children are converted by their own rules."""
    return module


def keep_leaf(module: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """The module stays with all it contains: a gate or a statistic, which only scales the linear path."""
    return module


def refuse(place: LayerRole, module: nn.Module, what_to_do: str) -> NoReturn:
    """Stop the conversion with a line about one module; the plan collects such lines."""
    kind = type(module)
    raise UnsupportedModuleError([f"{place.name or '(root)'}: {kind.__module__}.{kind.__name__} {what_to_do}"])


def with_class(block: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """The block with the class that the table gives for its own, if any."""
    kind = table.get(type(block))
    if kind is None:
        return block
    new = clone(block)
    new.__class__ = kind
    return new
