"""B-cos layers: torch's convolution and linear layer with one step of `forward` changed.

Papers: https://arxiv.org/abs/2205.10268 (B-cos, MaxOut, γ), https://arxiv.org/abs/2306.10898 (unit norm, logit bias).
Differs from the official code in that the weight stays at `.weight`, as everywhere in timm.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from .functional import (
    encode_image,
    feature_norm,
    max_out,
    patch_norm,
    row_norm,
    same_padding,
    scale_and_offset,
    scale_by_cosine,
    to_logits,
    unit_weight,
)

__all__ = [
    "BcosConv2d",
    "BcosConvClassifier",
    "BcosFlatten",
    "BcosLinear",
    "BcosLinearClassifier",
    "BcosPool2d",
    "BcosStem",
    "ImageReader",
]


def _check(b: float, max_out: int, normalize_weight: bool) -> None:
    if b < 1 or max_out < 1:
        raise ValueError(f"B-cos layers need b >= 1 and max_out >= 1, got b={b}, max_out={max_out}")
    if max_out > 1 and not normalize_weight:
        raise ValueError(f"max_out={max_out} compares units by their cosine: it needs normalize_weight=True")


def _effective_weight(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    """Rows of unit norm; free rows keep √‖w‖ at B = 2, because the response squares it, and ‖w‖ at B = 1."""
    if normalize_weight or b not in (1.0, 2.0):
        return unit_weight(weight)
    return weight if b == 1.0 else unit_weight(weight, 0.5)


def _repr(layer: Any) -> str:
    free = "" if layer.normalize_weight else ", normalize_weight=False"
    return f", b={layer.b:g}, max_out={layer.max_out}, gamma={layer.gamma:g}{free}"


class BcosConv2d(nn.Conv2d):
    """B-cos convolution: γ · |cos(patch, w)|^(B-1) · ŵᵀpatch (eqs. 3 and 12 of arXiv 2205.10268).

    Args:
        in_channels: Input channels; likewise the other arguments of `torch.nn.Conv2d`.
        b: Exponent B; 1 is a plain (unit-norm) convolution.
        max_out: Units M per output channel: the weight has out_channels · M rows, unit m of channel o being row
            o · M + m, and the largest response is taken before the cosine factor.
        gamma: Fixed output scale γ.
        normalize_weight: True for unit-norm rows ŵ; False keeps the rows' amplitude, y = γ · |cos|^(B-1) · wᵀx, as
            needed to start from pretrained weights.
        pad_same: TensorFlow's 'SAME' padding, computed from the input's size (timm's `Conv2dSame`).
        eps: Stabilises the norm of a patch, sqrt(‖patch‖² + eps).

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        b: float = 2.0,
        max_out: int = 1,
        gamma: float = 1.0,
        normalize_weight: bool = True,
        pad_same: bool = False,
        eps: float = 1e-6,
    ) -> None:
        _check(b, max_out, normalize_weight)
        super().__init__(
            in_channels, out_channels * max_out, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.out_channels = out_channels
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))
        self.b = float(b)
        self.max_out = max_out
        self.gamma = float(gamma)
        self.normalize_weight = normalize_weight
        self.pad_same = pad_same
        self.eps = eps
        self._zero_padding, self._explicit_padding = self._split_padding()

    def _split_padding(self) -> tuple[list[int], list[int]]:
        """Symmetric zero padding, left to the convolution, or else explicit padding as `F.pad` takes it."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return list(self.padding), [0, 0, 0, 0]
        return [0, 0], list(self._reversed_padding_repeated_twice)

    def pad(self, x: Tensor) -> Tensor:
        """Apply the padding that the convolution cannot do itself."""
        if self.pad_same:
            return same_padding(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        if max(self._explicit_padding) > 0:
            return F.pad(x, self._explicit_padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.respond(x)

    def respond(self, x: Tensor) -> Tensor:
        """The B-cos response; a method of its own because TorchScript has no `super()`."""
        x = self.pad(x)
        weight = _effective_weight(self.weight, self.b, self.normalize_weight)
        linear = F.conv2d(x, weight, None, self.stride, self._zero_padding, self.dilation, self.groups)
        if self.max_out > 1:
            linear = max_out(linear, self.max_out, 1)
        y = self._scale(linear, x)
        if not self.normalize_weight and self.b not in (1.0, 2.0):
            y = y * row_norm(self.weight).reshape(-1, 1, 1)
        bias = self.bias
        return y if bias is None else y + bias.reshape(-1, 1, 1)

    def _scale(self, linear: Tensor, x: Tensor) -> Tensor:
        if self.b == 1.0:
            return linear if self.gamma == 1.0 else linear * self.gamma
        window = list(self.kernel_size), list(self.stride), self._zero_padding, list(self.dilation)
        norm = patch_norm(x, window[0], window[1], window[2], window[3], self.groups, self.eps)
        if self.groups == 1:
            return scale_by_cosine(linear, norm, self.b, self.gamma)
        by_group = linear.unflatten(1, [self.groups, self.out_channels // self.groups])
        return scale_by_cosine(by_group, norm.unsqueeze(2), self.b, self.gamma).flatten(1, 2)

    def extra_repr(self) -> str:
        return super().extra_repr() + _repr(self)


class BcosLinear(nn.Linear):
    """B-cos linear layer: γ · |cos(x, w)|^(B-1) · ŵᵀx over the last dimension.

    Args:
        in_features: Input features; likewise the other arguments of `torch.nn.Linear`.
        b: Exponent B; `max_out`, `gamma` and `normalize_weight` are as in `BcosConv2d`.

    Shape: (..., in_features) to (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        b: float = 2.0,
        max_out: int = 1,
        gamma: float = 1.0,
        normalize_weight: bool = True,
    ) -> None:
        _check(b, max_out, normalize_weight)
        super().__init__(in_features, out_features * max_out, False, device=device, dtype=dtype)
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.b = float(b)
        self.max_out = max_out
        self.gamma = float(gamma)
        self.normalize_weight = normalize_weight

    def forward(self, x: Tensor) -> Tensor:
        return self.respond(x)

    def respond(self, x: Tensor) -> Tensor:
        """The B-cos response; a method of its own because TorchScript has no `super()`."""
        linear = F.linear(x, _effective_weight(self.weight, self.b, self.normalize_weight))
        if self.max_out > 1:
            linear = max_out(linear, self.max_out, -1)
        if self.b != 1.0:
            y = scale_by_cosine(linear, feature_norm(x), self.b, self.gamma)
        else:
            y = linear if self.gamma == 1.0 else linear * self.gamma
        if not self.normalize_weight and self.b not in (1.0, 2.0):
            y = y * row_norm(self.weight)
        bias = self.bias
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return super().extra_repr() + _repr(self)


