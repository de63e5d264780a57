"""The rule for modules that own an additive bias, which layers and norms are not."""

import torch
from torch import nn

from ...nn.module_utils import buffer_device, clone
from ..config import BcosConfig
from .base import LayerRole

OFFSETS = ("bias", "beta", "q_bias", "v_bias", "mlp_bias")


def replace_offset(module: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A module that owns an additive bias directly; its children are converted by their own rules.

    timm's forwards ask whether `q_bias` and its like are there; a `bias` of 0 takes part in the others.
    """
    if config.adds_bias:
        return module
    owned = [name for name in OFFSETS if module._parameters.get(name) is not None]
    new = clone(module, **dict.fromkeys(owned))
    for name in owned:
        if "_" not in name:
            del new._parameters[name]
            zeros = torch.zeros_like(getattr(module, name), device=buffer_device(getattr(module, name)))
            new.register_buffer(name, zeros, persistent=False)
    return new
