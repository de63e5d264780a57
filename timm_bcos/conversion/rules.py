"""The conversion rules: a table from module type to what replaces it.

Keys are *exact* types, because timm's subclasses hide things: `BatchNormAct2d` is a batch norm with an activation
inside. A rule takes the module, its `Place` in the network and the config, and returns the replacement, which adopts
the module's parameters, or the module itself; it never changes what it was given. What a rule returns unchanged is
made dynamic linear, where needed, by explanation mode (`timm_bcos.dynamic`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import activations, norm_act
from timm.models import _efficientnet_blocks
from torch import Tensor, nn

from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.modules import clone
from ..nn.norms import UncentredBatchNorm1d, UncentredBatchNorm2d, UncentredBatchNormAct2d
from ..nn.stems import BcosStem, ImageReader
from .blocks import AVERAGED, WIDE
from .config import BcosConfig
from .positions import PositionedQkv

__all__ = ["RULES", "Place", "Rule", "keep", "keep_whole"]


@dataclass(frozen=True)
class Place:
    """Where a module stands.

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


Rule = Callable[[Any, Place, BcosConfig], nn.Module]


def keep(module: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    """The module stays; its children are converted by their own rules."""
    return module


def keep_whole(module: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    """The module stays with all it contains: a gate or a statistic, which only scales the linear path."""
    return module


def _adopt(layer: Any, old: Any, weight: Tensor, config: BcosConfig) -> nn.Module:
    """Give a new layer the old one's weight and, if biases are kept, its bias."""
    layer.weight = weight if weight is old.weight else nn.Parameter(weight, old.weight.requires_grad)  # type: ignore[assignment]
    layer.bias = old.bias if config.bias else None  # type: ignore[assignment]
    return layer.train(old.training)


def _unit(config: BcosConfig, fan_in: int) -> dict[str, Any]:
    return dict(
        b=config.b, max_out=config.max_out, gamma=config.layer_gamma(fan_in), normalize_weight=config.normalize_weight
    )


LINEAR_UNIT: dict[str, Any] = dict(b=1.0, normalize_weight=False)


def _logits(config: BcosConfig, num_classes: int) -> dict[str, float]:
    return dict(temperature=config.temperature, logit_bias=config.class_bias(num_classes))


def _rows(weight: Tensor, unit: dict[str, Any]) -> Tensor:
    """MaxOut needs M rows per output; equal ones leave the function as it is."""
    max_out = unit.get("max_out", 1)
    return weight if max_out == 1 else weight.detach().repeat_interleave(max_out, 0)


def _conv(conv: nn.Conv2d, place: Place, config: BcosConfig) -> nn.Module:
    channels = 2 * conv.in_channels if place.role == "stem" else conv.in_channels  # an image is encoded
    fan_in = channels * conv.kernel_size[0] * conv.kernel_size[1]
    unit = LINEAR_UNIT if place.role == "linear" else _unit(config, fan_in)
    if place.role in ("classifier", "positions", "map") and conv.kernel_size == (1, 1):
        return _conv_classifier(conv, place, config)
    settings = dict(
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, padding_mode=conv.padding_mode, pad_same=type(conv) is not nn.Conv2d,
        device="meta", dtype=conv.weight.dtype, **unit,
    )  # fmt: skip
    if place.role != "stem":
        layer = BcosConv2d(conv.in_channels, conv.out_channels, **settings)
        return _adopt(layer, conv, _rows(conv.weight, unit), config)
    settings["device"] = conv.weight.device
    mean, std = (_per_channel(values, conv.in_channels) for values in (place.mean, place.std))
    stem = BcosStem(conv.in_channels, conv.out_channels, mean=mean, std=std, **settings)
    weight = torch.cat([conv.weight, -conv.weight], 1).detach() / 2
    return _adopt(stem, conv, _rows(weight, unit), config)


def _standardised_conv(conv: Any, place: Place, config: BcosConfig) -> nn.Module:
    """Weight standardisation is applied once and for all: what it gives is the weight to start from."""
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=False, device="meta", dtype=conv.weight.dtype,
    )  # fmt: skip
    plain.__class__ = timm_layers.Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    gain = (conv.gain * conv.scale).flatten() if hasattr(conv, "gain") else None
    rows = F.batch_norm(conv.weight.flatten(1)[None], None, None, gain, None, True, 0.0, conv.eps)
    plain.weight = nn.Parameter(rows.detach().reshape(conv.weight.shape), conv.weight.requires_grad)
    plain.bias = conv.bias
    return _conv(plain.train(conv.training), place, config)


def _linear_layer(layer: Any, place: Place, config: BcosConfig) -> nn.Module:
    """A layer that has no B-cos form here stays linear; only its bias may go."""
    return layer if config.bias or layer.bias is None else clone(layer, bias=None)


def _lstm(lstm: nn.LSTM, place: Place, config: BcosConfig) -> nn.Module:
    """Explanation mode takes LSTMs apart (`timm_bcos.dynamic.lstm`); without biases a new one adopts the weights."""
    if config.bias or not lstm.bias:
        return lstm
    new = nn.LSTM(
        lstm.input_size, lstm.hidden_size, lstm.num_layers, False, lstm.batch_first, lstm.dropout, lstm.bidirectional,
        lstm.proj_size, device="meta",
    )  # fmt: skip
    for name, _ in list(new.named_parameters()):
        setattr(new, name, getattr(lstm, name))
    return new.train(lstm.training)


def _per_channel(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """Statistics of colour images for another number of channels: their average."""
    if values is None or len(values) in (1, channels):
        return values
    return (sum(values) / len(values),)


def _conv_classifier(module: nn.Linear | nn.Conv2d, place: Place, config: BcosConfig) -> nn.Module:
    features, num_classes = module.weight.shape[1], module.weight.shape[0]
    unit = _unit(config, features)
    layer = BcosConvClassifier(
        features, num_classes, pool=place.role != "map", device="meta", dtype=module.weight.dtype,
        **_logits(config, num_classes), **unit,
    )  # fmt: skip
    weight = module.weight.detach().reshape(num_classes, features, 1, 1)
    return _adopt(layer, module, _rows(weight, unit), config)


def _linear(linear: nn.Linear, place: Place, config: BcosConfig) -> nn.Module:
    if place.role in ("positions", "map"):
        return _conv_classifier(linear, place, config)
    unit = LINEAR_UNIT if place.role == "linear" else _unit(config, linear.in_features)
    kind: type[BcosLinear] = BcosLinear
    if place.role == "classifier":
        kind, unit = BcosLinearClassifier, unit | _logits(config, linear.out_features)
    layer = kind(linear.in_features, linear.out_features, device="meta", dtype=linear.weight.dtype, **unit)
    return _adopt(layer, linear, _rows(linear.weight, unit), config)


def _batch_norm(norm: nn.BatchNorm2d, place: Place, config: BcosConfig) -> nn.Module:
    if config.norm == "remove":
        return nn.Identity()
    if config.norm == "keep" and config.bias:
        return norm
    return UncentredBatchNorm2d.from_batch_norm(norm)


def _batch_norm_1d(norm: nn.BatchNorm1d, place: Place, config: BcosConfig) -> nn.Module:
    if config.norm == "remove":
        return nn.Identity()
    return norm if config.norm == "keep" and config.bias else UncentredBatchNorm1d.from_batch_norm(norm)


def _batch_norm_act(norm: timm_layers.BatchNormAct2d, place: Place, config: BcosConfig) -> nn.Module:
    if config.norm == "remove":
        return _removed_norm_act(norm, config)
    if config.norm == "keep" and config.bias:
        return norm
    new = UncentredBatchNormAct2d.from_batch_norm(norm)
    new.drop, new.act = norm.drop, norm.act
    return new


def _removed_norm_act(norm: Any, config: BcosConfig) -> nn.Module:
    return nn.Identity() if config.activation == "remove" else nn.Sequential(norm.drop, norm.act)


def _norm(norm: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    """A norm over x's own features is dynamic linear as it is, except for its bias."""
    if config.norm == "remove":
        return nn.Identity()
    return norm if config.bias or getattr(norm, "bias", None) is None else clone(norm, bias=None)


def _norm_act(norm: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    return _removed_norm_act(norm, config) if config.norm == "remove" else _norm(norm, place, config)


def _activation(act: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    return nn.Identity() if config.activation == "remove" else act


def _max_pool(pool: nn.MaxPool2d, place: Place, config: BcosConfig) -> nn.Module:
    if config.max_pool == "keep":
        return pool
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def _global_pool(pool: timm_layers.SelectAdaptivePool2d, place: Place, config: BcosConfig) -> nn.Module:
    return BcosPool2d.from_pool(pool) if isinstance(pool.pool, nn.AdaptiveAvgPool2d) else pool


def _flatten(flatten: nn.Flatten, place: Place, config: BcosConfig) -> nn.Module:
    return BcosFlatten(flatten.start_dim, flatten.end_dim).train(flatten.training)


def _averaged(block: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    return block if config.max_pool == "keep" else _with_class(block, AVERAGED[type(block)])


def _wide(block: nn.Module, place: Place, config: BcosConfig) -> nn.Module:
    return _with_class(block, WIDE[type(block)])


def _with_class(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new = clone(block)
    new.__class__ = kind
    return new


def _table(rule: Rule, *types: type[nn.Module]) -> dict[type[nn.Module], Rule]:
    return dict.fromkeys(types, rule)


RULES: dict[type[nn.Module], Rule] = {
    **_table(_conv, nn.Conv2d, timm_layers.Conv2dSame),
    **_table(
        _standardised_conv,
        timm_layers.StdConv2d, timm_layers.StdConv2dSame, timm_layers.ScaledStdConv2d, timm_layers.ScaledStdConv2dSame,
    ),
    **_table(_linear, nn.Linear, timm_layers.Linear),
    **_table(_linear_layer, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d),
    **_table(_lstm, nn.LSTM),
    **_table(_batch_norm, nn.BatchNorm2d),
    **_table(_batch_norm_1d, nn.BatchNorm1d),
    **_table(_batch_norm_act, timm_layers.BatchNormAct2d),
    **_table(
        _norm,
        nn.LayerNorm, nn.GroupNorm, timm_layers.LayerNorm, timm_layers.LayerNorm2d, timm_layers.GroupNorm,
        timm_layers.GroupNorm1, timm_layers.RmsNorm, timm_layers.RmsNorm2d, timm_layers.SimpleNorm,
        timm_layers.SimpleNorm2d,
    ),
    **_table(_norm_act, norm_act.GroupNormAct, norm_act.GroupNorm1Act, norm_act.LayerNormAct, norm_act.LayerNormAct2d),
    **_table(
        _activation,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.GELU, nn.Tanh,
        activations.GELU, activations.GELUTanh, activations.QuickGELU, activations.Swish, activations.Tanh,
        activations.Mish, activations.HardSwish, activations.HardMish, activations.PReLU, nn.CELU, nn.SELU, nn.Softplus,
        nn.Hardtanh, nn.Softsign,
    ),
    **_table(_max_pool, nn.MaxPool2d),
    **_table(_global_pool, timm_layers.SelectAdaptivePool2d),
    **_table(_flatten, nn.Flatten),
    **_table(_averaged, *AVERAGED),
    **_table(_wide, *WIDE),
    # gates and statistics
    **_table(
        keep_whole,
        nn.Sigmoid, nn.Softmax, nn.Hardsigmoid, activations.Sigmoid, activations.HardSigmoid,
        timm_layers.SEModule, timm_layers.SqueezeExcite, _efficientnet_blocks.SqueezeExcite, timm_layers.EcaModule,
        timm_layers.GlobalContext,
    ),
    # linear as they are, or without effect in evaluation; timm's containers need no entry
    **_table(
        keep,
        nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.Unflatten, nn.Dropout,
        nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
        nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Unfold, nn.Fold, nn.PixelShuffle,
        nn.PixelUnshuffle, nn.ChannelShuffle,
    ),
    # linear maps and norms that explanation mode covers, without a B-cos form yet
    **_table(keep_whole, timm_layers.CondConv2d, timm_layers.EvoNorm2dS0),
    # this package's own
    **_table(
        keep_whole,
        BcosConv2d, BcosStem, ImageReader, BcosConvClassifier, BcosLinear, BcosLinearClassifier, BcosPool2d,
        BcosFlatten, UncentredBatchNorm1d, UncentredBatchNorm2d, PositionedQkv,
    ),
    **_table(keep, UncentredBatchNormAct2d, *AVERAGED.values(), *WIDE.values()),
}  # fmt: skip
