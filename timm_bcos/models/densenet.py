"""DenseNet with a stem of fixed width.

timm ties the stem's width to the growth rate k (2k channels). The paper varies k with the stem at 64 channels: only so
do the parameter counts of its Tab. B1 come out (https://arxiv.org/abs/2205.10268, supplement).
"""

from typing import Any

from timm.layers import create_classifier, get_device_dtype
from torch import nn

from .._compat import Library
from ..nn.module_utils import Factory

densenet: Any = Library("timm.models.densenet")

__all__ = ["restore_stem_width"]


def restore_stem_width(model: Any, width: int) -> None:
    """Rebuild a DenseNet's layers for a stem of `width` channels; nothing happens if it has them.

    Args:
        model: A plain DenseNet without a deep stem. Changed in place, weights included.
        width: Channels of the stem.
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
    """Replace each block and transition by one for its new number of input channels; returns the last output's."""
    for name, module in list(model.features.named_children()):
        if isinstance(module, densenet.DenseBlock):
            first: Any = module.denselayer1
            growth = first.conv2.out_channels
            bottleneck = first.conv1.out_channels // growth
            block = densenet.DenseBlock(
                len(module), channels, bottleneck, growth, type(first.norm1), first.drop_rate,
                first.grad_checkpointing, **dd,
            )  # fmt: skip
            setattr(model.features, name, block)
            channels += len(module) * growth
        elif isinstance(module, densenet.DenseTransition):
            setattr(
                model.features,
                name,
                densenet.DenseTransition(channels, channels // 2, type(model.features.norm5), **dd),
            )
            channels //= 2
    model.features.norm5 = type(model.features.norm5)(channels, **dd)
    return channels


def _width_at(model: Any, name: str, stem_width: int) -> int:
    """Output channels of a child of `features`."""
    module = getattr(model.features, name)
    if not isinstance(module, densenet.DenseBlock):
        return stem_width if name == "norm0" else model.num_features
    last: Any = list(module.children())[-1]
    return last.conv1.in_channels + last.conv2.out_channels
