"""What replaces a module in a conversion: one function per kind of module.

Each takes the module, its `LayerRole` in the network and the config, and returns the replacement, which adopts the
module's parameters, or the module itself; it never changes what it was given. What is returned unchanged is made
dynamic linear, where needed, by explanation mode (`timm_bcos.dynamic_linear`). What cannot be converted is refused by
an `UnsupportedModuleError`, whose lines the plan collects.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import Library, timm_layers
from ..errors import UnsupportedModuleError
from ..nn.activations import ShiftedActivation, SigmoidActivation
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.module_utils import buffer_device, clone
from ..nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d, UncenteredBatchNormAct2d
from ..nn.stems import BcosStem
from .attention import WINDOWED, BcosAttention
from .blocks import AVERAGED, BARE, WIDE, WIDE_NORM_ACTS, WIDE_NORMS, antialiased_max_pool, is_patchifying
from .config import BcosConfig

pool2d_same: Any = Library("timm.layers.pool2d_same")


@dataclass(frozen=True)
class LayerRole:
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


def hidden_place(name: str, config: BcosConfig) -> LayerRole:
    """The place of a module that neither reads the image nor gives the logits."""
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


def _adopt(
    layer: BcosConv2d | BcosLinear, old: nn.Conv2d | nn.Linear, weight: Tensor, config: BcosConfig
) -> BcosConv2d | BcosLinear:
    """Give a new layer the old one's weight and, if biases are kept, its bias."""
    layer.weight = weight if weight is old.weight else nn.Parameter(weight, old.weight.requires_grad)  # type: ignore[assignment]
    layer.bias = old.bias if config.adds_bias else None  # type: ignore[assignment]
    if isinstance(layer, BcosConv2d) and layer.low_pass is not None:
        layer.low_pass.to_empty(device=buffer_device(old.weight)).init_non_persistent_buffers()
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


def replace_conv(conv: nn.Conv2d, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Convolutions, with padding of their own or as TensorFlow has it."""
    channels = 2 * conv.in_channels if place.role == "stem" else conv.in_channels  # an image is encoded
    fan_in = channels * conv.kernel_size[0] * conv.kernel_size[1]
    unit = LINEAR_UNIT if place.role == "linear" else _unit(config, fan_in)
    if place.role in ("classifier", "positions", "map") and conv.kernel_size == (1, 1):
        return _conv_classifier(conv, place, config)
    settings = dict(
        kernel_size=conv.kernel_size, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, padding_mode=conv.padding_mode, pad_same=type(conv) is not nn.Conv2d,
        antialias=config.antialias and not is_patchifying(conv), device="meta", dtype=conv.weight.dtype, **unit,
    )  # fmt: skip
    if place.role != "stem":
        layer = BcosConv2d(conv.in_channels, conv.out_channels, **settings)
        return _adopt(layer, conv, _rows(conv.weight, unit), config)
    settings["device"] = conv.weight.device
    stem = BcosStem(conv.in_channels, conv.out_channels, mean=place.mean, std=place.std, **settings)
    weight = torch.cat([conv.weight, -conv.weight], 1).detach() / 2
    return _adopt(stem, conv, _rows(weight, unit), config)


def replace_standardized_conv(conv: Any, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Weight standardization is applied once and for all: what it gives is the weight to start from."""
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=False, device="meta", dtype=conv.weight.dtype,
    )  # fmt: skip
    plain.__class__ = timm_layers.Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    gain = (conv.gain * conv.scale).flatten() if hasattr(conv, "gain") else None
    rows = F.batch_norm(conv.weight.flatten(1)[None], None, None, gain, None, True, 0.0, conv.eps)
    plain.weight = nn.Parameter(rows.detach().reshape(conv.weight.shape), conv.weight.requires_grad)
    plain.bias = conv.bias
    return replace_conv(plain.train(conv.training), place, config)


def replace_linear_layer(
    layer: nn.Conv1d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d, place: LayerRole, config: BcosConfig
) -> nn.Module:
    """A layer that has no B-cos form here stays linear; only its bias may go."""
    return layer if config.adds_bias or layer.bias is None else clone(layer, bias=None)


