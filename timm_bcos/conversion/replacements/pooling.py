"""Rules for max pooling, global pooling, and the flattening before a classifier."""

from typing import Any

from torch import nn

from ..._compat import Library, timm_layers
from ...nn.heads import BcosFlatten, BcosPool2d
from ..blocks import AVERAGED, antialiased_max_pool
from ..config import BcosConfig
from .base import LayerRole, refuse, with_class

pool2d_same: Any = Library("timm.layers.pool2d_same")


def replace_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Max pooling in one or two dimensions, with its own padding or TensorFlow's."""
    if config.max_pool == "keep":
        return antialiased_max_pool(pool) if config.antialias else pool
    if pool.return_indices or pool.dilation not in (1, (1,), (1, 1)):
        refuse(layer_role, pool, "returns indices or is dilated, which average pooling cannot: write a rule for it")
    if isinstance(pool, pool2d_same.MaxPool2dSame):
        return timm_layers.AvgPool2dSame(pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)  # type: ignore[no-any-return]
    kind: Any = nn.AvgPool1d if isinstance(pool, nn.MaxPool1d) else nn.AvgPool2d
    return kind(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)  # type: ignore[no-any-return]


def replace_functional_max_pool(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Blocks that call their max pooling as a function."""
    return block if config.max_pool == "keep" else with_class(block, AVERAGED)


def replace_global_pool(pool: Any, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's global average pooling; a classifier behind it may pool instead."""
    return BcosPool2d.from_pool(pool) if isinstance(pool.pool, nn.AdaptiveAvgPool2d) else pool


def replace_flatten(flatten: nn.Flatten, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Flattening; a classifier behind it may need the map."""
    return BcosFlatten(flatten.start_dim, flatten.end_dim).train(flatten.training)