class BcosStem(BcosConv2d):
    """The convolution that reads the image: encodes it, optionally normalises, then convolves.

    Args:
        image_channels: Channels of the image; the weight has twice as many input channels.
        mean: Channel means that a pretrained network expects, or None to feed the encoding as it is.
        std: Channel standard deviations, with `mean`.

    The encoding e is normalised as (e - [m, 1-m]) / [s, s] *before* any zero padding; with weights [w, -w] / 2 the
    layer then equals the original convolution of the normalised image, at the borders too.

    Shape: (N, image_channels, H, W) in [0, 1], or encoded (N, 2 · image_channels, H, W), to (N, out_channels, H', W').
    """

    input_scale: Tensor
    input_offset: Tensor

    def __init__(
        self, image_channels: int, *args: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(2 * image_channels, *args, **kwargs)
        self.image_channels = image_channels
        self.normalize_input = mean is not None and std is not None
        if mean is None or std is None:
            mean, std = (0.0,), (1.0,)
        self._set_normalization(torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(std, dtype=torch.float64))

    def _set_normalization(self, mean: Tensor, std: Tensor) -> None:
        mean, std = (v.expand(self.image_channels).to(self.weight) for v in (mean, std))
        scale = (1 / std).repeat(2).reshape(-1, 1, 1)
        offset = -torch.cat([mean, 1 - mean]).reshape(-1, 1, 1) * scale
        self.register_buffer("input_scale", scale, persistent=False)
        self.register_buffer("input_offset", offset, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = encode_image(x, self.image_channels)
        if self.normalize_input:
            x = scale_and_offset(x, self.input_scale, self.input_offset)
        return self.respond(x)


class ImageReader(nn.Module):
    """Reads the image for networks whose first layers cannot take its encoding: ones that fold it or split its colours.

    It encodes and normalises as `BcosStem` does, and then hands over half the difference of the image and its
    complement, which is the normalised image itself: a linear map of the encoding.

    Args:
        image_channels: Channels C of the image.
        mean: Channel means that the network expects, or None for 0.5.
        std: Channel standard deviations, or None for 1.

    Shape: (N, C, H, W) in [0, 1], or encoded (N, 2C, H, W), to (N, C, H, W).
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self, image_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_channels = image_channels
        per_channel = dict(device=device, dtype=dtype)
        scale = 1 / torch.tensor(std or (1.0,), **per_channel).expand(image_channels)
        offset = (1 - 2 * torch.tensor(mean or (0.5,), **per_channel).expand(image_channels)) * scale / 2
        self.register_buffer("scale", scale.reshape(-1, 1, 1).clone(), persistent=False)
        self.register_buffer("offset", offset.reshape(-1, 1, 1).clone(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """What says its device and dtype, as with any layer."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        image, complement = encode_image(x, self.image_channels).chunk(2, dim=1)
        return (image - complement) * (self.scale / 2) + self.offset


class BcosConvClassifier(BcosConv2d):
    """Classifier that responds at each position, then averages: logits = mean(response) / T + logit bias.

    Averaging after the B-cos transform lets each position vote by its own alignment (section 3.2.3 of
    arXiv 2205.10268).

    Args:
        in_features: Channels of the feature map.
        num_classes: K.
        temperature: T, the logits' divisor.
        logit_bias: Fixed constant added to every logit; log(p / (1 - p)) starts all probabilities at p.
        pool: False returns the map of logits (N, K, H, W).

    Shape: (N, in_features, H, W) to (N, K).
    """

    def __init__(
        self, in_features: int, num_classes: int, *, temperature: float = 1.0, logit_bias: float = 0.0,
        pool: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, num_classes, 1, **kwargs)
        self.temperature = float(temperature)
        self.logit_bias = float(logit_bias)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y = self.respond(x)  # (N, K, H, W)
        if self.pool:
            y = y.mean((2, 3))
        return to_logits(y, self.temperature, self.logit_bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


class BcosLinearClassifier(BcosLinear):
    """Classifier on feature vectors: logits = response / T + logit bias; arguments as in `BcosConvClassifier`.

    Shape: (..., in_features) to (..., K).
    """

    def __init__(
        self, in_features: int, num_classes: int, *, temperature: float = 1.0, logit_bias: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(in_features, num_classes, **kwargs)
        self.temperature = float(temperature)
        self.logit_bias = float(logit_bias)

    def forward(self, x: Tensor) -> Tensor:
        return to_logits(self.respond(x), self.temperature, self.logit_bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", temperature={self.temperature:g}, logit_bias={self.logit_bias:.4g}"


class BcosPool2d(SelectAdaptivePool2d):
    """timm's global pooling, which lets feature maps through while the classifier after it pools by itself.

    Attributes:
        deferred: True while a `BcosConvClassifier` follows.
    """

    deferred: bool = False

    @classmethod
    def from_pool(cls, pool: SelectAdaptivePool2d) -> "BcosPool2d":
        """Adopt the settings of timm's pooling layer."""
        new = cls(pool_type=pool.pool_type, flatten=isinstance(pool.flatten, nn.Flatten))
        return new.train(pool.training)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.deferred else self.pool_now(x)

    def pool_now(self, x: Tensor) -> Tensor:
        """Pool regardless of `deferred`: (N, C, H, W) to (N, C)."""
        return self.flatten(self.pool(x))


class BcosFlatten(nn.Flatten):
    """`torch.nn.Flatten` of a head, which lets feature maps through as `BcosPool2d` does."""

    deferred: bool = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.deferred else x.flatten(self.start_dim, self.end_dim)