def replace_lstm(lstm: nn.LSTM, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Explanation mode knows them (`dynamic_linear.recurrent`); without biases a new one adopts the weights."""
    if config.adds_bias or not lstm.bias:
        return lstm
    new = nn.LSTM(
        lstm.input_size, lstm.hidden_size, lstm.num_layers, False, lstm.batch_first, lstm.dropout, lstm.bidirectional,
        lstm.proj_size, device="meta",
    )  # fmt: skip
    for name, _ in list(new.named_parameters()):
        setattr(new, name, getattr(lstm, name))
    return new.train(lstm.training)


def _conv_classifier(module: nn.Linear | nn.Conv2d, place: LayerRole, config: BcosConfig) -> BcosConv2d | BcosLinear:
    features, num_classes = module.weight.shape[1], module.weight.shape[0]
    unit = _unit(config, features)
    layer = BcosConvClassifier(
        features, num_classes, pool=place.role != "map", device="meta", dtype=module.weight.dtype,
        **_logits(config, num_classes), **unit,
    )  # fmt: skip
    weight = module.weight.detach().reshape(num_classes, features, 1, 1)
    return _adopt(layer, module, _rows(weight, unit), config)


def replace_linear(linear: nn.Linear, place: LayerRole, config: BcosConfig) -> BcosConv2d | BcosLinear:
    """Linear layers; a classifier that pools becomes a convolution."""
    if place.role in ("positions", "map"):
        return _conv_classifier(linear, place, config)
    unit = LINEAR_UNIT if place.role == "linear" else _unit(config, linear.in_features)
    kind: type[BcosLinear] = BcosLinear
    if place.role == "classifier":
        kind, unit = BcosLinearClassifier, unit | _logits(config, linear.out_features)
    layer = kind(linear.in_features, linear.out_features, device="meta", dtype=linear.weight.dtype, **unit)
    return _adopt(layer, linear, _rows(linear.weight, unit), config)


def replace_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, place: LayerRole, config: BcosConfig) -> nn.Module:
    """One- and two-dimensional batch norms, and the synchronized one."""
    if hasattr(norm, "act"):  # torch's `convert_sync_batchnorm` leaves the layers inside of timm's norms unused
        return replace_batch_norm_act(norm, place, config)
    if config.norm == "remove":
        return nn.Identity()
    if _stays(norm, place, config):
        return norm
    kind = UncenteredBatchNorm1d if isinstance(norm, nn.BatchNorm1d) else UncenteredBatchNorm2d
    return kind.from_batch_norm(_with_weight(norm))


def replace_batch_norm_act(norm: Any, place: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's batch norms with a drop and an activation layer behind them."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config)
    if _stays(norm, place, config):
        return norm
    new = UncenteredBatchNormAct2d.from_batch_norm(_with_weight(norm))
    new.drop, new.act = norm.drop, norm.act
    if config.bias == "reference" and not isinstance(norm.act, nn.Identity | ShiftedActivation):
        shift = torch.zeros_like(new.weight, requires_grad=new.weight.requires_grad)  # trained as the bias was
        new.act = ShiftedActivation(norm.act, shift)
    return new


def _stays(norm: nn.BatchNorm1d | nn.BatchNorm2d, place: LayerRole, config: BcosConfig) -> bool:
    if norm.running_var is None:
        why = "has no running statistics: it normalizes by the batch, so that images would explain each other"
        refuse(place, norm, f"{why}; train it with track_running_stats=True, or pass norm='remove'")
    return config.norm == "keep" and config.adds_bias


BatchNormT = TypeVar("BatchNormT", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm1d | nn.BatchNorm2d)


def _with_weight(norm: BatchNormT) -> BatchNormT:
    """A batch norm without one multiplies by 1."""
    if norm.weight is not None:
        return norm
    assert norm.running_var is not None
    return clone(norm, weight=nn.Parameter(torch.ones_like(norm.running_var), requires_grad=False))


def replace_frozen_batch_norm(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Batch norms whose numbers are all buffers, with or without an activation behind them."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config) if hasattr(norm, "act") else nn.Identity()
    if config.norm == "keep" and config.adds_bias:
        return norm
    return clone(norm, **{name: torch.zeros_like(getattr(norm, name)) for name in ("bias", "running_mean")})


def _removed_norm_act(norm: Any, config: BcosConfig) -> nn.Module:
    return nn.Identity() if config.activation == "remove" else nn.Sequential(norm.drop, norm.act)


def replace_norm(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A norm over x's own features is dynamic linear as it is, except for its bias."""
    if config.norm == "remove":
        return nn.Identity()
    norm = _with_class(norm, WIDE_NORMS | WIDE_NORM_ACTS)
    return norm if config.adds_bias or getattr(norm, "bias", None) is None else clone(norm, bias=None)


def replace_norm_act(norm_act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Likewise with an activation behind it."""
    return _removed_norm_act(norm_act, config) if config.norm == "remove" else replace_norm(norm_act, place, config)


def replace_fused_norm_act(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Norm and activation in one formula, whose activation has a parameter, `v` or `tau`."""
    if config.norm == "remove":
        if config.activation == "keep":
            refuse(place, norm, "is norm and activation in one: pass norm='keep', or activation='remove' too")
        return nn.Identity()
    norm = replace_offset(norm, place, config)
    owned = "v" if hasattr(norm, "v") else "tau"
    return clone(norm, **{owned: None}) if config.activation == "remove" else norm


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


def replace_activation(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Activations, which explanation mode makes dynamic linear."""
    return nn.Identity() if config.activation == "remove" else act


# Forms with an autograd function of their own, by the names of their types, and the same activations without.
PLAIN_FORMS: dict[str, type[nn.Module]] = {
    "SwishMe": nn.SiLU, "MishMe": nn.Mish, "HardSwishMe": nn.Hardswish, "HardSigmoidMe": nn.Hardsigmoid,
    "HardMishMe": timm_layers.HardMish,
}  # fmt: skip


def replace_memory_efficient(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's memory-efficient activations compute inside autograd functions, where explanation mode cannot look."""
    plain = PLAIN_FORMS[type(act).__name__]().train(act.training)
    return plain if type(plain) is nn.Hardsigmoid else replace_activation(plain, place, config)


def replace_activation_with_offset(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """An activation that adds a constant of its own."""
    return nn.Identity() if config.activation == "remove" else replace_offset(act, place, config)


def replace_sequential(sequence: nn.Sequential, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A container, in which a sigmoid that feeds another layer is an activation, not a gate."""
    children = list(sequence.named_children())
    feeding = [
        name
        for i, (name, child) in enumerate(children)
        if type(child) is nn.Sigmoid and any(m._parameters for _, m in children[i + 1 :])
    ]
    return clone(sequence, **{name: SigmoidActivation() for name in feeding}) if feeding else sequence


def replace_bare(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A block that calls its activation as a function."""
    return block if config.activation == "keep" else _with_class(block, BARE)


def keep_unless_bare(model: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A network that calls its last activation in its own forward pass."""
    if config.activation == "remove":
        refuse(place, model, "applies a ReLU in its own forward pass: take another network, or activation='keep'")
    return model


def replace_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Max pooling in one or two dimensions, with padding of its own or as TensorFlow has it."""
    if config.max_pool == "keep":
        return antialiased_max_pool(pool) if config.antialias else pool
    if pool.return_indices or pool.dilation not in (1, (1,), (1, 1)):
        refuse(place, pool, "returns indices or is dilated, which average pooling cannot: write a rule for it")
    if isinstance(pool, pool2d_same.MaxPool2dSame):
        return timm_layers.AvgPool2dSame(pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)  # type: ignore[no-any-return]
    kind: Any = nn.AvgPool1d if isinstance(pool, nn.MaxPool1d) else nn.AvgPool2d
    return kind(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)  # type: ignore[no-any-return]


def replace_global_pool(pool: Any, place: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's global average pooling, which a classifier after it may take over."""
    return BcosPool2d.from_pool(pool) if isinstance(pool.pool, nn.AdaptiveAvgPool2d) else pool


def replace_flatten(flatten: nn.Flatten, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Flattening before a classifier, which may want the map."""
    return BcosFlatten(flatten.start_dim, flatten.end_dim).train(flatten.training)


def replace_averaged(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A block that calls its max pooling as a function."""
    return block if config.max_pool == "keep" else _with_class(block, AVERAGED)


def replace_wide(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A block that computes in float32 whatever its input."""
    return _with_class(block, WIDE)


def replace_window_attention(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """torchvision's, with projections that are called."""
    return _with_class(block, WINDOWED)


def replace_multihead_attention(attention: nn.MultiheadAttention, place: LayerRole, config: BcosConfig) -> nn.Module:
    """torch's; queries, keys and values come from one linear layer, called `in_proj` as timm does."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        refuse(place, attention, "has separate key or value sizes, or keys and values of its own: write a rule for it")
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    packed.weight, packed.bias = weight, bias
    in_proj = replace_linear(packed.train(attention.training), hidden_place(f"{place.name}.in_proj", config), config)
    new = BcosAttention(in_proj, attention.out_proj, attention.num_heads, attention.dropout, attention.batch_first)
    return new.train(attention.training)


def _with_class(block: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """The block with the class that the table gives for its own, if any."""
    kind = table.get(type(block))
    if kind is None:
        return block
    new = clone(block)
    new.__class__ = kind
    return new


def sigmoid_as_activation(act: nn.Sigmoid, place: LayerRole, config: BcosConfig) -> nn.Module:
    """For sigmoids whose value is passed on, not multiplied."""
    return SigmoidActivation().train(act.training)


def pass_gates(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """iFormer's attention takes values and gates from one sigmoid."""
    return clone(block, gate_act=SigmoidActivation().train(block.training))
