"""What timm's models have beside `nn.Module`, for type hints: timm itself has no class for it."""

from typing import Any

from torch import nn

from ..conversion.converted import BcosModel

__all__ = ["BcosNetwork", "TimmModel"]


class TimmModel(nn.Module):
    """A network that timm has created; for hints alone, no network is an instance.

    Attributes:
        num_classes: K.
        in_chans: Image channels.
        pretrained_cfg: Where its weights are from, and how images are made ready for it.
    """

    num_classes: int
    in_chans: int
    pretrained_cfg: dict[str, Any]


class BcosNetwork(BcosModel, TimmModel):
    """Such a network after its conversion."""
