"""Rules for attention whose projections are not layers that are called, or that computes in float32."""

from torch import nn

from ..attention import WINDOWED, BcosAttention
from ..blocks import WIDE
from ..config import BcosConfig
from .base import LayerRole, hidden_role, refuse, with_class
from .linear import replace_linear


def replace_wide(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A block that computes in float32 whatever its input."""
    return with_class(block, WIDE)


def replace_window_attention(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """torchvision's, with projections that are called."""
    return with_class(block, WINDOWED)


def replace_multihead_attention(attention: nn.MultiheadAttention, place: LayerRole, config: BcosConfig) -> nn.Module:
    """torch's; queries, keys and values come from one linear layer, called `in_proj` as timm does."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        refuse(place, attention, "has separate key or value sizes, or keys and values of its own: write a rule for it")
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    packed.weight, packed.bias = weight, bias
    in_proj = replace_linear(packed.train(attention.training), hidden_role(f"{place.name}.in_proj", config), config)
    new = BcosAttention(in_proj, attention.out_proj, attention.num_heads, attention.dropout, attention.batch_first)
    return new.train(attention.training)
