"""The norms of what B-cos units see: patches of feature maps, and feature vectors.

Gradients reach x on two ways, through the linear response and through its norm. The functions here hand x on beside its
norm, so that the backward pass joins both in one step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.grad import conv2d_input
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.weak import WeakIdKeyDictionary

from .cosine import Origin, gradients_past, origin
from .memory import is_program, pieces

__all__ = ["window_norm", "with_feature_norm", "with_squares"]


def with_squares(x: Tensor, groups: int, channel_squares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ x² over each group of channels, beside x itself.

    Args:
        x: (N, C, H, W).
        groups: Channel groups G.
        channel_squares: (C,), s² for the squares of s · x instead; inference alone.

    Returns:
        x, for the convolution; and (N, G, H, W), in float32 for half-precision input.
    """
    if not torch.jit.is_scripting():
        return _with_squares(x, groups, channel_squares)
    squares = x * x
    if channel_squares is not None:
        squares = squares * channel_squares.reshape(-1, 1, 1)
    return x, squares.unflatten(1, [groups, x.shape[1] // groups]).sum(2)


def _with_squares(x: Tensor, groups: int, channel_squares: Tensor | None) -> tuple[Tensor, Tensor]:
    if has_torch_function_unary(x):
        return handle_torch_function(with_squares, (x,), x, groups, channel_squares)
    if channel_squares is not None:
        return x, _sum_of_squares(x, groups, channel_squares)
    if torch.is_grad_enabled() and x.requires_grad:
        made_of, squares = _origin(x) if groups == 1 else None, _squares_once(x, groups)
        if made_of is None:
            return _WithSquares.apply(x, squares)
        return _PastWithSquares.apply(x.detach(), squares, *made_of)
    return x, _shared(x, groups, lambda: _sum_of_squares(x, groups))


def window_norm(
    squares: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], eps: float = 1e-6
) -> Tensor:
    """Norm of every patch that a convolution sees: sqrt(Σ x² + eps) over the window and the channel group.

    It costs a box filter on a single channel per group.

    Args:
        squares: (N, G, H, W) from `with_squares`.
        kernel: Window (height, width).
        stride: Of the window, per dimension.
        padding: Zeros on each side, per dimension.
        dilation: Spacing of the window, per dimension.
        eps: Added inside the root.

    Returns:
        (N, G, H', W').
    """
    if not torch.jit.is_scripting():
        return _window_norm(squares, kernel, stride, padding, dilation, eps)
    return (_window_sum(squares, kernel, stride, padding, dilation) + eps).sqrt()


def _window_norm(
    squares: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], eps: float
) -> Tensor:
    if has_torch_function_unary(squares):
        return handle_torch_function(window_norm, (squares,), squares, kernel, stride, padding, dilation, eps)
    if torch.is_grad_enabled() and squares.requires_grad and squares.shape[1] > 1:
        norm: Tensor = _WindowNorm.apply(squares, kernel, stride, padding, dilation, eps)
        return norm
    return (_window_sum(squares, kernel, stride, padding, dilation) + eps).sqrt()


def with_feature_norm(x: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Norm of feature vectors, ‖x‖ + eps, beside x itself.

    Args:
        x: (..., C).
        eps: Keeps the norm of 0 off 0.

    Returns:
        x, for the linear layer; and (..., 1), in float32 for half-precision input.
    """
    if not torch.jit.is_scripting():
        return _with_feature_norm(x, eps)
    return x, _vector_norm(x) + eps


def _with_feature_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if has_torch_function_unary(x):
        return handle_torch_function(with_feature_norm, (x,), x, eps)
    if torch.is_grad_enabled() and x.requires_grad:
        made_of = _origin(x)
        norm = _norm_once(x)
        x, norm = _WithNorm.apply(x, norm) if made_of is None else _PastWithNorm.apply(x.detach(), norm, *made_of)
        return x, norm + eps
    return x, _shared(x, eps, lambda: _vector_norm(_wide(x)) + eps)


def _origin(x: Tensor) -> Origin | None:
    """What x was computed from, where that can be told from x itself: float16 has no room for squares."""
    made_of = None if is_program(x) or x.dtype == torch.float16 else origin(x)
    return made_of if made_of and made_of.gamma > 0 else None


_NORMS = WeakIdKeyDictionary()  # an input that is alive, to its version and what was computed of it


def _shared(x: Tensor, key: float, compute: Callable[[], Tensor]) -> Tensor:
    """What is computed of x off the graph, once for all layers that read x (branches, a block and its shortcut)."""
    if is_program(x) or x.is_inference():
        return compute()
    state = x._version, key
    found: tuple[tuple[int, float], Tensor] | None = _NORMS.get(x)
    if found is None or found[0] != state:
        found = _NORMS[x] = state, compute()
    return found[1]


@torch.no_grad()
def _squares_once(x: Tensor, groups: int) -> Tensor:
    """For x on the graph, whose leaves are written to by `x.data`; of many groups they are too large to be kept."""
    if x.is_leaf or groups > 1:
        return _sum_of_squares(x, groups)
    return _shared(x, groups, lambda: _sum_of_squares(x, groups))


@torch.no_grad()
def _norm_once(x: Tensor) -> Tensor:
    """Likewise, without eps."""
    return _vector_norm(_wide(x)) if x.is_leaf else _shared(x, 0.0, lambda: _vector_norm(_wide(x)))


def _wide(x: Tensor) -> Tensor:
    """In float32 for half precision, whose squares overflow float16 at 65504."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Saved(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]
    gamma: float
    size: torch.Size
    window: tuple[list[int], list[int], list[int], list[int]]


class _WithSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x, squares.view_as(squares)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, grad_squares: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        twice = (2 * grad_squares).to(x.dtype)
        if twice.shape[1] in (1, x.shape[1]):
            return torch.addcmul(grad, x, twice), None
        by_group = (twice.shape[1], -1)
        grad, x = grad.unflatten(1, by_group), x.unflatten(1, by_group)
        return torch.addcmul(grad, x, twice.unsqueeze(2)).flatten(1, 2), None


class _WithNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, norm)
        return x, norm.view_as(norm)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, grad_norm: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, norm = ctx.saved_tensors
        return torch.addcmul(grad, x, _norm_slope(x, norm, grad_norm).to(x.dtype)), None


