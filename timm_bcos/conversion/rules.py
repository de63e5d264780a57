"""The conversion rules: a table from module types to functions that replace modules (`conversion.replacements`).

Types of other libraries are given by name, such as 'timm.models.csatv2.Dct1d', and looked up when a model is converted
(`resolve`). Names that the installed version of the library does not have are ignored.

Keys are *exact* types, because subclasses can change behavior: timm's `BatchNormAct2d` is a batch norm with a built-in
activation. A type without a rule is kept only if that is safe (`is_container`): it contains other modules, which have
rules of their own, is no subclass of a type with a rule, and owns no parameters except those that `OWNED` names. All
other types are refused.
"""

import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, TypeAlias

from torch import nn

from .._compat import timm_layers
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear, LowPass2d, ShiftedActivation, SigmoidActivation
from ..nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d, UncenteredBatchNormAct2d
from ..nn.stems import BcosStem, ImageReader
from .blocks import AVERAGED, BARE, WIDE, WIDE_NORM_ACTS, WIDE_NORMS
from .positions import PositionedQkv
from .replacements import activations, attention, layers, norms
from .replacements.activations import sigmoid_as_activation
from .replacements.attention import WINDOWED, BcosAttention
from .replacements.base import LayerRole, Rule, keep, keep_leaf, remove_biases

__all__ = [
    "ADVICE",
    "RULES",
    "LayerRole",
    "Rule",
    "Rules",
    "RulesByType",
    "keep",
    "keep_leaf",
    "resolve",
    "rule_for",
    "sigmoid_as_activation",
]

Rules: TypeAlias = Mapping[type[nn.Module] | str, Rule]  # by exact type, or its qualified name
RulesByType: TypeAlias = Mapping[type[nn.Module], Rule]


def rule_for(module: nn.Module, rules: RulesByType) -> Rule | None:
    """The rule for a module, by its exact type; None if there is none."""
    kind = type(module)
    if kind in rules:
        return rules[kind]
    return keep if hasattr(module, "bcos_config") or is_container(module, rules) else None


# Parameters that a container may own directly: explanation mode covers how they are used.
OWNED = {
    "scales": (
        "gamma", "gamma[0-9]", "gamma_*", "ls[0-9]", "layer_scale*", "alpha", "scale", "scale_weight", "logit_scale",
        "temperature", "lambda_*", "skipinit_gain", "gating_param",
    ),
    "tokens": ("*_token", "*_token[0-9]", "*_token_[0-9]", "latent"),
    "positions": ("pos_emb*", "position_embedding*", "*_pos"),
    "tables that are added to attention scores": (
        "attention_biases", "relative_position_bias_table", "rel_pos_*", "height_rel", "width_rel",
    ),
}  # fmt: skip


NORM_BUFFERS = ("weight", "bias", "running_mean", "running_var")  # buffers of frozen batch norms


def is_container(module: nn.Module, rules: RulesByType) -> bool:
    """Whether a module without a rule may be kept, because its children have rules: see the top of this file."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "torch" or not any(True for _ in module.children()):
        return False
    if any(rules.get(base, keep) not in (keep, activations.replace_sequential) for base in kind.__mro__[1:]):
        return False
    owned = [name for name, parameter in module._parameters.items() if parameter is not None]
    owned += [name for name in module._buffers if name in NORM_BUFFERS]
    return all(any(fnmatch(name, pattern) for patterns in OWNED.values() for pattern in patterns) for name in owned)


# How to proceed with modules that no rule can convert.
ADVICE: dict[type[nn.Module], str] = {
    nn.LogSoftmax: "gives log-probabilities, while explanations are of logits: replace it by nn.Identity() and take a "
    "loss on logits",
    timm_layers.SplitBatchNorm2d: "subtracts the means of parts of a batch: train without them (--split-bn)",
    nn.TransformerEncoderLayer: "computes outside its own layers: take a timm or torchvision transformer",
}


def resolve(rules: Rules) -> RulesByType:
    """A table of rules by type only. A rule for a type takes precedence over one for the type's name.

    Types are looked up in Python modules that have been imported; a model cannot have layers of other types.
    """
    named = {_type_called(key): rule for key, rule in rules.items() if isinstance(key, str)}
    typed = {key: rule for key, rule in rules.items() if not isinstance(key, str)}
    return {kind: rule for kind, rule in (named | typed).items() if kind is not None}


def _type_called(name: str) -> type[nn.Module] | None:
    module, _, attribute = name.rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    return kind if isinstance(kind, type) else None


def _named(rule: Rule, names: str) -> dict[Any, Rule]:
    return dict.fromkeys(names.split(), rule)


class RuleTable(dict[Any, Rule]):
    """A table that also finds rules given by a type's name when it is asked for the type: `RULES[torch.nn.Conv2d]`."""

    def __missing__(self, kind: type[nn.Module]) -> Rule:
        return resolve({key: rule for key, rule in self.items() if isinstance(key, str)})[kind]

    def __or__(self, other: Rules) -> "RuleTable":  # type: ignore[override]
        return RuleTable({**self, **other})


