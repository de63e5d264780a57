"""Blocks of timm whose forward pass has to be written differently: tables from timm's class to ours."""

import torch
import torch.nn.functional as F
from timm.layers import RmsNormFp32
from timm.models.efficientvit_mit import LiteMLA
from timm.models.inception_v3 import InceptionB, InceptionD
from torch import Tensor, nn

__all__ = ["AVERAGED", "WIDE"]


class _AverageInceptionB(InceptionB):
    """timm's block calls `max_pool2d` as a function; here its pooling branch averages."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, F.avg_pool2d(x, kernel_size=3, stride=2)]


class _AverageInceptionD(InceptionD):
    """Likewise."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [self.branch3x3_2(self.branch3x3_1(x)), long, F.avg_pool2d(x, kernel_size=3, stride=2)]


class _WideLiteMLA(LiteMLA):
    """timm's linear attention computes in float32, which is right for half precision and loses digits of float64."""

    def _attn(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        out = q.to(wide) @ (k.to(wide).transpose(-1, -2) @ v.to(wide))
        return (out[..., :-1] / (out[..., -1:] + self.eps)).to(v.dtype)


class _WideRmsNorm(RmsNormFp32):
    """Likewise for timm's norm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


AVERAGED: dict[type[nn.Module], type[nn.Module]] = {InceptionB: _AverageInceptionB, InceptionD: _AverageInceptionD}
WIDE: dict[type[nn.Module], type[nn.Module]] = {LiteMLA: _WideLiteMLA, RmsNormFp32: _WideRmsNorm}
