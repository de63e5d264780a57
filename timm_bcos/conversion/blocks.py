"""Blocks whose forward pass has to be written differently: tables from the class of timm or torchvision to ours."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import Library, timm_layers
from ..nn.layers import LowPass2d

__all__ = [
    "AVERAGED",
    "BARE",
    "WIDE",
    "WIDE_NORMS",
    "WIDE_NORM_ACTS",
    "antialiased_max_pool",
    "is_patchifying",
]

to_2tuple = timm_layers.to_2tuple


def is_patchifying(conv: nn.Conv2d) -> bool:
    """Whether a convolution cuts its input into patches that do not overlap: then all pixels are seen equally often."""
    return conv.kernel_size == conv.stride and conv.dilation == (1, 1)


def antialiased_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d) -> nn.Module:
    """Max pooling at stride 1, then a low-pass filter with the stride; outputs keep their number and their places.

    Args:
        pool: Not changed, and returned where it does not sample, or where two layers cannot express it: at strides
            other than 2, with indices, in one dimension, or with TensorFlow's padding.
    """
    if type(pool) is not nn.MaxPool2d or not _is_expressible(pool):
        return pool
    layers: list[nn.Module] = [nn.MaxPool2d(pool.kernel_size, 1, pool.padding, pool.dilation), LowPass2d(stride=2)]
    if pool.ceil_mode:  # the last window leaves the map: repeated pixels do not change its maximum
        layers.insert(0, nn.ReplicationPad2d((0, 1, 0, 1)))
    return nn.Sequential(*layers).train(pool.training)


def _is_expressible(pool: nn.MaxPool2d) -> bool:
    if to_2tuple(pool.stride) != (2, 2) or pool.return_indices:
        return False
    sizes = zip(to_2tuple(pool.kernel_size), to_2tuple(pool.padding), strict=True)
    # else torch drops a last window that lies in the padding alone
    is_full = to_2tuple(pool.dilation) == (1, 1) and all(kernel > padding + 1 for kernel, padding in sizes)
    return is_full or not pool.ceil_mode


norm: Any = Library("timm.layers.norm")
norm_act: Any = Library("timm.layers.norm_act")
inception: Any = Library("torchvision.models.inception")
googlenet: Any = Library("torchvision.models.googlenet")
inception_v3: Any = Library("timm.models.inception_v3")
efficientvit: Any = Library("timm.models.efficientvit_mit")
Block: Any = nn.Module if TYPE_CHECKING else object  # mixed into a class of modules


# timm's and torchvision's blocks name their layers alike, so that a method fits both.


class _AverageB(Block):
    """Inception v3's block B, which calls `max_pool2d` as a function, with average pooling in its place."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, F.avg_pool2d(x, kernel_size=3, stride=2)]


class _AverageD(Block):
    """Inception v3's block D, which calls `max_pool2d` as a function, with average pooling in its place."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [self.branch3x3_2(self.branch3x3_1(x)), long, F.avg_pool2d(x, kernel_size=3, stride=2)]


class _ConvNorm(Block):
    """torchvision's convolution and norm, without the activation, `relu` called as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class _AverageInceptionB(_AverageB, inception_v3.InceptionB): ...


class _AverageInceptionD(_AverageD, inception_v3.InceptionD): ...


class _AverageTorchvisionInceptionB(_AverageB, inception.InceptionB): ...


class _AverageTorchvisionInceptionD(_AverageD, inception.InceptionD): ...


class _InceptionConvNorm(_ConvNorm, inception.BasicConv2d): ...


class _GoogLeNetConvNorm(_ConvNorm, googlenet.BasicConv2d): ...


class _GoogLeNetHead(googlenet.InceptionAux):
    """GoogLeNet's auxiliary head, which only training runs, without `relu` called as a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4))).flatten(1)
        return self.fc2(self.dropout(self.fc1(x)))


class _WideLiteMLA(efficientvit.LiteMLA):
    """timm's linear attention computes in float32, which suits half precision and loses digits of float64."""

    def _attn(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        out = q.to(wide) @ (k.to(wide).transpose(-1, -2) @ v.to(wide))
        return (out[..., :-1] / (out[..., -1:] + self.eps)).to(v.dtype)


class _WideNorm(nn.Module):
    """timm's norms in float32, for which the same holds: float64 takes the path of the norm without that cast.

    Attributes:
        in_float32: timm's class of the norm.
        in_own_dtype: timm's class of the same norm without the cast.
    """

    in_float32: type[nn.Module]
    in_own_dtype: type[nn.Module]
    _fast_norm = False

    def forward(self, x: Tensor) -> Tensor:
        kind = self.in_own_dtype if x.dtype == torch.float64 else self.in_float32
        return kind.forward(self, x)


def _wide(in_float32: type[nn.Module], in_own_dtype: type[nn.Module]) -> Any:
    """The class of a norm that casts to float32 but keeps float64; pickles find it under its name in this module."""
    members = dict(in_float32=in_float32, in_own_dtype=in_own_dtype, __module__=__name__)
    return type(f"Wide{in_own_dtype.__name__}", (_WideNorm, in_float32), members)


WideLayerNorm = _wide(norm.LayerNormFp32, norm.LayerNorm)
WideLayerNorm2d = _wide(norm.LayerNorm2dFp32, norm.LayerNorm2d)
WideRmsNorm = _wide(norm.RmsNormFp32, norm.RmsNorm)
WideRmsNorm2d = _wide(norm.RmsNorm2dFp32, norm.RmsNorm2d)
WideSimpleNorm = _wide(norm.SimpleNormFp32, norm.SimpleNorm)
WideSimpleNorm2d = _wide(norm.SimpleNorm2dFp32, norm.SimpleNorm2d)
WideLayerNormAct = _wide(norm_act.LayerNormActFp32, norm_act.LayerNormAct)
WideLayerNormAct2d = _wide(norm_act.LayerNormAct2dFp32, norm_act.LayerNormAct2d)
WideRmsNormAct = _wide(norm_act.RmsNormActFp32, norm_act.RmsNormAct)
WideRmsNormAct2d = _wide(norm_act.RmsNormAct2dFp32, norm_act.RmsNormAct2d)


Table = dict[type[nn.Module], type[nn.Module]]

AVERAGED: Table = {
    inception_v3.InceptionB: _AverageInceptionB,
    inception_v3.InceptionD: _AverageInceptionD,
    inception.InceptionB: _AverageTorchvisionInceptionB,
    inception.InceptionD: _AverageTorchvisionInceptionD,
}
BARE: Table = {
    inception.BasicConv2d: _InceptionConvNorm,
    googlenet.BasicConv2d: _GoogLeNetConvNorm,
    googlenet.InceptionAux: _GoogLeNetHead,
}
WIDE: Table = {efficientvit.LiteMLA: _WideLiteMLA}
WIDE_NORMS: Table = {
    norm.LayerNormFp32: WideLayerNorm,
    norm.LayerNorm2dFp32: WideLayerNorm2d,
    norm.RmsNormFp32: WideRmsNorm,
    norm.RmsNorm2dFp32: WideRmsNorm2d,
    norm.SimpleNormFp32: WideSimpleNorm,
    norm.SimpleNorm2dFp32: WideSimpleNorm2d,
}
WIDE_NORM_ACTS: Table = {
    norm_act.LayerNormActFp32: WideLayerNormAct,
    norm_act.LayerNormAct2dFp32: WideLayerNormAct2d,
    norm_act.RmsNormActFp32: WideRmsNormAct,
    norm_act.RmsNormAct2dFp32: WideRmsNormAct2d,
}
