"""What the B-cos vision transformers have and timm's lack: a patch embedding with fixed positions, and a conv stem.

Papers: https://arxiv.org/abs/2306.10898 (B-cos ViTs), https://arxiv.org/abs/2205.01580 (simple ViT),
https://arxiv.org/abs/2106.14881 (convolutional stem).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import GroupNorm1, HybridEmbed, nchw_to
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["PatchEmbedSinCos", "conv_stem", "flatten_patches", "sincos_positions"]


def sincos_positions(x: Tensor, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2D position embedding [sin x, cos x, sin y, cos y] for a map of patches.

    Frequencies fall from 1 to 1 / temperature, both ends included; timm's `build_sincos2d_pos_embed` stops short of
    the last and puts y first.

    Args:
        x: (N, D, H, W), whose size, dtype and device count; D must be divisible by 4.
        temperature: The lowest frequency's inverse.

    Returns:
        (D, H, W).
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(sincos_positions, (x,), x, temperature)
    quarter, height, width = x.shape[1] // 4, x.shape[2], x.shape[3]
    steps = torch.arange(quarter, device=x.device, dtype=torch.float32) / (quarter - 1)
    frequency = (1.0 / temperature**steps).reshape(-1, 1, 1)
    column = torch.arange(width, device=x.device, dtype=torch.float32).reshape(1, 1, -1) * frequency
    row = torch.arange(height, device=x.device, dtype=torch.float32).reshape(1, -1, 1) * frequency
    column, row = column.expand(-1, height, -1), row.expand(-1, -1, width)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]).to(x.dtype)


class PatchEmbedSinCos(HybridEmbed):
    """timm's patch embedding, optionally behind a stem, plus fixed positions for whatever grid comes out.

    Args:
        img_size: Image size.
        patch_size: Patch size, on the stem's feature map.
        in_chans: Image channels.
        embed_dim: Width D.
        stem: Builds the stem from `in_chans`; None for none.
        kwargs: timm's `HybridEmbed` options.

    Shape: (N, in_chans, H, W) to (N, patches, D), or as `output_fmt` says.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        stem: Callable[..., nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        dd = {name: kwargs.get(name) for name in ("device", "dtype")}
        backbone = nn.Identity() if stem is None else stem(in_chans, **dd)
        super().__init__(
            backbone, img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.strict_img_size:
            height, width = self.img_size
            torch._assert(x.shape[2] == height, f"this network takes images of height {height}: see set_input_size")
            torch._assert(x.shape[3] == width, f"this network takes images of width {width}: see set_input_size")
        x = self.proj(self._pad(self.backbone(x)))
        x = x + sincos_positions(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)

    def _pad(self, x: Tensor) -> Tensor:
        if not self.dynamic_img_pad:
            return x
        bottom, right = -x.shape[2] % self.patch_size[0], -x.shape[3] % self.patch_size[1]
        return nn.functional.pad(x, (0, right, 0, bottom))


def conv_stem(in_chans: int, widths: Sequence[int], device: Any = None, dtype: Any = None) -> nn.Sequential:
    """3×3 convolutions with norms, of stride 2 where the number of channels grows (one-group group norm)."""
    stem = nn.Sequential()
    before = 0
    for width in widths:
        layer = nn.Sequential()
        stride = 2 if width > before else 1
        layer.add_module(
            "conv",
            nn.Conv2d(before or in_chans, width, 3, stride, padding=1, bias=False, device=device, dtype=dtype),
        )
        layer.add_module("norm", GroupNorm1(width, device=device, dtype=dtype))
        stem.append(layer)
        before = width
    return stem


def flatten_patches(model: Any) -> None:
    """Let the patch embedding stabilise its norm as the B-cos *linear* layer over flattened patches that it stands for.

    That layer divides by ‖x‖ + 1e-12, a convolution by sqrt(‖x‖² + 1e-6).
    """
    model.patch_embed.proj.eps = 1e-24
