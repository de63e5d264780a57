"""DenseNet with a stem of fixed width.

In timm the stem has 2k channels, where k is the growth rate. In the paper it has 64 for all k, as the parameter counts
of Tab. B1 show (https://arxiv.org/abs/2205.10268, supplement).
"""

from typing import Any

from timm.layers import create_classifier, get_device_dtype
from torch import nn

from .._compat import Library
from ..nn.module_utils import Factory

densenet: Any = Library("timm.models.densenet")

__all__ = ["restore_stem_width"]


def restore_stem_width(model: Any, width: int) -> None:
    """Rebuild a DenseNet's layers for a stem of `width` channels, if it has another width.

    Args:
        model: Plain DenseNet without a deep stem. It is changed in place, weights included.
        width: Number of channels of the stem.
    """
    if model.features.conv0.out_channels == width:
        return
    dd = get_device_dtype(model)
    conv0 = model.features.conv0
    model.features.conv0 = nn.Conv2d(conv0.in_channels, width, 7, stride=2, padding=3, bias=False, **dd)
    model.features.norm0 = type(model.features.norm0)(width, **dd)
    model.num_features = _rebuild_blocks(model, width, dd)
    for info in model.feature_info:
        info["num_chs"] = _width_at(model, info["module"].removeprefix("features."), width)
    model.global_pool, model.classifier = create_classifier(
        model.num_features, model.num_classes, pool_type=model.global_pool.pool_type, **dd
    )
    model.head_hidden_size = model.num_features * model.global_pool.feat_mult()


def _rebuild_blocks(model: Any, channels: int, dd: Factory) -> int:
    """Rebuild each block and transition for its new number of input channels; return the number of output channels."""
    norm = type(model.features.norm5)
    for name, module in list(model.features.named_children()):
        if isinstance(module, densenet.DenseBlock):
            setattr(model.features, name, _rebuild_block(module, channels, dd))
            channels += len(module) * module.denselayer1.conv2.out_channels
        elif isinstance(module, densenet.DenseTransition):
            setattr(model.features, name, densenet.DenseTransition(channels, channels // 2, norm, **dd))
            channels //= 2
    model.features.norm5 = norm(channels, **dd)
    return channels


def _rebuild_block(block: Any, channels: int, dd: Factory) -> nn.Module:
    first: Any = block.denselayer1
    growth = first.conv2.out_channels
    bottleneck = first.conv1.out_channels // growth
    return densenet.DenseBlock(
        len(block), channels, bottleneck, growth, type(first.norm1), first.drop_rate, first.grad_checkpointing, **dd
    )


def _width_at(model: Any, name: str, stem_width: int) -> int:
    """Number of output channels of a child of `features`."""
    module = getattr(model.features, name)
    if not isinstance(module, densenet.DenseBlock):
        return stem_width if name == "norm0" else model.num_features
    last: Any = list(module.children())[-1]
    return last.conv1.in_channels + last.conv2.out_channels
