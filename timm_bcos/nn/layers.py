"""B-cos layers: torch's convolution and linear layer with the B-cos transform, and what models need beside them.

Papers: https://arxiv.org/abs/2205.10268 (B-cos, MaxOut, γ), https://arxiv.org/abs/2306.10898 (unit norm, logit bias).
Differs from the official code (package `bcos`) in that the weight is at `.weight`, as in torch and timm. There it is at
`.linear.weight`, in a `NormedConv2d` or `NormedLinear`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .._compat import timm_layers
from . import autograd
from .base import BcosLayer, check_units
from .functional import (
    bcos_conv2d,
    bcos_linear,
    conv2d_response,
    linear_response,
    low_pass,
    same_padding,
    shifted_activation,
    sigmoid_activation,
)

__all__ = [
    "BcosConv2d",
    "BcosLinear",
    "LowPass2d",
    "ShiftedActivation",
    "SigmoidActivation",
]


class LowPass2d(timm_layers.BlurPool2d):
    """timm's binomial filter [1, 2, 1] / 4 over height and width, for maps of any size.

    It removes the highest frequency, of period 2, and halves the one of period 4.

    Args:
        channels: Number of channels; None to accept any.
        stride: Stride of the output, 1 or 2.

    Shape: (N, C, H, W) to (N, C, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    filt: Tensor

    def __init__(
        self,
        channels: int | None = None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, filt_size=3, stride=stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return low_pass(x, self.filt, self.stride)


class BcosConv2d(BcosLayer, nn.Conv2d):
    """B-cos convolution: γ · |cos(patch, w)|^(B-1) · ŵᵀpatch (eqs. 3 and 12 of arXiv 2205.10268).

    In the official code (package `bcos`): `BcosConv2d`, and `BcosConv2dWithScale` with scale = 1 / γ.

    Args:
        in_channels: Number of input channels. This and the next arguments are those of `torch.nn.Conv2d`.
        b: Exponent B. With 1 the layer is a convolution with unit-norm rows.
        max_out: Units M per output channel: the weight has out_channels · M rows, unit m of channel o being row
            o · M + m, and the largest response is taken before the cosine factor.
        gamma: Fixed output scale γ.
        normalize_weight: True for unit-norm rows ŵ; False keeps the rows' amplitude, y = γ · |cos|^(B-1) · wᵀx, as
            needed to start from pretrained weights.
        pad_same: TensorFlow's 'SAME' padding, computed from the input's size (timm's `Conv2dSame`).
        eps: Stabilizes the norm of a patch, sqrt(‖patch‖² + eps).
        antialias: Filter the input by [1, 2, 1] / 4 first if the layer has a stride, which would otherwise show as
            checkerboards in W(x). Zhang (arXiv 1904.11486) convolves at stride 1 and filters with the stride. For a
            linear layer, filtering first is the same (except at the borders) at a fraction of the cost.

    Attributes:
        low_pass: The filter, or None.
        is_fused: See `BcosLayer`.
        amplitude: See `BcosLayer`; (O, 1, 1).
        channel_squares: The squared scale of a norm that was fused with the layer behind it, (C,); or None.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Raises:
        InputError: For b or max_out below 1, or for max_out above 1 with normalize_weight=False.
    """

    amplitude: Tensor | None
    channel_squares: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float = 2.0,
        max_out: int = 1,
        gamma: float = 1.0,
        normalize_weight: bool = True,
        pad_same: bool = False,
        eps: float = 1e-6,
        antialias: bool = False,
    ) -> None:
        check_units(b, max_out, normalize_weight)
        super().__init__(
            in_channels, out_channels * max_out, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.out_channels = out_channels
        self._init_bcos(out_channels, bias, b, max_out, gamma, normalize_weight)
        self.pad_same = pad_same
        self.eps = eps
        self.register_buffer("channel_squares", None)
        self._zero_padding, self._explicit_padding = self._split_padding()
        samples = max(self.stride) > 1
        self.low_pass = LowPass2d(in_channels, device=device, dtype=dtype) if antialias and samples else None

    def _split_padding(self) -> tuple[list[int], list[int]]:
        """Symmetric zero padding for the convolution itself, and explicit padding for `F.pad`; one of them is 0."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return list(self.padding), [0, 0, 0, 0]
        return [0, 0], list(self._reversed_padding_repeated_twice)

    def prepare(self, x: Tensor) -> Tensor:
        """Filter and pad the input, as far as the convolution does not pad it itself."""
        if self.low_pass is not None:
            x = self.low_pass(x)
        return self.pad(x)

    def pad(self, x: Tensor) -> Tensor:
        """Apply the padding that the convolution cannot do itself."""
        if self.pad_same:
            return same_padding(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        if max(self._explicit_padding) > 0:
            return F.pad(x, self._explicit_padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        return x

    def formula(self, x: Tensor) -> Tensor:
        if self.is_fused:
            return conv2d_response(
                x, self.weight, list(self.stride), self._zero_padding, list(self.dilation), self.groups, self.eps,
                self.b, self.gamma, self.max_out, self.amplitude, self.channel_squares,
            )  # fmt: skip
        return bcos_conv2d(
            x, self.weight, list(self.stride), self._zero_padding, list(self.dilation), self.groups, self.eps,
            self.b, self.gamma, self.max_out, self.normalize_weight,
        )  # fmt: skip

    def transform(self) -> autograd.Convolution:
        return autograd.Convolution(list(self.stride), self._zero_padding, list(self.dilation), self.groups, self.eps)

    def per_output(self, values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1)


class BcosLinear(BcosLayer, nn.Linear):  # type: ignore[misc]
    """B-cos linear layer: γ · |cos(x, w)|^(B-1) · ŵᵀx over the last dimension.

    Args:
        in_features: Number of input features. This and the next arguments are those of `torch.nn.Linear`.
        b: See `BcosConv2d`.
        max_out: See `BcosConv2d`.
        gamma: See `BcosConv2d`.
        normalize_weight: See `BcosConv2d`.

    Attributes:
        is_fused: See `BcosLayer`.
        amplitude: See `BcosLayer`; (O,).

    Shape: (..., in_features) to (..., out_features).

    Raises:
        InputError: For b or max_out below 1, or for max_out above 1 with normalize_weight=False.
    """

    amplitude: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float = 2.0,
        max_out: int = 1,
        gamma: float = 1.0,
        normalize_weight: bool = True,
    ) -> None:
        check_units(b, max_out, normalize_weight)
        super().__init__(in_features, out_features * max_out, False, device=device, dtype=dtype)
        self.out_features = out_features
        self._init_bcos(out_features, bias, b, max_out, gamma, normalize_weight)

    def formula(self, x: Tensor) -> Tensor:
        if self.is_fused:
            return linear_response(x, self.weight, self.b, self.gamma, self.max_out, self.amplitude)
        return bcos_linear(x, self.weight, self.b, self.gamma, self.max_out, self.normalize_weight)

    def transform(self) -> autograd.LinearMap:
        return autograd.LinearMap()

    def per_output(self, values: Tensor) -> Tensor:
        return values


class SigmoidActivation(nn.Sigmoid):
    """A sigmoid as an activation, 1/2 + x · slope, where 1/2 is a constant.

    `torch.nn.Sigmoid` counts as a gate: explanations treat its value as a constant factor. They are not exact if that
    value is added to something or is the input of a layer. Then convert the model with
    `RULES | {nn.Sigmoid: sigmoid_as_activation}`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid_activation(input)


@register_notrace_module  # one node in timm's graphs: TorchScript cannot compile a function that takes a module
class ShiftedActivation(nn.Module):
    """An activation with a bias that only acts in its gate: a(x + shift) - a(shift).

    The output is x times a gate, between 0 and 1 for ReLU and ReLU6. Unlike an additive bias, the shift adds nothing
    that the image does not explain.

    Args:
        act: Elementwise activation a.
        shift: Initial value of the shift, one per channel (C,). It is trained like a bias.

    Shape: (N, C, H, W) to the same.
    """

    def __init__(self, act: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.act = act
        self.shift = nn.Parameter(shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift.reshape(1, -1, 1, 1).to(x.dtype)
        if torch.jit.is_scripting():  # functions take no modules there
            return self.act(x + shift) - self.act.forward(shift.clone())
        return shifted_activation(x, shift, self.act)
