"""Simple vision transformers: fixed position embeddings for grids of any size, and a convolutional stem.

Papers: https://arxiv.org/abs/2306.10898 (B-cos ViTs), https://arxiv.org/abs/2205.01580 (simple ViT),
https://arxiv.org/abs/2106.14881 (convolutional stem).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .._compat import timm_layers, timm_models
from ..dynamic_linear.registry import VALUES_FROM
from ..nn.module_utils import Factory

__all__ = ["SimpleVisionTransformer", "conv_stem_embed", "flatten_patches", "simple_vit", "sincos_positions"]


def sincos_positions(x: Tensor, height: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2D position embedding [sin x, cos x, sin y, cos y] of a grid of tokens.

    Frequencies fall from 1 to 1 / temperature, both ends included. timm's `build_sincos2d_pos_embed` leaves out the
    last one and puts y first.

    Args:
        x: Tokens (N, L, D), which give D (a multiple of 4), the dtype and the device.
        height: Number of rows of the grid.
        width: Number of columns of the grid.
        temperature: Inverse of the lowest frequency.

    Returns:
        (height · width, D).
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(sincos_positions, (x,), x, height, width, temperature)
    quarter = x.shape[-1] // 4
    frequency = 1.0 / temperature ** (torch.arange(quarter, device=x.device, dtype=torch.float32) / (quarter - 1))
    column = torch.arange(width, device=x.device, dtype=torch.float32)[None, :, None] * frequency
    row = torch.arange(height, device=x.device, dtype=torch.float32)[:, None, None] * frequency
    column, row = column.expand(height, -1, -1), row.expand(-1, width, -1)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1).flatten(0, 1).to(x.dtype)


VALUES_FROM[sincos_positions] = "none"


class SimpleVisionTransformer(timm_models.VisionTransformer):
    """timm's vision transformer with fixed position embeddings, computed for the grid of its input."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(N, L, D), or (N, H, W, D) with `dynamic_img_size`, to (N, L, D)."""
        if self.dynamic_img_size:
            height, width = x.shape[1], x.shape[2]
            x = x.flatten(1, 2)
        else:
            height, width = self.patch_embed.grid_size
        return x + sincos_positions(x, height, width)


def simple_vit(*, stem_widths: Sequence[int] = (), **kwargs: Any) -> SimpleVisionTransformer:
    """A simple ViT with a patch embedding, or with a convolutional stem.

    Args:
        stem_widths: Number of channels of each layer of the stem; empty for timm's patch embedding.
        kwargs: Arguments of timm's `VisionTransformer`.
    """
    if stem_widths:
        kwargs.setdefault("embed_layer", partial(conv_stem_embed, widths=stem_widths))
    return SimpleVisionTransformer(**kwargs)


def conv_stem_embed(in_chans: int, widths: Sequence[int], **kwargs: Any) -> nn.Module:
    """timm's patch embedding behind a stem of 3×3 convolutions with one-group group norms.

    Args:
        in_chans: Number of image channels.
        widths: Number of channels of each layer of the stem. The stride is 2 where the number grows.
        kwargs: Arguments of timm's `HybridEmbed`.
    """
    dd = Factory(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
    stem = nn.Sequential()
    before = 0
    for width in widths:
        layer = nn.Sequential()
        stride = 2 if width > before else 1
        layer.add_module("conv", nn.Conv2d(before or in_chans, width, 3, stride, padding=1, bias=False, **dd))
        layer.add_module("norm", timm_layers.GroupNorm1(width, **dd))
        stem.append(layer)
        before = width
    return timm_layers.HybridEmbed(stem, in_chans=in_chans, **kwargs)


def flatten_patches(model: Any) -> None:
    """Let the patch embedding compute norms as a B-cos linear layer over flattened patches, as in the official code.

    A linear layer divides by ‖x‖ + 1e-12, a convolution by sqrt(‖x‖² + 1e-6).
    """
    model.patch_embed.proj.eps = 1e-24
