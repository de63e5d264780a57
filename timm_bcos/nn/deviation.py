"""Division by a batch's deviation: the uncentred batch norm of training (section 3.3 of arXiv 2306.10898)."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["divide_by_deviation", "mean_and_variance"]


def divide_by_deviation(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Uncentred batch norm of a training batch: weight · x / sqrt(var + eps).

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
        mean = mean.detach()  # the gradient through it is 0; programs have no second derivatives, where it is not
    return mean.flatten(), (wide - mean).square().mean((0, 2, 3))
