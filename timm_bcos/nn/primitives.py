"""The steps of the B-cos transform: effective weights, norms of patches and features, MaxOut, the cosine factor."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .execution import only_infers, pieces

__all__ = [
    "EPS",
    "by_window_sum",
    "cosine_factor",
    "divide_by_deviation",
    "effective_weight",
    "feature_norm",
    "has_amplitude",
    "inverse_norm",
    "max_out",
    "mean_and_variance",
    "norm_power",
    "patch_norm",
    "per_unit",
    "row_norm",
    "scale_by_cosine",
    "sum_of_groups",
    "unit_weight",
    "window_sum",
]


def norm_power(b: float, normalize_weight: bool) -> float:
    """The power p in the effective weight w / ‖w‖^p of a layer.

    With `normalize_weight` it is 1, which gives unit rows. Free rows keep their norm: p is 0 at B = 1, and 1/2 at
    B = 2, where the response is quadratic in the weight. For any other B, p is 1 and ‖w‖ multiplies the response
    (`has_amplitude`).
    """
    if normalize_weight or b not in (1.0, 2.0):
        return 1.0
    return 0.0 if b == 1.0 else 0.5


def has_amplitude(b: float, normalize_weight: bool) -> bool:
    """Whether the norm of each row multiplies the response, because the effective weight does not contain it."""
    return not normalize_weight and b != 1.0 and b != 2.0


def effective_weight(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    """The weight that a layer multiplies x by: w / ‖w‖^p, with p from `norm_power`."""
    power = norm_power(b, normalize_weight)
    return weight if power == 0.0 else unit_weight(weight, power)


def unit_weight(weight: Tensor, power: float = 1.0) -> Tensor:
    """Divide each output row of a weight by its Euclidean norm to the given power; 1 gives ŵ.

    Args:
        weight: (O, ...), one row per output unit.
        power: 1 for rows of unit norm; 1/2 for rows of norm √‖w‖.

    Returns:
        The shape and dtype of `weight`. Rows of zeros stay zero.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(weight):
        return handle_torch_function(unit_weight, (weight,), weight, power)
    return (weight * inverse_norm(weight, power)).to(weight.dtype)


def row_norm(weight: Tensor) -> Tensor:
    """‖w‖ of each output row, (O, ...) to (O,); in float32 for half precision, whose squares leave float16's range."""
    if not torch.jit.is_scripting() and has_torch_function_unary(weight):
        return handle_torch_function(row_norm, (weight,), weight)
    rows = weight.flatten(1)
    if weight.dtype == torch.float16 or weight.dtype == torch.bfloat16:
        rows = rows.float()
    return torch.linalg.vector_norm(rows, dim=1)


def inverse_norm(weight: Tensor, power: float) -> Tensor:
    """1 / ‖w‖^power of each row, (O, 1, ...); 1 for a row of zeros, which stays zero."""
    norm = row_norm(weight)
    norm = norm + (norm == 0).to(norm.dtype)
    # Roots, because a compiled program computes `pow` anew for every element of the row.
    inverse = norm.rsqrt() if power == 0.5 else norm.reciprocal() if power == 1.0 else norm.pow(-power)
    return inverse.reshape([-1] + [1] * (weight.ndim - 1))


def max_out(x: Tensor, units: int, dim: int) -> Tensor:
    """MaxOut: the largest response of each M neighboring units (section 4 of arXiv 2205.10268).

    Of equal responses the first one gets the whole gradient, so that units with equal weights become different.

    Args:
        x: Responses, unit m of output o at index o · M + m.
        units: M.
        dim: 1 for feature maps (N, O · M, H, W), -1 for feature vectors (..., O · M).

    Returns:
        The same with O instead of O · M.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(max_out, (x,), x, units, dim)
    neighbors = x.unflatten(dim, [-1, units]).unbind(dim + 1 if dim >= 0 else dim)
    best = neighbors[0]
    for other in neighbors[1:]:  # faster than `amax`
        best = _larger(best, other)
    return best


def _larger(first: Tensor, second: Tensor) -> Tensor:
    """`torch.maximum`, which would split the gradient of equal elements; here `first` gets all of it."""
    if torch.jit.is_scripting():
        is_inference = not (first.requires_grad or second.requires_grad)
    else:
        is_inference = only_infers(first, second) or torch.onnx.is_in_onnx_export()
    if is_inference:
        return torch.maximum(first, second)  # several times as fast
    return torch.where((first >= second) | first.isnan(), first, second)  # NaN is passed on


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
        stride: Stride of the window, (height, width).
        padding: Zeros added on each side, (height, width).
        dilation: Spacing of the window's elements, (height, width).
        groups: Number of groups of channels, G.
        eps: Constant added inside the root.
        channel_squares: (C,), s² to compute the norm of s · x; None for the norm of x.

    Returns:
        (N, G, H', W'), in float32 for half precision.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(
            patch_norm, (x,), x, kernel, stride, padding, dilation, groups, eps, channel_squares
        )
    kernel = [int(size) for size in kernel]  # tracers pass sizes as tensors
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
        eps: Constant added to the norm, so that it is never 0.

    Returns:
        (..., 1), in float32 for half precision.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(feature_norm, (x,), x, eps)
    wide = _wide(x)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript leaves out what is inside)
        if only_infers(x):
            return torch.linalg.vector_norm(wide, dim=-1, keepdim=True) + eps
    # Unlike `vector_norm`, this has second derivatives at a vector of zeros.
    return (wide * wide).sum(-1, keepdim=True).clamp_min(eps * eps).sqrt() + eps


def _wide(x: Tensor) -> Tensor:
    """x in float32 if it has half precision, because squares overflow float16 at 65504."""
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
        # Not `divisor_override=1`, which the export to ONNX drops silently.
        return F.avg_pool2d(x, kernel, stride, padding) * (kernel[0] * kernel[1])
    channels = int(x.shape[-3])
    ones = torch.ones([channels, 1, kernel[0], kernel[1]], dtype=x.dtype, device=x.device)
    return F.conv2d(x, ones, None, stride, padding, dilation, channels)


def by_window_sum(
    grad: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The gradient of `window_sum` by its input x.

    Args:
        grad: The gradient by the sums.
        size: Shape of x.
        kernel: See `window_sum`.
        stride: See `window_sum`.
        padding: See `window_sum`.
        dilation: See `window_sum`.
    """
    if kernel == [1, 1] and padding == [0, 0] and stride == [1, 1]:
        return grad
    if _pools(grad, kernel, padding, dilation):
        whole = grad * (kernel[0] * kernel[1])
        like = grad.new_empty([]).expand(size)  # only its size is used
        found: Tensor = torch.ops.aten.avg_pool2d_backward(whole, like, kernel, stride, padding, False, True, None)
        return found
    ones = grad.new_ones([size[1], 1, *kernel])
    return conv2d_input(size, ones, grad, stride, padding, dilation, size[1])


