"""The conversion rules: a table from module type to what replaces it (`timm_bcos.conversion.replacements`).

Keys are *exact* types, because subclasses hide things: timm's `BatchNormAct2d` is a batch norm with an activation
inside. A type without a row is kept only where nothing is lost by it (`is_container`): it holds other modules, which
have rows of their own, is no variety of a type that has a rule, and owns no parameters but those that `OWNED` names:
scales, tokens, positions and tables of attention, which explanation mode covers. All else is refused, whoever wrote it.
"""

from collections.abc import Mapping
from fnmatch import fnmatch

from timm import layers as timm_layers
from timm import models as timm_models
from timm.layers import norm, norm_act
from timm.models import iformer
from timm.models.csatv2 import Dct1d
from torch import nn
from torchvision import ops
from torchvision.models import convnext, maxvit
from torchvision.models import densenet as torchvision_densenet

from ..nn.activations import PassedSigmoid, ShiftedActivation
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.low_pass import LowPass2d
from ..nn.norms import UncentredBatchNorm1d, UncentredBatchNorm2d, UncentredBatchNormAct2d
from ..nn.stems import BcosStem, ImageReader
from . import replacements as to
from .attention import WINDOWED, BcosAttention
from .blocks import AVERAGED, BARE, WIDE, WIDE_NORM_ACTS, WIDE_NORMS
from .positions import PositionedQkv
from .replacements import Place, Rule, keep, keep_whole, pass_sigmoid
from .statistics import NORMALISERS

__all__ = ["ADVICE", "PROBABILITIES", "RULES", "Place", "Rule", "is_container", "keep", "keep_whole", "pass_sigmoid"]


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


NORM_BUFFERS = ("weight", "bias", "running_mean", "running_var")  # of a norm that has been frozen


