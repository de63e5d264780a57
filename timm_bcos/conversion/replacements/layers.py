"""Rules for convolutions, linear, recurrent and pooling layers, including stems and classifiers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._compat import Library, timm_layers
from ...nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ...nn.layers import BcosConv2d, BcosLinear
from ...nn.module_utils import buffer_device, clone
from ...nn.stems import BcosStem
from ..blocks import AVERAGED, antialiased_max_pool, is_patchifying
from ..config import BcosConfig
from .base import LayerRole, is_linear, refuse, with_class

pool2d_same: Any = Library("timm.layers.pool2d_same")


def _adopt(
    layer: BcosConv2d | BcosLinear, old: nn.Conv2d | nn.Linear, weight: Tensor, config: BcosConfig
) -> BcosConv2d | BcosLinear:
    """Give a new layer a weight and, if biases are kept, the old layer's bias."""
    layer.weight = weight if weight is old.weight else nn.Parameter(weight, old.weight.requires_grad)
    layer.bias = old.bias if config.adds_bias else None
    if isinstance(layer, BcosConv2d) and layer.low_pass is not None:
        layer.low_pass.to_empty(device=buffer_device(old.weight)).init_non_persistent_buffers()
    return layer.train(old.training)


def _options(layer_role: LayerRole, config: BcosConfig, fan_in: int) -> dict[str, Any]:
    if layer_role.role != "stem" and is_linear(layer_role.name, config):
        return dict(b=1.0, normalize_weight=False)
    return dict(
        b=config.b, max_out=config.max_out, gamma=config.layer_gamma(fan_in), normalize_weight=config.normalize_weight
    )


def _logits(config: BcosConfig, num_classes: int) -> dict[str, float]:
    return dict(temperature=config.temperature, logit_bias=config.class_bias(num_classes))


def _rows(weight: Tensor, options: dict[str, Any]) -> Tensor:
    """The weight with M equal rows per output for MaxOut, which does not change the function."""
    max_out = options.get("max_out", 1)
    return weight if max_out == 1 else weight.detach().repeat_interleave(max_out, 0)


