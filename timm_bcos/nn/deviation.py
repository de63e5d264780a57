"""Division by a batch's deviation: the uncentred batch norm of training (section 3.3 of arXiv 2306.10898)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import handle_torch_function, has_torch_function

from .cosine import origin, signed_square, square_gradient
from .memory import is_program, pieces

__all__ = ["divide_by_deviation"]


def divide_by_deviation(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Uncentred batch norm of a training batch: weight · x / sqrt(var + eps).

    Args:
        x: (N, C, H, W). Where it is a B = 2 response, it is computed again in the backward pass instead of being kept.
        weight: (C,).
        eps: Added to the variance.

    Returns:
        The result, and the batch's biased variance (C,), which carries no gradient.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(divide_by_deviation, (x, weight), x, weight, eps)
    made_of = None if is_program(x) else origin(x)
    if made_of is None:
        return _DivideByDeviation.apply(x, weight, eps)
    return _DivideResponse.apply(x.detach(), weight, eps, *made_of)


class _Saved(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]
    eps: float


def _forward(ctx: _Saved, x: Tensor, weight: Tensor, eps: float, *kept: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _mean_and_variance(x)
    inverse = (var + eps).rsqrt()
    ctx.save_for_backward(weight, mean, inverse, *kept)
    ctx.eps = eps
    ctx.mark_non_differentiable(var)
    return x * _per_channel(weight * inverse).to(x.dtype), var


class _DivideByDeviation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _forward(ctx, x, weight, eps, x)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, mean, inverse, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be taken
            return *_literal_gradients(grad, x, weight, ctx.eps, [x, weight]), None
        slopes = _Slopes(pieces(x, grad), weight, mean, inverse)
        grad_x = torch.empty_like(x)
        for part, g, out in pieces(x, grad, grad_x):
            slopes.apply(part, g, out)
        return grad_x, slopes.by_weight, None


class _DivideResponse(torch.autograd.Function):
    """The same for a B = 2 response, which is not kept: its gradients go to what it was computed from."""

    @staticmethod
    def forward(
        ctx: _Saved, x: Tensor, weight: Tensor, eps: float, linear: Tensor, inverse_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(ctx, x, weight, eps, linear, inverse_norm)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, mean, inverse, linear, inverse_norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            x, inputs = signed_square(linear, inverse_norm), [linear, inverse_norm, weight]
            by_linear, by_norm, by_weight = _literal_gradients(grad, x, weight, ctx.eps, inputs)
            return None, by_weight, None, by_linear, by_norm
        responses = ((signed_square(a, q), g) for a, q, g in pieces(linear, inverse_norm, grad))
        slopes = _Slopes(responses, weight, mean, inverse)
        by_linear, by_norm = torch.empty_like(linear), torch.empty_like(inverse_norm)
        for a, q, g, out, out_norm in pieces(linear, inverse_norm, grad, by_linear, by_norm):
            x = signed_square(a, q)
            slopes.apply(x, g, x)
            square_gradient(a, q, x, out, out_norm)
        return None, slopes.by_weight, None, by_linear, by_norm


class _Slopes:
    """The gradient by x = grad · a + x · b + c, with a number per channel each.

    From d var / d x = 2 (x - mean) / n and d (1 / sqrt(var + eps)) / d var = -1/2 (var + eps)^(-3/2).
    """

    def __init__(self, parts: Iterable[tuple[Tensor, ...]], weight: Tensor, mean: Tensor, inverse: Tensor) -> None:
        dot, count = torch.zeros_like(inverse), 0
        for x, grad in parts:
            dot += (grad * x).sum((0, 2, 3), dtype=inverse.dtype)
            count += x.numel() // x.shape[1]
        slope = -dot * weight * inverse**3 / count
        self.by_weight = (dot * inverse).to(weight.dtype)
        self._factors = [_per_channel(values) for values in (weight * inverse, slope, -slope * mean)]

    def apply(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the gradient by x to `out`, which may be x."""
        by_grad, by_x, constant = (factor.to(x.dtype) for factor in self._factors)
        torch.addcmul(constant, x, by_x, out=out).addcmul_(grad, by_grad)


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) each, exact where the mean is large: of each part, and then of the parts' means (all are equally large).

    `torch.var` takes several times as long on a CPU, and so do the kernels of `torch.native_batch_norm`.
    """
    means, variances = [], []
    for (part,) in pieces(x):
        wide = part.float() if x.dtype in (torch.float16, torch.bfloat16) else part
        mean = wide.mean((0, 2, 3), keepdim=True)
        means.append(mean.flatten())
        deviation = wide - mean
        variances.append(deviation.mul_(deviation).mean((0, 2, 3)))
    if len(means) == 1:
        return means[0], variances[0]
    mean = torch.stack(means)
    return mean.mean(0), torch.stack(variances).mean(0).add_(mean.var(0, correction=0))


def _literal_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, inputs: list[Tensor]
) -> list[Tensor | None]:
    """On the graph."""
    y = x * _per_channel(weight * (x.var((0, 2, 3), correction=0) + eps).rsqrt())
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _per_channel(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)