def is_container(module: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> bool:
    """Whether a module without a row may be kept, because all that matters in it has a row: see above."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "torch" or not any(True for _ in module.children()):
        return False
    if any(rules.get(base, keep) not in (keep, to.replace_sequential) for base in kind.__mro__[1:]):
        return False
    owned = [name for name, parameter in module._parameters.items() if parameter is not None]
    owned += [name for name in module._buffers if name in NORM_BUFFERS]
    return all(any(fnmatch(name, pattern) for patterns in OWNED.values() for pattern in patterns) for name in owned)


# What to do about modules that no rule can be right for.
PROBABILITIES = (nn.Sigmoid, nn.Softmax, nn.LogSoftmax)
ADVICE: dict[type[nn.Module], str] = {
    nn.LogSoftmax: "gives log-probabilities, while explanations are of logits: replace it by nn.Identity() and take a "
    "loss on logits",
    nn.TransformerEncoderLayer: "computes outside its own layers: take a timm or torchvision transformer",
}


def _table(rule: Rule, *types: type[nn.Module]) -> dict[type[nn.Module], Rule]:
    return dict.fromkeys(types, rule)


RULES: dict[type[nn.Module], Rule] = {
    **_table(to.replace_conv, nn.Conv2d, timm_layers.Conv2dSame),
    **_table(
        to.replace_standardised_conv,
        timm_layers.StdConv2d, timm_layers.StdConv2dSame, timm_layers.ScaledStdConv2d, timm_layers.ScaledStdConv2dSame,
    ),
    **_table(
        to.replace_linear,
        nn.Linear, timm_layers.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear,
    ),
    **_table(to.replace_linear_layer, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d),
    **_table(to.replace_lstm, nn.LSTM),
    **_table(to.replace_multihead_attention, nn.MultiheadAttention),
    **_table(to.replace_window_attention, *WINDOWED),
    # norms
    **_table(to.replace_batch_norm, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm),
    **_table(to.replace_batch_norm_act, timm_layers.BatchNormAct2d, norm_act.SyncBatchNormAct),
    **_table(to.replace_frozen_batch_norm, ops.FrozenBatchNorm2d, norm_act.FrozenBatchNormAct2d),
    **_table(
        to.replace_norm,
        nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, norm.LayerNorm, norm.LayerNorm2d, norm.LayerNormExp2d, norm.GroupNorm,
        norm.GroupNorm1, norm.RmsNorm, norm.RmsNorm2d, norm.SimpleNorm, norm.SimpleNorm2d,
        timm_models.metaformer.GroupNorm1NoBias, timm_models.metaformer.LayerNorm2dNoBias,
        timm_models.metaformer.LayerNormNoBias, convnext.LayerNorm2d, *WIDE_NORMS,
    ),
    **_table(
        to.replace_norm_act,
        norm_act.GroupNormAct, norm_act.GroupNorm1Act, norm_act.LayerNormAct, norm_act.LayerNormAct2d,
        norm_act.RmsNormAct, norm_act.RmsNormAct2d, *WIDE_NORM_ACTS,
    ),
    **_table(
        to.replace_fused_norm_act,
        timm_layers.evo_norm.EvoNorm2dS0, timm_layers.evo_norm.EvoNorm2dS0a,
        timm_layers.filter_response_norm.FilterResponseNormTlu2d,
    ),
    # activations
    **_table(
        to.replace_activation,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.GELU, nn.Tanh,
        timm_layers.activations.GELU, timm_layers.activations.GELUTanh, timm_layers.activations.QuickGELU,
        timm_layers.activations.Swish, timm_layers.activations.Tanh, timm_layers.activations.Mish,
        timm_layers.activations.HardSwish, timm_layers.activations.HardMish, timm_layers.activations.PReLU, nn.CELU,
        nn.SELU, nn.Softplus, nn.Hardtanh, nn.Softsign, timm_models.nfnet.GammaAct,
    ),
    **_table(to.replace_activation_with_offset, timm_models.metaformer.StarReLU),
    **_table(to.replace_bare, *BARE),
    **_table(to.keep_unless_bare, torchvision_densenet.DenseNet),
    # pooling
    **_table(to.replace_max_pool, nn.MaxPool1d, nn.MaxPool2d, timm_layers.pool2d_same.MaxPool2dSame),
    **_table(to.replace_global_pool, timm_layers.SelectAdaptivePool2d),
    **_table(to.replace_flatten, nn.Flatten),
    **_table(to.replace_averaged, *AVERAGED),
    **_table(to.replace_wide, *WIDE),
    # owners of an additive bias
    **_table(
        to.replace_offset,
        timm_layers.grn.GlobalResponseNorm, timm_models.hgnet.LearnableAffineBlock, timm_models.mlp_mixer.Affine,
        timm_models.beit.Attention, timm_models.eva.EvaAttention, timm_models.swin_transformer_v2.WindowAttention,
        timm_models.vision_transformer.ParallelScalingBlock, timm_models.vision_transformer.DiffParallelScalingBlock,
    ),
    # gates and statistics
    **_table(
        keep_whole,
        nn.Sigmoid, nn.Softmax, nn.Hardsigmoid, timm_layers.activations.Sigmoid, timm_layers.activations.HardSigmoid,
        timm_layers.split_attn.RadixSoftmax, timm_layers.SEModule, timm_layers.SqueezeExcite,
        timm_models._efficientnet_blocks.SqueezeExcite, timm_layers.EcaModule, timm_layers.GlobalContext,
        ops.SqueezeExcitation,
    ),
    **_table(to.pass_gates, iformer.SHMA),
    **_table(to.replace_sequential, nn.Sequential),
    # linear or piecewise linear as they are, or without effect in evaluation
    **_table(
        keep,
        nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.Unflatten, nn.Dropout,
        nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
        nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Unfold, nn.Fold, nn.PixelShuffle,
        nn.PixelUnshuffle, nn.ChannelShuffle, timm_layers.AvgPool2dSame, timm_layers.BlurPool2d, timm_layers.DropPath,
        timm_layers.DropBlock2d, timm_layers.PatchDropout, timm_layers.SpaceToDepth, timm_layers.DepthToSpace,
        timm_layers.adaptive_avgmax_pool.FastAdaptiveAvgPool, timm_layers.adaptive_avgmax_pool.FastAdaptiveMaxPool,
        timm_layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool,
        timm_layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool,
        timm_layers.adaptive_avgmax_pool.AdaptiveAvgMaxPool2d, timm_layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d,
        Dct1d, timm_models.efficientformer.Flat, timm_models.gemma4_vit.Gemma4VisionPooler, timm_models.hiera.Reroll,
        timm_models.hiera.Unroll, timm_models.levit.Downsample, timm_models.selecsls.SelectSeq, ops.Permute,
        ops.StochasticDepth, ops.DropBlock2d, maxvit.SwapAxes, maxvit.WindowPartition, maxvit.WindowDepartition,
        *NORMALISERS,
    ),
    # owners of scales
    **_table(
        keep,
        timm_layers.LayerScale, timm_layers.LayerScale2d, timm_models.fastvit.LayerScale2d,
        timm_models.swiftformer.LayerScale2d, timm_models.metaformer.Scale, timm_models.efficientvim.EfficientViM,
        timm_models.efficientvim.EfficientViMDistilled, timm_models.efficientvim.HSMSSD,
        timm_models.swiftformer.EfficientAdditiveAttention,
    ),
    # what gives attention its positions
    **_table(
        keep,
        timm_layers.bottleneck_attn.PosEmbedRel, timm_layers.halo_attn.PosEmbedRel,
        timm_layers.pos_embed_rel.RelPosBias, timm_layers.pos_embed_rel.RelPosBiasTf,
        timm_layers.pos_embed_sincos.FourierEmbed, timm_layers.pos_embed_sincos.RotaryEmbedding,
        timm_layers.pos_embed_sincos.RotaryEmbeddingCat, timm_layers.pos_embed_sincos.RotaryEmbeddingMixed,
        timm_layers.pos_embed_sincos.RotaryEmbeddingDinoV3, timm_models.gemma4_vit.Gemma4RotaryEmbedding2D,
    ),
    # linear maps that explanation mode covers, without a B-cos form yet
    **_table(keep_whole, timm_layers.CondConv2d),
    # this package's own
    **_table(
        keep_whole,
        BcosConv2d, BcosStem, ImageReader, BcosConvClassifier, BcosLinear, BcosLinearClassifier, BcosPool2d,
        BcosFlatten, UncentredBatchNorm1d, UncentredBatchNorm2d, LowPass2d, PositionedQkv, PassedSigmoid,
        ShiftedActivation,
    ),
    **_table(
        keep,
        BcosAttention, UncentredBatchNormAct2d, *(own for table in (AVERAGED, BARE, WIDE, WIDE_NORMS, WIDE_NORM_ACTS,
        WINDOWED) for own in table.values()),
    ),
}  # fmt: skip
