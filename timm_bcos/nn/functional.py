"""The B-cos transform as functions (Algorithm 1 of the paper), with the steps before and after it.

Paper: B-cos Networks: Alignment is All We Need for Interpretability (CVPR 2022), https://arxiv.org/abs/2205.10268.
Free rows (`normalize_weight=False`): https://arxiv.org/abs/2411.00715, section 3. `nn.autograd` has the same functions
with a backward pass by hand.

All steps take part in `__torch_function__` dispatch, so that explanation mode (`timm_bcos.dynamic_linear`) can replace
them and `torch.fx` traces each as one node.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .._compat import timm_layers
from ..errors import InputError
from .primitives import effective_weight, feature_norm, has_amplitude, patch_norm, row_norm, scale_by_cosine
from .primitives import max_out as largest_of

__all__ = [
    "bcos_conv2d",
    "bcos_linear",
    "conv2d_response",
    "encode_image",
    "linear_response",
    "low_pass",
    "same_padding",
    "scale_and_offset",
    "shifted_activation",
    "sigmoid_activation",
    "to_logits",
]


pad_same = timm_layers.pad_same


def bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    eps: float = 1e-6,
    b: float = 2.0,
    gamma: float = 1.0,
    max_out: int = 1,
    normalize_weight: bool = True,
) -> Tensor:
    """B-cos convolution: γ · |cos(patch, w)|^(B-1) · ŵᵀpatch (Algorithm 1, with MaxOut of section 4).

    Args:
        x: (N, C, H, W), or (C, H, W).
        weight: (O · M, C / groups, *kernel), unit m of output o being row o · M + m.
        stride: Stride of the window, (height, width).
        padding: Zeros added on each side, (height, width).
        dilation: Spacing of the window's elements, (height, width).
        groups: Number of groups of channels.
        eps: Stabilizes the norm of a patch, sqrt(‖patch‖² + eps).
        b: B, at least 1.
        gamma: γ.
        max_out: M.
        normalize_weight: False keeps the norm of each row: γ · |cos|^(B-1) · wᵀpatch.

    Returns:
        (N, O, H', W'), or (O, H', W').
    """
    amplitude = row_norm(weight).reshape(-1, 1, 1) if has_amplitude(b, normalize_weight) else None
    weight = effective_weight(weight, b, normalize_weight)
    return conv2d_response(x, weight, stride, padding, dilation, groups, eps, b, gamma, max_out, amplitude)


def conv2d_response(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    b: float,
    gamma: float,
    max_out: int,
    amplitude: Tensor | None = None,
    channel_squares: Tensor | None = None,
) -> Tensor:
    """`bcos_conv2d` with the effective weight, which is multiplied by x as it is.

    Args:
        x: (N, C, H, W), or (C, H, W).
        weight: (O · M, C / groups, *kernel), see `effective_weight`.
        stride: See `bcos_conv2d`.
        padding: See `bcos_conv2d`.
        dilation: See `bcos_conv2d`.
        groups: See `bcos_conv2d`.
        eps: See `bcos_conv2d`.
        b: See `bcos_conv2d`.
        gamma: See `bcos_conv2d`.
        max_out: See `bcos_conv2d`.
        amplitude: (O, 1, 1), an additional factor of the response; or None.
        channel_squares: (C,), the squared scale of a norm that was fused with the layer behind it; or None.

    Returns:
        (N, O, H', W'), or (O, H', W').
    """
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if max_out > 1:
        y = largest_of(y, max_out, -3)
    if b != 1.0:
        norm = patch_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps, channel_squares)  # type: ignore[arg-type]
        y = scale_by_cosine(y, norm, b, gamma, True, groups)
    elif gamma != 1.0:
        y = y * gamma
    return y if amplitude is None else y * amplitude.to(y.dtype)


def bcos_linear(
    x: Tensor, weight: Tensor, b: float = 2.0, gamma: float = 1.0, max_out: int = 1, normalize_weight: bool = True
) -> Tensor:
    """B-cos linear layer: γ · |cos(x, w)|^(B-1) · ŵᵀx over the last dimension.

    Args:
        x: (..., C).
        weight: (O · M, C), unit m of output o being row o · M + m.
        b: B, at least 1.
        gamma: γ.
        max_out: M.
        normalize_weight: See `bcos_conv2d`.

    Returns:
        (..., O).
    """
    amplitude = row_norm(weight) if has_amplitude(b, normalize_weight) else None
    return linear_response(x, effective_weight(weight, b, normalize_weight), b, gamma, max_out, amplitude)


def linear_response(
    x: Tensor, weight: Tensor, b: float, gamma: float, max_out: int, amplitude: Tensor | None = None
) -> Tensor:
    """`bcos_linear` with the effective weight, which is multiplied by x as it is.

    Args:
        x: (..., C).
        weight: (O · M, C), see `effective_weight`.
        b: See `bcos_linear`.
        gamma: See `bcos_linear`.
        max_out: See `bcos_linear`.
        amplitude: (O,), an additional factor of the response; or None.

    Returns:
        (..., O).
    """
    y = F.linear(x, weight)
    if max_out > 1:
        y = largest_of(y, max_out, -1)
    if b != 1.0:
        y = scale_by_cosine(y, feature_norm(x), b, gamma, inplace=True)
    elif gamma != 1.0:
        y = y * gamma
    return y if amplitude is None else y * amplitude.to(y.dtype)


def encode_image(image: Tensor, in_chans: int) -> Tensor:
    """Encode an image as [r, g, b, 1-r, 1-g, 1-b], so that each color has a direction of its own.

    The official code (package `bcos`) calls this transform `AddInverse`.

    Args:
        image: Pixels in [0, 1], (N, C, H, W). An encoded image (N, 2C, H, W) is returned as it is.
        in_chans: Number of image channels, C.

    Returns:
        (N, 2C, H, W).

    Raises:
        InputError: For any other number of channels.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(image):
            return handle_torch_function(encode_image, (image,), image, in_chans)
        if image.ndim != 4 or image.shape[1] not in (in_chans, 2 * in_chans):
            raise InputError(
                f"expected images (N, {in_chans}, H, W), or encoded ones (N, {2 * in_chans}, H, W), "
                f"got shape {tuple(image.shape)}; a single image needs a batch dimension: x[None]"
            )
    if image.shape[1] == 2 * in_chans:
        return image
    return torch.cat([image, 1 - image], dim=1)