class _WindowNorm(torch.autograd.Function):
    """Keeps the norm alone, which with a norm per channel is as large as the feature map."""

    @staticmethod
    def forward(
        ctx: _Saved, squares: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
        eps: float,
    ) -> Tensor:  # fmt: skip
        norm = (_window_sum(squares, kernel, stride, padding, dilation) + eps).sqrt_()
        ctx.save_for_backward(norm)
        ctx.size, ctx.window = squares.shape, (kernel, stride, padding, dilation)
        return norm

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (norm,) = ctx.saved_tensors
        kernel, stride, padding, dilation = ctx.window
        ones = norm.new_ones([norm.shape[1], 1, *kernel])
        half = grad / (2 * norm)
        return conv2d_input(list(ctx.size), ones, half, stride, padding, dilation, len(ones)), *[None] * 5


class _PastWithSquares(torch.autograd.Function):
    """`_WithSquares` of a B = 2 response, whose gradients go to what it was computed from, which is not kept."""

    @staticmethod
    def forward(
        ctx: _Saved, y: Tensor, squares: Tensor, linear: Tensor, norm: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        y = y.view_as(y)
        ctx.save_for_backward(y, norm)
        ctx.gamma = gamma
        return y, squares.view_as(squares)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, grad_squares: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, norm = ctx.saved_tensors
        return None, None, *gradients_past(y, norm, ctx.gamma, grad, 2 * grad_squares), None


class _PastWithNorm(torch.autograd.Function):
    """`_WithNorm`, likewise."""

    @staticmethod
    def forward(
        ctx: _Saved, y: Tensor, own_norm: Tensor, linear: Tensor, norm: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        y = y.view_as(y)
        ctx.save_for_backward(y, norm, own_norm)
        ctx.gamma = gamma
        return y, own_norm.view_as(own_norm)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, norm, own_norm = ctx.saved_tensors
        return None, None, *gradients_past(y, norm, ctx.gamma, grad, _norm_slope(y, own_norm, grad_norm)), None


def _norm_slope(x: Tensor, norm: Tensor, grad_norm: Tensor) -> Tensor:
    """What x is multiplied by in the gradient of its norm."""
    if torch.is_grad_enabled():  # a second derivative will be taken
        norm = _vector_norm(x)
    return grad_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)  # where the norm is 0, so is x


def _vector_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _sum_of_squares(x: Tensor, groups: int, weights: Tensor | None = None) -> Tensor:
    """Σ weight · x² over each group's channels, (N, C, H, W) to (N, G, H, W)."""
    if weights is None and groups == 1 and x.is_contiguous(memory_format=torch.channels_last):
        # in one pass, in this layout alone
        return torch.linalg.vector_norm(_wide(x), dim=1, keepdim=True).square_()
    wide = (_wide(part) for (part,) in pieces(x))
    parts = [_sum_of_groups(part * part, groups, weights) for part in wide]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sum_of_groups(squares: Tensor, groups: int, weights: Tensor | None) -> Tensor:
    """(..., C, H, W), which is used up, to (..., G, H, W)."""
    if weights is not None:
        squares = squares.mul_(weights.reshape(-1, 1, 1))
    return squares.unflatten(-3, (groups, -1)).sum(-3)


def _convolves_faster(x: Tensor) -> bool:
    """A CPU pools many channels over ten times as slowly as it convolves them; autocast would round the sums."""
    is_exact = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and x.shape[1] > 1 and is_exact


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
