"""Linear layers with a bias. Their weights, too, may depend on the image."""

from torch import Tensor

from .products import share
from .table import Function, Mode, handles, named, on_linear_path

__all__ = ["CONVOLUTIONS", "linear"]

CONVOLUTIONS = named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")


@handles(*CONVOLUTIONS)
def _convolution(
    mode: Mode,
    func: Function, /,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: object,
    **kw: object,
) -> Tensor:  # fmt: skip
    shape = (-1,) + (1,) * (weight.ndim - 2)
    if on_linear_path(weight) or on_linear_path(bias):
        y = share(lambda x, w: func(x, w, None, *rest, **kw), [input, weight])
        return y if bias is None else mode.add(y + bias.reshape(shape), bias.reshape(shape), func, bias)
    y = func(input, weight, bias, *rest, **kw)
    return y if bias is None else mode.add(y, bias.reshape(shape), func, bias)


@handles(*named("linear"))
def linear(mode: Mode, func: Function, /, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    if on_linear_path(weight) or on_linear_path(bias):
        y = share(lambda x, w: func(x, w), [input, weight])
        return y if bias is None else mode.add(y + bias, bias, func)
    y = func(input, weight, bias)
    return y if bias is None else mode.add(y, bias, func)