RULES = RuleTable({
    **_named(layers.replace_conv, "torch.nn.Conv2d timm.layers.Conv2dSame"),
    **_named(
        layers.replace_standardized_conv,
        """
        timm.layers.StdConv2d timm.layers.StdConv2dSame timm.layers.ScaledStdConv2d timm.layers.ScaledStdConv2dSame
        """,
    ),
    **_named(
        layers.replace_linear,
        """
        torch.nn.Linear timm.layers.Linear torch.nn.modules.linear.NonDynamicallyQuantizableLinear
        """,
    ),
    **_named(
        layers.remove_layer_bias,
        """
        torch.nn.Conv1d torch.nn.Conv3d torch.nn.ConvTranspose1d torch.nn.ConvTranspose2d
        """,
    ),
    **_named(layers.replace_lstm, "torch.nn.LSTM"),
    **_named(attention.replace_multihead_attention, "torch.nn.MultiheadAttention"),
    **dict.fromkeys((*WINDOWED,), attention.replace_window_attention),
    # norms
    **_named(norms.replace_batch_norm, "torch.nn.BatchNorm1d torch.nn.BatchNorm2d torch.nn.SyncBatchNorm"),
    **_named(norms.replace_batch_norm_act, "timm.layers.BatchNormAct2d timm.layers.SyncBatchNormAct"),
    **_named(norms.replace_frozen_batch_norm, "torchvision.ops.FrozenBatchNorm2d timm.layers.FrozenBatchNormAct2d"),
    **_named(
        norms.replace_norm,
        """
        torch.nn.LayerNorm torch.nn.GroupNorm torch.nn.RMSNorm torch.nn.InstanceNorm1d torch.nn.InstanceNorm2d
        torch.nn.InstanceNorm3d timm.layers.LayerNorm timm.layers.LayerNorm2d
        timm.layers.norm.LayerNormExp2d timm.layers.GroupNorm timm.layers.GroupNorm1 timm.layers.RmsNorm
        timm.layers.RmsNorm2d timm.layers.SimpleNorm timm.layers.SimpleNorm2d
        timm.models.metaformer.GroupNorm1NoBias timm.models.metaformer.LayerNorm2dNoBias
        timm.models.metaformer.LayerNormNoBias torchvision.models.convnext.LayerNorm2d
        transformers.models.convnext.modeling_convnext.ConvNextLayerNorm
        transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm
        """,
    ),
    **dict.fromkeys((*WIDE_NORMS,), norms.replace_norm),
    **_named(
        norms.replace_norm_act,
        """
        timm.layers.GroupNormAct timm.layers.GroupNorm1Act timm.layers.LayerNormAct timm.layers.LayerNormAct2d
        timm.layers.RmsNormAct timm.layers.RmsNormAct2d
        """,
    ),
    **dict.fromkeys((*WIDE_NORM_ACTS,), norms.replace_norm_act),
    **_named(
        norms.replace_fused_norm_act,
        """
        timm.layers.EvoNorm2dS0 timm.layers.EvoNorm2dS0a timm.layers.FilterResponseNormTlu2d
        """,
    ),
    # activations
    **_named(
        activations.replace_activation,
        """
        torch.nn.ReLU torch.nn.ReLU6 torch.nn.LeakyReLU torch.nn.PReLU torch.nn.SiLU torch.nn.Mish
        torch.nn.Hardswish torch.nn.ELU torch.nn.GELU torch.nn.Tanh timm.layers.GELU timm.layers.GELUTanh
        timm.layers.QuickGELU timm.layers.Swish timm.layers.Tanh timm.layers.Mish timm.layers.HardSwish
        timm.layers.HardMish timm.layers.PReLU torch.nn.CELU torch.nn.SELU torch.nn.Softplus torch.nn.Hardtanh
        torch.nn.Softsign torch.nn.Hardshrink torch.nn.Softshrink torch.nn.Tanhshrink torch.nn.Threshold
        timm.models.nfnet.GammaAct torch.nn.RReLU transformers.activations.GELUActivation
        transformers.activations.NewGELUActivation transformers.activations.FastGELUActivation
        transformers.activations.QuickGELUActivation transformers.activations.SiLUActivation
        transformers.activations.MishActivation transformers.activations.GELUTanh
        """,
    ),
    **_named(
        activations.replace_memory_efficient_activation,
        """
        timm.layers.activations_me.SwishMe timm.layers.activations_me.MishMe timm.layers.activations_me.HardSwishMe
        timm.layers.activations_me.HardMishMe timm.layers.activations_me.HardSigmoidMe
        """,
    ),
    **_named(activations.replace_biased_activation, "timm.models.metaformer.StarReLU"),
    **dict.fromkeys((*BARE,), activations.replace_functional_activation),
    **_named(activations.refuse_functional_activation, "torchvision.models.densenet.DenseNet"),
    # pooling
    **_named(layers.replace_max_pool, "torch.nn.MaxPool1d torch.nn.MaxPool2d timm.layers.pool2d_same.MaxPool2dSame"),
    **_named(layers.replace_global_pool, "timm.layers.SelectAdaptivePool2d"),
    **_named(layers.replace_flatten, "torch.nn.Flatten"),
    **dict.fromkeys((*AVERAGED,), layers.replace_functional_max_pool),
    **dict.fromkeys((*WIDE,), attention.replace_float32_attention),
    # modules with additive biases of their own
    **_named(
        remove_biases,
        """
        timm.layers.grn.GlobalResponseNorm timm.models.hgnet.LearnableAffineBlock timm.models.mlp_mixer.Affine
        timm.models.beit.Attention timm.models.eva.EvaAttention timm.models.swin_transformer_v2.WindowAttention
        timm.models.vision_transformer.ParallelScalingBlock timm.models.vision_transformer.DiffParallelScalingBlock
        """,
    ),
    # gates and statistics
    **_named(
        keep_leaf,
        """
        torch.nn.Sigmoid torch.nn.Softmax torch.nn.Softmax2d torch.nn.Hardsigmoid torch.nn.LocalResponseNorm
        timm.layers.Sigmoid timm.layers.HardSigmoid timm.layers.split_attn.RadixSoftmax timm.layers.SEModule
        timm.layers.SqueezeExcite
        timm.models._efficientnet_blocks.SqueezeExcite timm.layers.EcaModule timm.layers.GlobalContext
        torchvision.ops.SqueezeExcitation
        """,
    ),
    **_named(activations.replace_iformer_attention, "timm.models.iformer.SHMA"),
    **_named(activations.replace_sequential, "torch.nn.Sequential"),
    # linear or piecewise linear, or without effect in evaluation mode
    **_named(
        keep,
        """
        torch.nn.Identity torch.nn.ModuleList torch.nn.ModuleDict torch.nn.ParameterList torch.nn.Unflatten
        torch.nn.Dropout torch.nn.Dropout1d torch.nn.Dropout2d torch.nn.AlphaDropout torch.nn.AvgPool1d
        torch.nn.AvgPool2d torch.nn.AdaptiveAvgPool1d torch.nn.AdaptiveAvgPool2d torch.nn.AdaptiveMaxPool2d
        torch.nn.Upsample torch.nn.UpsamplingNearest2d torch.nn.UpsamplingBilinear2d torch.nn.ZeroPad2d
        torch.nn.ConstantPad2d torch.nn.ReflectionPad2d torch.nn.ReplicationPad2d torch.nn.Unfold torch.nn.Fold
        torch.nn.CircularPad2d torch.nn.PixelShuffle torch.nn.PixelUnshuffle torch.nn.ChannelShuffle
        timm.layers.AvgPool2dSame timm.layers.BlurPool2d timm.layers.DropPath timm.layers.DropBlock2d
        timm.layers.PatchDropout
        timm.layers.SpaceToDepth timm.layers.DepthToSpace timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool
        timm.layers.adaptive_avgmax_pool.FastAdaptiveMaxPool timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool
        timm.layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool timm.layers.AdaptiveAvgMaxPool2d
        timm.layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d timm.models.csatv2.Dct1d
        timm.models.efficientformer.Flat timm.models.gemma4_vit.Gemma4VisionPooler timm.models.hiera.Reroll
        timm.models.hiera.Unroll timm.models.levit.Downsample timm.models.selecsls.SelectSeq torchvision.ops.Permute
        torchvision.ops.StochasticDepth torchvision.ops.DropBlock2d torchvision.models.maxvit.SwapAxes
        torchvision.models.maxvit.WindowPartition torchvision.models.maxvit.WindowDepartition
        torchvision.transforms.Normalize torchvision.transforms.v2.Normalize
        """,
    ),
    # modules with scales of their own
    **_named(
        keep,
        """
        timm.layers.LayerScale timm.layers.LayerScale2d timm.models.fastvit.LayerScale2d
        timm.models.swiftformer.LayerScale2d timm.models.metaformer.Scale timm.models.efficientvim.EfficientViM
        timm.models.efficientvim.EfficientViMDistilled timm.models.efficientvim.HSMSSD
        timm.models.swiftformer.EfficientAdditiveAttention
        """,
    ),
    # scales, stochastic depth and positions in the library transformers
    **_named(
        keep,
        """
        transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale
        transformers.models.dinov2.modeling_dinov2.Dinov2DropPath
        transformers.models.swin.modeling_swin.SwinDropPath
        transformers.models.swin.modeling_swin.SwinRelativePositionBias
        transformers.models.convnext.modeling_convnext.ConvNextDropPath
        transformers.models.convnextv2.modeling_convnextv2.ConvNextV2DropPath
        transformers.models.beit.modeling_beit.BeitDropPath
        """,
    ),
    # positions for attention
    **_named(
        keep,
        """
        timm.layers.bottleneck_attn.PosEmbedRel timm.layers.halo_attn.PosEmbedRel timm.layers.RelPosBias
        timm.layers.RelPosBiasTf timm.layers.FourierEmbed timm.layers.RotaryEmbedding timm.layers.RotaryEmbeddingCat
        timm.layers.RotaryEmbeddingMixed timm.layers.RotaryEmbeddingDinoV3
        timm.models.gemma4_vit.Gemma4RotaryEmbedding2D
        """,
    ),
    # linear maps without a B-cos form, which explanation mode covers
    **_named(keep_leaf, "timm.layers.CondConv2d"),
    # modules of this package
    **dict.fromkeys(
        (
            BcosConv2d, BcosStem, ImageReader, BcosConvClassifier, BcosLinear, BcosLinearClassifier, BcosPool2d,
            BcosFlatten, UncenteredBatchNorm1d, UncenteredBatchNorm2d, LowPass2d, PositionedQkv, SigmoidActivation,
            ShiftedActivation,
        ),
        keep_leaf,
    ),
    **dict.fromkeys(
        (
            BcosAttention, UncenteredBatchNormAct2d, *(own for table in (AVERAGED, BARE, WIDE, WIDE_NORMS,
            WIDE_NORM_ACTS, WINDOWED) for own in table.values()),
        ),
        keep,
    ),
})  # fmt: skip