def replace_conv(conv: nn.Conv2d, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Convolutions, with their own padding or TensorFlow's."""
    if layer_role.role in ("classifier", "positions", "map") and conv.kernel_size == (1, 1):
        return _conv_classifier(conv, layer_role, config)
    is_stem = layer_role.role == "stem"
    channels = 2 * conv.in_channels if is_stem else conv.in_channels  # images are encoded
    fan_in = channels * conv.kernel_size[0] * conv.kernel_size[1]
    options = _options(layer_role, config, fan_in)
    options = dict(
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, padding_mode=conv.padding_mode, pad_same=type(conv) is not nn.Conv2d,
        antialias=config.antialias and not is_patchifying(conv), dtype=conv.weight.dtype, **options,
    )  # fmt: skip
    if is_stem:
        return _stem(conv, layer_role, config, options)
    layer = BcosConv2d(conv.in_channels, conv.out_channels, device="meta", **options)
    return _adopt(layer, conv, _rows(conv.weight, options), config)


def _stem(conv: nn.Conv2d, layer_role: LayerRole, config: BcosConfig, options: dict[str, Any]) -> nn.Module:
    """A stem whose response to an encoded image (x, 1 - x) starts as the convolution's response to x."""
    device = conv.weight.device
    mean, std = layer_role.mean, layer_role.std
    stem = BcosStem(conv.in_channels, conv.out_channels, mean=mean, std=std, device=device, **options)
    weight = torch.cat([conv.weight, -conv.weight], 1).detach() / 2
    return _adopt(stem, conv, _rows(weight, options), config)


def replace_standardized_conv(conv: Any, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Convolutions with weight standardization, which is applied once: the result is the initial weight."""
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=False, device="meta", dtype=conv.weight.dtype,
    )  # fmt: skip
    plain.__class__ = timm_layers.Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    gain = (conv.gain * conv.scale).flatten() if hasattr(conv, "gain") else None
    rows = F.batch_norm(conv.weight.flatten(1)[None], None, None, gain, None, True, 0.0, conv.eps)
    plain.weight = nn.Parameter(rows.detach().reshape(conv.weight.shape), conv.weight.requires_grad)
    plain.bias = conv.bias
    return replace_conv(plain.train(conv.training), layer_role, config)


def remove_layer_bias(
    layer: nn.Conv1d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d, layer_role: LayerRole, config: BcosConfig
) -> nn.Module:
    """Layers without a B-cos form, which stay linear; only their bias may be removed."""
    return layer if config.adds_bias or layer.bias is None else clone(layer, bias=None)


def replace_lstm(lstm: nn.LSTM, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """LSTMs, which explanation mode covers (`dynamic_linear.recurrent`); only their biases may be removed."""
    if config.adds_bias or not lstm.bias:
        return lstm
    new = nn.LSTM(
        lstm.input_size, lstm.hidden_size, lstm.num_layers, False, lstm.batch_first, lstm.dropout, lstm.bidirectional,
        lstm.proj_size, device="meta",
    )  # fmt: skip
    for name, _ in list(new.named_parameters()):
        setattr(new, name, getattr(lstm, name))
    return new.train(lstm.training)


def _conv_classifier(
    module: nn.Linear | nn.Conv2d, layer_role: LayerRole, config: BcosConfig
) -> BcosConv2d | BcosLinear:
    features, num_classes = module.weight.shape[1], module.weight.shape[0]
    options = _options(layer_role, config, features)
    layer = BcosConvClassifier(
        features, num_classes, pool=layer_role.role != "map", device="meta", dtype=module.weight.dtype,
        **_logits(config, num_classes), **options,
    )  # fmt: skip
    weight = module.weight.detach().reshape(num_classes, features, 1, 1)
    return _adopt(layer, module, _rows(weight, options), config)


def replace_linear(linear: nn.Linear, layer_role: LayerRole, config: BcosConfig) -> BcosConv2d | BcosLinear:
    """Linear layers; a classifier that pools becomes a 1 × 1 convolution."""
    if layer_role.role in ("positions", "map"):
        return _conv_classifier(linear, layer_role, config)
    options = _options(layer_role, config, linear.in_features)
    kind: type[BcosLinear] = BcosLinear
    if layer_role.role == "classifier":
        kind, options = BcosLinearClassifier, options | _logits(config, linear.out_features)
    layer = kind(linear.in_features, linear.out_features, device="meta", dtype=linear.weight.dtype, **options)
    return _adopt(layer, linear, _rows(linear.weight, options), config)


# Pooling


def replace_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Max pooling in one or two dimensions, with its own padding or TensorFlow's."""
    if config.max_pool == "keep":
        return antialiased_max_pool(pool) if config.antialias else pool
    if pool.return_indices or pool.dilation not in (1, (1,), (1, 1)):
        refuse(layer_role, pool, "returns indices or is dilated, which average pooling cannot: write a rule for it")
    if isinstance(pool, pool2d_same.MaxPool2dSame):
        return timm_layers.AvgPool2dSame(pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)
    kind: Any = nn.AvgPool1d if isinstance(pool, nn.MaxPool1d) else nn.AvgPool2d
    return kind(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def replace_functional_max_pool(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Blocks that call their max pooling as a function."""
    return block if config.max_pool == "keep" else with_class(block, AVERAGED)


def replace_global_pool(pool: Any, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's global average pooling; a classifier behind it may pool instead."""
    return BcosPool2d.from_pool(pool) if isinstance(pool.pool, nn.AdaptiveAvgPool2d) else pool


def replace_flatten(flatten: nn.Flatten, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Flattening; a classifier behind it may need the map."""
    return BcosFlatten(flatten.start_dim, flatten.end_dim).train(flatten.training)
