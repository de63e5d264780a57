"""The parts of the B-cos transform as functions: input encoding, norms of patches, logits.

Paper: B-cos Networks: Alignment is All We Need for Interpretability (CVPR 2022), https://arxiv.org/abs/2205.10268.
A unit computes y(x) = γ · |cos(x, w)|^(B-1) · ŵᵀx (eq. 3 there, γ in its section 3.2.2).

Each function takes part in `__torch_function__` dispatch. That is how explanation mode (`timm_bcos.dynamic`) replaces
it, and why `torch.fx` traces it as one node.
"""

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..errors import InputError
from .memory import pieces

__all__ = [
    "encode_image",
    "feature_norm",
    "passed_sigmoid",
    "patch_norm",
    "same_padding",
    "scale_and_offset",
    "to_logits",
]


def encode_image(image: Tensor, in_chans: int) -> Tensor:
    """Encode an image as [r, g, b, 1-r, 1-g, 1-b], so that each colour has its own direction.

    Args:
        image: (N, C, H, W) pixels in [0, 1], or an already encoded (N, 2C, H, W), which is returned as it is.
        in_chans: C, the number of image channels.

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
    """Normalise encoded images (N, 2C, H, W): image · scale + offset, both of shape (2C, 1, 1)."""
    if not torch.jit.is_scripting() and has_torch_function_unary(image):
        return handle_torch_function(scale_and_offset, (image,), image, scale, offset)
    return image * scale + offset


def same_padding(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Zero-pad as TensorFlow's 'SAME' convolution does, by amounts that depend on the size of x (N, C, H, W)."""
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(same_padding, (x,), x, kernel, stride, dilation)
    return pad_same(x, kernel, stride, dilation)


def passed_sigmoid(x: Tensor) -> Tensor:
    """The sigmoid as an activation, whose value is passed on; elsewhere it is a gate, which only scales."""
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(passed_sigmoid, (x,), x)
    return torch.sigmoid(x)


def _sum_of_squares(x: Tensor, groups: int, weights: Tensor | None = None) -> Tensor:
    """Σ weight · x² over each group's channels, (N, C, H, W) to (N, G, H, W)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # squares overflow float16 at 65504
    if weights is None and groups == 1 and wide.is_contiguous(memory_format=torch.channels_last):
        return torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_()  # in one pass, in this layout alone
    parts = [_sum_of_groups(part * part, groups, weights) for (part,) in pieces(wide)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum_of_groups(squares: Tensor, groups: int, weights: Tensor | None) -> Tensor:
    """(..., C, H, W), which is used up, to (..., G, H, W)."""
    if weights is not None:
        squares = squares.mul_(weights.reshape(-1, 1, 1))
    return squares.unflatten(-3, (groups, -1)).sum(-3)


class _Saved(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]


class _SumOfSquares(torch.autograd.Function):
    """Σ x² over a group's channels, whose backward pass is one multiplication."""

    @staticmethod
    def forward(ctx: _Saved, x: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x)
        return _sum_of_squares(x, groups)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        twice = (2 * grad).unsqueeze(2)  # (N, G, 1, H, W)
        return (x.unflatten(1, (grad.shape[1], -1)) * twice).flatten(1, 2).to(x.dtype), None


def _convolves_faster(x: Tensor) -> bool:
    """A CPU pools many channels over ten times as slowly as it convolves them; autocast would round the sums."""
    kind = x.device.type
    is_exact = x.dtype == torch.float32 and not (kind == "cpu" and torch.is_autocast_enabled(kind))
    return kind == "cpu" and x.shape[1] > 1 and is_exact


def _window_sum(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Sum of each channel over the windows of a convolution, zero padding included."""
    if kernel == [1, 1] and padding == [0, 0]:
        return x[:, :, :: stride[0], :: stride[1]]
    pools = dilation == [1, 1] and padding[0] <= kernel[0] // 2 and padding[1] <= kernel[1] // 2
    if not torch.jit.is_scripting():
        pools = pools and not _convolves_faster(x)
    if pools:
        # not `divisor_override=1`: ONNX has none, and its export drops it silently
        return F.avg_pool2d(x, kernel, stride, padding) * (kernel[0] * kernel[1])
    ones = torch.ones([x.shape[1], 1, kernel[0], kernel[1]], dtype=x.dtype, device=x.device)
    return F.conv2d(x, ones, None, stride, padding, dilation, x.shape[1])


def patch_norm(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float = 1e-6,
    channel_squares: Tensor | None = None,
) -> Tensor:
    """Norm of every patch that a convolution sees: sqrt(Σ x² + eps) over the window and the channel group.

    It costs one pass over x, and a box filter on a single channel per group.

    Args:
        x: (N, C, H, W).
        kernel: Window (height, width).
        stride: Of the window, per dimension.
        padding: Zeros on each side, per dimension.
        dilation: Spacing of the window, per dimension.
        groups: Channel groups G.
        eps: Added inside the root.
        channel_squares: (C,), s² where the patches are those of s · x; inference alone.

    Returns:
        (N, G, H', W'), in float32 for half-precision input.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(
            patch_norm, (x,), x, kernel, stride, padding, dilation, groups, eps, channel_squares
        )
    if torch.jit.is_scripting():
        squares = x * x
        if channel_squares is not None:
            squares = squares * channel_squares.reshape(-1, 1, 1)
        squares = squares.unflatten(1, [groups, x.shape[1] // groups]).sum(2)
    elif channel_squares is not None:
        squares = _sum_of_squares(x, groups, channel_squares)
    else:
        squares = _SumOfSquares.apply(x, groups)
    return (_window_sum(squares, kernel, stride, padding, dilation) + eps).sqrt()


def feature_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Norm of feature vectors, ‖x‖ + eps.

    Args:
        x: (..., C).
        eps: Keeps the norm of 0 off 0.

    Returns:
        (..., 1), in float32 for half-precision input.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(x):
            return handle_torch_function(feature_norm, (x,), x, eps)
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            x = x.float()
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps


def to_logits(y: Tensor, temperature: float, logit_bias: float) -> Tensor:
    """y / T + logit bias, in float32: y / T may exceed float16's range, so under autocast it also stays float32."""
    if not torch.jit.is_scripting():
        if has_torch_function_unary(y):
            return handle_torch_function(to_logits, (y,), y, temperature, logit_bias)
        if y.dtype == torch.float16 or y.dtype == torch.bfloat16:
            logits = y.float() / temperature + logit_bias
            kind = y.device.type
            autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on "meta"
            return logits if autocast else logits.to(y.dtype)
    return y / temperature + logit_bias
