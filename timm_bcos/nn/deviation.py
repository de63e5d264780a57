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
    gamma: float


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
        slopes = _Slopes((part * g for part, g in pieces(x, grad)), weight, mean, inverse)
        grad_x = torch.empty_like(x)
        for part, g, out in pieces(x, grad, grad_x):
            slopes.apply(part, g, out)
        return grad_x, slopes.by_weight, None


class _DivideResponse(torch.autograd.Function):
    """The same for a B = 2 response, which is not kept: its gradients go to what it was computed from."""

    @staticmethod
    def forward(
        ctx: _Saved, x: Tensor, weight: Tensor, eps: float, linear: Tensor, norm: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        ctx.gamma = gamma
        return _forward(ctx, x, weight, eps, linear, norm)

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, mean, inverse, linear, norm = ctx.saved_tensors
        inverse_norm = ctx.gamma / norm
        if torch.is_grad_enabled():
            x, inputs = signed_square(linear, inverse_norm), [linear, norm, weight]
            by_linear, by_norm, by_weight = _literal_gradients(grad, x, weight, ctx.eps, inputs)
            return None, by_weight, None, by_linear, by_norm, None
        products = (signed_square(a, q).mul_(g) for a, q, g in pieces(linear, inverse_norm, grad))
        slopes = _Slopes(products, weight, mean, inverse)
        by_linear, by_norm = torch.empty_like(linear), torch.empty_like(norm)
        for a, n, q, g, out, out_norm in pieces(linear, norm, inverse_norm, grad, by_linear, by_norm):
            x = signed_square(a, q)
            slopes.apply(x, g, x)
            square_gradient(a, n, q, x, out, out_norm)
        return None, slopes.by_weight, None, by_linear, by_norm, None


class _Slopes:
    """The gradient by x = grad · a + x · b + c, with a number per channel each.

    From d var / d x = 2 (x - mean) / n and d (1 / sqrt(var + eps)) / d var = -1/2 (var + eps)^(-3/2).
    """

    def __init__(self, products: Iterable[Tensor], weight: Tensor, mean: Tensor, inverse: Tensor) -> None:
        """Of all parts of grad · x."""
        dot, count = torch.zeros_like(inverse), 0
        for product in products:
            dot += product.sum((2, 3), dtype=inverse.dtype).sum(0)
            count += product.numel() // product.shape[1]
        slope = -dot * weight * inverse**3 / count
        self.by_weight = (dot * inverse).to(weight.dtype)
        self._factors = [_per_channel(values) for values in (weight * inverse, slope, -slope * mean)]

    def apply(self, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write the gradient by x to `out`, which may be x."""
        by_grad, by_x, constant = (factor.to(x.dtype) for factor in self._factors)
        torch.addcmul(constant, x, by_x, out=out).addcmul_(grad, by_grad)


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) each, exact where the mean is large: of each image, and then of the images' means.

    `torch.var` takes several times as long on a CPU, and so do the kernels of `torch.native_batch_norm`.
    """
    means, variances = [], []
    for (part,) in pieces(x):
        wide = part.float() if x.dtype in (torch.float16, torch.bfloat16) else part
        mean = wide.mean((2, 3), keepdim=True)
        deviation = wide - mean
        means.append(mean.flatten(1))
        variances.append(deviation.mul_(deviation).mean((2, 3)))
    mean = torch.cat(means)
    return mean.mean(0), torch.cat(variances).mean(0).add_(mean.var(0, correction=0))


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
