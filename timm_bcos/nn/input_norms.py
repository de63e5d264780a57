"""The norms of what B-cos units see: patches of feature maps, and feature vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import handle_torch_function, has_torch_function_unary

from .execution import only_infers, pieces

__all__ = ["by_window_sum", "feature_norm", "patch_norm", "sum_of_groups", "window_sum"]


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
    """Norm of every patch that a convolution sees: sqrt(Σ x² + eps) over the window and the group of channels.

    Args:
        x: (N, C, H, W), or (C, H, W).
        kernel: Window (height, width).
        stride: Of the window, per dimension.
        padding: Zeros on each side, per dimension.
        dilation: Spacing of the window, per dimension.
        groups: G.
        eps: Added inside the root.
        channel_squares: (C,), s² for the norm of s · x instead.

    Returns:
        (N, G, H', W'), in float32 for half precision.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(
            patch_norm, (x,), x, kernel, stride, padding, dilation, groups, eps, channel_squares
        )
    kernel = [int(size) for size in kernel]  # not tensors, as which tracers see sizes
    if torch.jit.is_scripting():
        sums = _sum_of_squares(x, groups, channel_squares)
    else:
        sums = _sum_in_pieces(x, groups, channel_squares)
    return (window_sum(sums, kernel, stride, padding, dilation) + eps).sqrt()


def _sum_in_pieces(x: Tensor, groups: int, channel_squares: Tensor | None) -> Tensor:
    if x.ndim != 4 or not only_infers(x):
        return _sum_of_squares(x, groups, channel_squares)
    sums = [_sum_of_squares(part, groups, channel_squares) for (part,) in pieces(x)]
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def _sum_of_squares(x: Tensor, groups: int, channel_squares: Tensor | None) -> Tensor:
    wide = _wide(x)
    squares = wide * wide
    if channel_squares is not None:
        squares = squares * channel_squares.reshape(-1, 1, 1)
    return sum_of_groups(squares, groups)


def feature_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Norm of feature vectors, ‖x‖ + eps.

    Args:
        x: (..., C).
        eps: Keeps the norm of 0 off 0.

    Returns:
        (..., 1), in float32 for half precision.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(feature_norm, (x,), x, eps)
    wide = _wide(x)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what is inside)
        if only_infers(x):
            return torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + eps
    # which has second derivatives at a vector of zeros, too
    return (wide * wide).sum(-1, keepdim=True).clamp_min(eps * eps).sqrt() + eps


def _wide(x: Tensor) -> Tensor:
    """In float32 for half precision, whose squares overflow float16 at 65504."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def sum_of_groups(x: Tensor, groups: int) -> Tensor:
    """Sum over each group's channels, (N, C, H, W) to (N, G, H, W)."""
    if groups == 1:
        return x.sum(-3, keepdim=True)
    return x if groups == int(x.shape[-3]) else x.unflatten(-3, [groups, x.shape[-3] // groups]).sum(-3)


def window_sum(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Sum of each channel over the windows of a convolution, zero padding included: a box filter."""
    if kernel == [1, 1] and padding == [0, 0]:
        return x[..., :: stride[0], :: stride[1]]
    if _pools(x, kernel, padding, dilation):
        # not `divisor_override=1`: ONNX has none, and its export drops it silently
        return F.avg_pool2d(x, kernel, stride, padding) * (kernel[0] * kernel[1])
    channels = int(x.shape[-3])
    ones = torch.ones([channels, 1, kernel[0], kernel[1]], dtype=x.dtype, device=x.device)
    return F.conv2d(x, ones, None, stride, padding, dilation, channels)


def by_window_sum(
    grad: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The gradient by x (of that size) of `window_sum`, from the gradient by its result."""
    if kernel == [1, 1] and padding == [0, 0] and stride == [1, 1]:
        return grad
    if _pools(grad, kernel, padding, dilation):
        whole = grad * (kernel[0] * kernel[1])
        like = grad.new_empty([]).expand(size)  # read for its size alone
        found: Tensor = torch.ops.aten.avg_pool2d_backward(whole, like, kernel, stride, padding, False, True, None)
        return found
    ones = grad.new_ones([size[1], 1, *kernel])
    return conv2d_input(size, ones, grad, stride, padding, dilation, size[1])


def _pools(x: Tensor, kernel: list[int], padding: list[int], dilation: list[int]) -> bool:
    """Whether average pooling has such windows, and is not slower."""
    pools = dilation == [1, 1] and padding[0] <= kernel[0] // 2 and padding[1] <= kernel[1] // 2
    if not torch.jit.is_scripting():
        pools = pools and not _convolves_faster(x)
    return pools


def _convolves_faster(x: Tensor) -> bool:
    """A CPU pools many channels over ten times as slowly as it convolves them; autocast would round the sums."""
    is_exact = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and int(x.shape[-3]) > 1 and is_exact
