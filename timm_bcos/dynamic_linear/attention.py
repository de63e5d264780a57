"""Attention: softmax(query · keyᵀ · scale + mask) is a gate, which weighs the values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import share
from .registry import Function, Mode, detached, named, rule

__all__ = ["attention_weights"]


@rule(*named("scaled_dot_product_attention"))
def _attention(
    mode: Mode, func: Function, /, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(query · keyᵀ · scale + mask) · value, the weights being constants."""
    if enable_gqa:  # heads of queries share keys and values
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = mode.call(attention_weights, query, key, attn_mask, is_causal, scale)
    weights = weights.masked_fill(weights.isnan().all(-1, keepdim=True), 0.0)  # queries that may look at nothing
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    return share(torch.matmul, [weights, value])


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """softmax(query · keyᵀ · scale + mask), (..., L, D) and (..., S, D) to (..., L, S).

    Args:
        query: (..., L, D).
        key: (..., S, D).
        mask: Added, or where it is boolean and False, what is left out.
        is_causal: Leave out keys behind the query.
        scale: None is 1 / √D.
    """
    products = share(torch.matmul, [query, key.transpose(-2, -1)])
    scores = products * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones_like(scores[..., :, :], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


@rule(attention_weights)
def _constant_weights(mode: Mode, func: Function, /, *args: object) -> Tensor:
    return func(*map(detached, args))


@rule(F.multi_head_attention_forward)
def _multi_head_attention(
    mode: Mode, func: Function, /, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
    training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
    static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """torch's attention layer over sequences (L, N, E) or (L, E), without what its fast paths leave out."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("explanation mode knows attention without static_k and static_v")
    is_single = query.ndim == 2
    if is_single:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (mode.call(F.linear, x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    more = [] if bias_k is None or bias_v is None else [(bias_k, bias_v)]
    if add_zero_attn:
        more.append((torch.zeros_like(k[:1], requires_grad=False),) * 2)
    for another_key, another_value in more:
        k = mode.call(torch.cat, [k, another_key.expand(1, *k.shape[1:])])
        v = mode.call(torch.cat, [v, another_value.expand(1, *v.shape[1:])])
    q, k, v = (x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # (N, heads, L, D)
    mask = _merged_mask(detached(attn_mask), detached(key_padding_mask), detached(q), num_heads)
    if mask is not None:
        mask = F.pad(mask, (0, len(more)))
    gate = mode.call(attention_weights, q, k, mask, is_causal and mask is None, None)
    gate = F.dropout(gate, dropout_p, training)
    y = mode.call(
        F.linear, share(torch.matmul, [gate, v]).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias
    )
    averaged = gate.mean(1) if average_attn_weights else gate
    if is_single:
        y, averaged = y[:, 0], averaged[0]
    return y, averaged if need_weights else None


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """Additive masks; a boolean one is True for what is left out."""
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, q)
        merged = merged.unflatten(0, (-1, heads)) if merged.ndim == 3 else merged
    if padding is not None:
        padded = _additive(padding, q)[:, None, None]
        merged = padded if merged is None else merged + padded
    return merged


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)
