"""Norms: statistics are constants; subtracting the mean of x's own features is linear."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..nn.norms import divide_by_shared_deviation, shared_variance
from ..nn.primitives import divide_by_deviation
from .activations import steady
from .products import share
from .registry import Function, Mode, detached, named, on_linear_path, rule

__all__: list[str] = []


@rule(F.batch_norm)
def _batch_norm(
    mode: Mode,
    func: Function,
    /,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With running statistics an affine map; with those of the batch, a norm over the features of x itself."""
    if not on_linear_path(input):
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1) + (1,) * (input.ndim - 2)
    if training or running_mean is None or running_var is None:
        if training and running_mean is not None:
            with torch.no_grad():
                func(detached(input), running_mean, running_var, None, None, True, momentum, eps)  # which follow
        dims = [0, *range(2, input.ndim)]
        return _affine(mode, func, _normed(input, dims, eps), weight, bias, shape)
    sources = [s for s in (running_mean, running_var, weight, bias) if s is not None]
    scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    scale, shift = scale.reshape(shape).to(input.dtype), shift.reshape(shape).to(input.dtype)
    # not torch's own, whose gradient is wrong for one image whose gradient has an odd stride (torch 2.14 on CPUs)
    return mode.add(share(torch.mul, [input, scale]) + shift, shift, func, *sources)


@rule(torch.batch_norm)
def _native_batch_norm(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float, eps: float, *_: bool,
) -> Tensor:  # fmt: skip
    return _batch_norm(mode, F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(torch.instance_norm)
def _native_instance_norm(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, use_input_stats: bool, momentum: float, eps: float,
    *_: bool,
) -> Tensor:  # fmt: skip
    return _instance_norm(
        mode, F.instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _normed(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    dims = tuple(dims)
    variance = detached(x).var(dims, correction=0, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt()


def _affine(
    mode: Mode, func: Function, /, y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] = ()
) -> Tensor:
    if weight is not None:
        y = share(torch.mul, [y, weight.reshape(shape) if shape else weight])
    if bias is None:
        return y
    addend = bias.reshape(shape) if shape else bias
    return mode.add(y + addend, addend, func, bias)


@rule(*named("layer_norm"))
def _layer_norm(
    mode: Mode, func: Function, /, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    return _affine(mode, func, _normed(input, range(-len(normalized_shape), 0), eps), weight, bias)


@rule(torch.native_layer_norm)
def _native_layer_norm(
    mode: Mode, func: Function, /, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, *statistics = func(detached(input), normalized_shape, None, None, eps)
    return _layer_norm(mode, F.layer_norm, input, normalized_shape, weight, bias, eps), statistics[0], statistics[1]


@rule(*named("group_norm"))
def _group_norm(
    mode: Mode, func: Function, /, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    grouped = input.unflatten(1, (num_groups, -1)).flatten(2)
    normed = _normed(grouped, [-1], eps).reshape(input.shape)
    return _affine(mode, func, normed, weight, bias, (-1,) + (1,) * (input.ndim - 2))


@rule(F.instance_norm)
def _instance_norm(
    mode: Mode, func: Function, /, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(mode, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    normed = _normed(input, range(2, input.ndim), eps)
    return _affine(mode, func, normed, weight, bias, (1, -1) + (1,) * (input.ndim - 2))


@rule(*named("rms_norm"))
def _rms_norm(
    mode: Mode, func: Function, /, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(mode, func, input * (detached(input).square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


@rule(*named("local_response_norm"))
def _local_response_norm(
    mode: Mode, func: Function, /, input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """y = x / divisor(x)^β."""
    point = detached(input)
    ones = steady(torch.where(point == 0, torch.finfo(input.dtype).eps, point))
    return input * (func(ones, size, alpha, beta, k) / ones)


@rule(divide_by_deviation)
def _divide_by_deviation(mode: Mode, func: Function, /, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _divided(x, weight, detached(x).var((0, *range(2, x.ndim)), correction=0), eps)


@rule(divide_by_shared_deviation)
def _divide_by_shared_deviation(
    mode: Mode, func: Function, /, x: Tensor, weight: Tensor, eps: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    return _divided(x, weight, shared_variance(detached(x), group), eps)


def _divided(x: Tensor, weight: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x * (weight * (var + eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype), var
