"""zennit and B-cos layers: its rules for linear layers apply to subclasses, too, and give meaningless relevance.

A rule runs the layer with a modified weight and takes the result for a linear function of the input. B-cos layers
normalize their weight and scale their response by the cosine.
"""

import warnings
from functools import wraps
from typing import Any

from torch import nn

from ..errors import InexactWarning
from ..nn.base import BcosLayer
from .registration import marked, original

__all__ = ["warn_of_rules"]


def warn_of_rules() -> None:
    """Make zennit's rules warn when they are applied to B-cos layers."""
    from zennit import core

    register = original(core.Hook.register)

    @wraps(register)
    def warning(self: Any, module: nn.Module) -> Any:
        if isinstance(module, BcosLayer) and type(self).__module__ == "zennit.rules":
            warnings.warn(
                f"zennit's rule {type(self).__name__} takes a {type(module).__name__} for a linear layer: its "
                f"relevance does not sum up to the logit and means nothing; use timm_bcos.explain, see "
                f"docs/other-libraries.md",
                InexactWarning,
                stacklevel=3,
            )
        return register(self, module)

    core.Hook.register = marked(warning)
