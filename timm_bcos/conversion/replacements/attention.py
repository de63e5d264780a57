"""Rules for attention of torch and torchvision, and for attention that computes in float32.

torch and torchvision pass the weights of their projections to functions (`multi_head_attention_forward`,
`shifted_window_attention`) instead of calling layers. The modules here call layers, which can be B-cos layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._compat import Library
from ..blocks import WIDE
from ..config import BcosConfig
from .base import LayerRole, hidden_role, refuse, with_class
from .layers import replace_linear

swin_transformer: Any = Library("torchvision.models.swin_transformer")


class BcosAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with B-cos layers.

    State dicts of `MultiheadAttention` can be loaded: their `in_proj_weight` is `in_proj.weight` here.

    Args:
        in_proj: Projection to queries, keys and values, D to 3 · D.
        out_proj: Projection of the heads' outputs, D to D.
        num_heads: Number of attention heads.
        dropout: Dropout probability of attention weights.
        batch_first: Whether tokens are (N, L, D) instead of (L, N, D).
    """

    def __init__(
        self, in_proj: nn.Module, out_proj: nn.Module, num_heads: int, dropout: float, batch_first: bool
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`; as there, `is_causal` is only a hint about `attn_mask`."""
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        for mask in (self._by_head(attn_mask), _by_key(key_padding_mask)):
            if mask is not None:
                scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        attended = attended[0] if query.ndim == 2 else attended if self.batch_first else attended.transpose(0, 1)
        weights = weights.mean(1) if average_attn_weights else weights
        return self.out_proj(attended), (weights[0] if query.ndim == 2 else weights) if need_weights else None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if query is key and key is value:
            return list(self.in_proj(query).chunk(3, dim=-1))
        return [self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value))]

    def _heads(self, x: Tensor) -> Tensor:
        """Tokens, batched or not, to (N, heads, L, D / heads)."""
        x = x[None] if x.ndim == 2 else x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _by_head(self, mask: Tensor | None) -> Tensor | None:
        """(L, S) stays, (N · heads, L, S) becomes (N, heads, L, S)."""
        return mask if mask is None or mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}in_proj_{name}" in state_dict:
                state_dict[f"{prefix}in_proj.{name}"] = state_dict.pop(f"{prefix}in_proj_{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _by_key(mask: Tensor | None) -> Tensor | None:
    """(S,) or (N, S) to (N, 1, 1, S)."""
    return None if mask is None else mask.reshape(-1, 1, 1, mask.shape[-1])


def _windows(x: Tensor, size: list[int]) -> Tensor:
    """(N, H, W, C) to (N, rows of windows, columns of windows, height, width, C)."""
    return x.unflatten(1, (-1, size[0])).unflatten(3, (-1, size[1])).transpose(2, 3)


class _WindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's attention within shifted windows of maps (N, H, W, C), which calls its projections."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        fits = [window >= size for window, size in zip(self.window_size, x.shape[1:3], strict=True)]
        shift = [0 if fit else by for fit, by in zip(fits, self.shift_size, strict=True)]
        windows = _windows(x.roll([-by for by in shift], (1, 2)), self.window_size)
        grid = windows.shape
        tokens = self._attend(windows.flatten(3, 4).flatten(0, 2), self._mask(x, shift) if any(shift) else None)
        x = tokens.reshape(grid).transpose(2, 3).flatten(3, 4).flatten(1, 2).roll(shift, (1, 2))
        return F.dropout(self.proj(x[:, :height, :width]), self.dropout, self.training)

    def _attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self._similarity(q, k) + self.get_relative_position_bias()
        if mask is not None:  # (windows of an image, L, L)
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)

    def _similarity(self, query: Tensor, key: Tensor) -> Tensor:
        return (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)

    def _mask(self, x: Tensor, shift: list[int]) -> Tensor:
        """-100 between tokens that the cyclic shift has moved together from opposite borders, (windows, L, L)."""
        sides = []
        for size, window, by in zip(x.shape[1:3], self.window_size, shift, strict=True):
            place = torch.arange(size, device=x.device)
            sides.append((place >= size - window).long() + (place >= size - by) if by else torch.zeros_like(place))
        regions = 3 * sides[0][:, None] + sides[1]
        labels = _windows(regions[None, :, :, None], self.window_size).flatten(3).flatten(0, 2)
        return (labels[:, None] != labels[:, :, None]).to(x.dtype) * -100.0


class _WindowAttentionV2(_WindowAttention, swin_transformer.ShiftedWindowAttentionV2):
    """Swin V2's attention, whose scores are cosine similarities, and whose keys have no bias."""

    def _similarity(self, query: Tensor, key: Tensor) -> Tensor:
        if self.qkv.bias is not None:
            key = key - self.qkv.bias.chunk(3)[1].unflatten(0, (self.num_heads, 1, -1))
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * scale


WINDOWED: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.ShiftedWindowAttention: _WindowAttention,
    swin_transformer.ShiftedWindowAttentionV2: _WindowAttentionV2,
}


def replace_window_attention(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """torchvision's attention within shifted windows."""
    return with_class(block, WINDOWED)


def replace_multihead_attention(
    attention: nn.MultiheadAttention, layer_role: LayerRole, config: BcosConfig
) -> nn.Module:
    """torch's attention; one linear layer gives queries, keys and values, called `in_proj` as in timm."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        advice = "has separate key or value sizes, or keys and values of its own: write a rule for it"
        refuse(layer_role, attention, advice)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    packed = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(attention.training)
    packed.weight, packed.bias = weight, bias
    in_proj = replace_linear(packed, hidden_role(f"{layer_role.name}.in_proj", config), config)
    new = BcosAttention(in_proj, attention.out_proj, attention.num_heads, attention.dropout, attention.batch_first)
    return new.train(attention.training)


def replace_float32_attention(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Attention that computes in float32, whatever the type of its input."""
    return with_class(block, WIDE)