def scale_and_offset(image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Normalize encoded images (N, 2C, H, W): image · scale + offset, both of shape (2C, 1, 1)."""
    if not torch.jit.is_scripting() and has_torch_function_unary(image):
        return handle_torch_function(scale_and_offset, (image,), image, scale, offset)
    return image * scale + offset


def same_padding(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Zero-pad as TensorFlow's 'SAME' convolution does, by amounts that depend on the size of x (N, C, H, W)."""
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(same_padding, (x,), x, kernel, stride, dilation)
    return pad_same(x, kernel, stride, dilation)


def low_pass(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Filter each channel of x (N, C, H, W) by a 3×3 kernel, (C, 1, 3, 3) or one for all, with reflected borders.

    Maps that are one pixel high or wide cannot be reflected: their borders are repeated.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(low_pass, (x,), x, kernel, stride)
    has_neighbors = x.shape[-2] > 1 and x.shape[-1] > 1
    x = F.pad(x, [1, 1, 1, 1], "reflect" if has_neighbors else "replicate")
    channels = int(x.shape[1])  # tracers pass sizes as tensors
    return F.conv2d(x, kernel.to(x).expand(channels, 1, 3, 3), stride=stride, groups=channels)


def sigmoid_activation(x: Tensor) -> Tensor:
    """The sigmoid as an activation, see `nn.layers.SigmoidActivation`; `torch.sigmoid` counts as a gate."""
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(sigmoid_activation, (x,), x)
    return torch.sigmoid(x)


def shifted_activation(x: Tensor, shift: Tensor, act: nn.Module) -> Tensor:
    """a(x + shift) - a(shift), which is 0 at 0: x times a gate, the mean slope of a between shift and x + shift.

    The gate is a multiplier of DeepLIFT's Rescale rule (https://arxiv.org/abs/1704.02685, section 3.5.1) whose
    reference is the shift.

    Args:
        x: Any shape.
        shift: Broadcastable to x.
        act: Elementwise activation a, which may work in place. Its hooks run for x + shift only.
    """
    if has_torch_function((x, shift)):
        return handle_torch_function(shifted_activation, (x, shift), x, shift, act)
    changed: Tensor = act(x + shift) - act.forward(shift.clone())
    return changed


def to_logits(y: Tensor, temperature: float, logit_bias: float) -> Tensor:
    """Compute y / T + logit bias, for half precision in float32, because y / T may exceed float16's range.

    Under autocast the result stays in float32. In the official code (package `bcos`) this is `LogitLayer`, with
    `logit_temperature` and `logit_bias`.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(y):
            return handle_torch_function(to_logits, (y,), y, temperature, logit_bias)
        if y.dtype == torch.float16 or y.dtype == torch.bfloat16:
            logits = y.float() / temperature + logit_bias
            kind = y.device.type
            autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on "meta"
            return logits if autocast else logits.to(y.dtype)
    return y / temperature + logit_bias