def _pools(x: Tensor, kernel: list[int], padding: list[int], dilation: list[int]) -> bool:
    """Whether average pooling supports these windows and is not slower than a convolution."""
    pools = dilation == [1, 1] and padding[0] <= kernel[0] // 2 and padding[1] <= kernel[1] // 2
    if not torch.jit.is_scripting():
        pools = pools and not _convolves_faster(x)
    return pools


def _convolves_faster(x: Tensor) -> bool:
    """Whether this is a map of several channels on a CPU, which pools them over ten times as slowly as it convolves.

    Under autocast a convolution would round the sums.
    """
    is_exact = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and int(x.shape[-3]) > 1 and is_exact


EPS = 1e-6  # added to |cos|, whose power has no derivative at 0 unless B is 2


def scale_by_cosine(
    linear: Tensor, norm: Tensor, b: float, gamma: float, inplace: bool = False, groups: int = 1
) -> Tensor:
    """Turn the linear response ŵᵀx into the B-cos response γ · |ŵᵀx / ‖x‖|^(B-1) · ŵᵀx.

    Args:
        linear: ŵᵀx, any shape.
        norm: ‖x‖, broadcastable to `linear`; of maps (N, O, H, W) also one for each group of channels, (N, G, H, W).
        b: The exponent B, not 1.
        gamma: The fixed output scale γ.
        inplace: Whether `linear` may be overwritten if no gradients are recorded.
        groups: Number of groups of channels, G.

    Returns:
        The shape and dtype of `linear`.
    """
    if not torch.jit.is_scripting():
        if has_torch_function((linear, norm)):
            return handle_torch_function(scale_by_cosine, (linear, norm), linear, norm, b, gamma, inplace, groups)
        if inplace and b == 2 and only_infers(linear, norm):
            return _square_in_place(linear, gamma / per_unit(norm, linear, groups))
    return (linear * cosine_factor(linear, norm, b, gamma, groups)).to(linear.dtype)


def _square_in_place(linear: Tensor, inverse: Tensor) -> Tensor:
    """Overwrite a with |a| · a · γ / n, given a and γ / n."""
    for part, scale in pieces(linear, inverse):
        part.mul_(part.abs().to(scale.dtype).mul_(scale))
    return linear


def cosine_factor(linear: Tensor, norm: Tensor, b: float, gamma: float, groups: int = 1, eps: float = EPS) -> Tensor:
    """The factor γ · |cos|^(B-1) of `scale_by_cosine`, with |cos| = |ŵᵀx| / ‖x‖, plus eps unless B is 2."""
    norm = per_unit(norm, linear, groups)
    if b == 2:
        return linear.abs() * (gamma / norm)
    return gamma * _power(linear.abs() / norm + eps, b - 1)


def per_unit(norm: Tensor, like: Tensor, groups: int) -> Tensor:
    """Repeat norms of G groups of channels, (N, G, H, W), so that they broadcast to maps (N, C, H, W)."""
    if groups == 1:
        return norm
    channels = int(like.shape[-3])  # tracers pass sizes as tensors
    return norm if groups == channels else norm.repeat_interleave(channels // groups, -3)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent of positive x. Roots are faster than `pow`, forward and backward."""
    if exponent == 0.25:
        return x.sqrt().sqrt()
    return x.sqrt() if exponent == 0.5 else x.pow(exponent)


def divide_by_deviation(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Uncentered batch norm of a training batch: weight · x / sqrt(var + eps).

    Args:
        x: (N, C, H, W).
        weight: (C,).
        eps: Added to the variance.

    Returns:
        The result, and the batch's biased variance (C,), which carries no gradient.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(divide_by_deviation, (x, weight), x, weight, eps)
    _, var = mean_and_variance(x)
    return x * (weight * (var + eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype), var.detach()


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, H, W), (C,) each, in float32 for half precision.

    `torch.var` takes about ten times as long on a CPU, and `torch.native_batch_norm` several times.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean((0, 2, 3), keepdim=True)
    if torch.compiler.is_compiling():
        mean = mean.detach()  # its gradient is 0, and compiled programs have no second derivatives, where it is not
    return mean.flatten(), (wide - mean).square().mean((0, 2, 3))
