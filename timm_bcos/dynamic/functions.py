"""How torch functions are rewritten in explanation mode: gates, activations, norms, linear maps, sums and products."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import functional
from .mode import constant, declare, on_linear_path

__all__: list[str] = []


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# Statistics and gates: what they return only scales the linear path.


@declare(
    functional.patch_norm,
    functional.feature_norm,
    torch.sigmoid,
    torch.Tensor.sigmoid,
    torch.Tensor.sigmoid_,
    F.sigmoid,
    F.hardsigmoid,
    torch.softmax,
    torch.Tensor.softmax,
    F.softmax,
    F.log_softmax,
    torch.var,
    torch.Tensor.var,
    torch.std,
    torch.Tensor.std,
    torch.norm,
    torch.Tensor.norm,
    torch.linalg.vector_norm,
    F.normalize,
    torch.sqrt,
    torch.Tensor.sqrt,
    torch.rsqrt,
    torch.Tensor.rsqrt,
    torch.exp,
    torch.Tensor.exp,
    torch.log,
    torch.Tensor.log,
    torch.log1p,
    torch.erf,
    torch.sin,
    torch.Tensor.sin,
    torch.cos,
    torch.Tensor.cos,
    torch.reciprocal,
    torch.Tensor.reciprocal,
    torch.Tensor.__rtruediv__,
    torch.Tensor.__rdiv__,
    torch.Tensor.__rpow__,
)
def _gate(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*map(_detached, args), **kwargs)


# Activations: a(x) = a(0) + x · slope, the slope a constant.


@declare(
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
    F.elu,
    F.celu,
    F.selu,
    F.softplus,
    F.relu6,
    F.hardtanh,
    F.softsign,
    F.tanh,
    torch.tanh,
    torch.Tensor.tanh,
    torch.Tensor.tanh_,
    torch.clamp,
    torch.clip,
    torch.Tensor.clamp,
    torch.Tensor.clamp_,
    torch.Tensor.clip,
    torch.Tensor.clip_,
)
def _activation(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not on_linear_path(x):
        return func(x, *args, **kwargs)
    kwargs.pop("inplace", None)
    point = _detached(x)
    point = torch.where(point == 0, torch.finfo(point.dtype).eps, point)  # any slope serves at 0; take the tangent's
    if _is_zero_at_zero(func, args, kwargs):
        return x * (func(point.clone(), *args, **kwargs) / point)
    at_zero = func(torch.zeros_like(point), *args, **kwargs)
    return x * ((func(point.clone(), *args, **kwargs) - at_zero) / point) + constant(at_zero)


def _is_zero_at_zero(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Told from the arguments alone: a look at values would end `torch.export`'s trace."""
    if func is F.softplus:
        return False
    if "clamp" not in func.__name__ and "clip" not in func.__name__ and func is not F.hardtanh:
        return True
    low, high = (
        args[i] if len(args) > i else kwargs.get(name, kwargs.get(f"{name}_val"))
        for i, name in enumerate(("min", "max"))
    )
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    return (low is None or low <= 0) and (high is None or high >= 0)


@declare(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.square, torch.Tensor.square)
def _power(func: Callable[..., Any], x: Any, exponent: Any = 2) -> Any:
    """xᵖ = x · xᵖ⁻¹ for a fixed p of at least 1; all other powers are statistics."""
    if not on_linear_path(x) or isinstance(exponent, Tensor) or exponent < 1:
        return torch.pow(_detached(x), _detached(exponent))
    return x * _detached(x).pow(exponent - 1)


@declare(functional.max_out)
def _max_out(func: Any, x: Tensor, units: int, dim: int) -> Tensor:
    """Linear already: the winner is passed on. This form also carries forward-mode derivatives."""
    return x.unflatten(dim, (-1, units)).max(dim + 1 if dim >= 0 else dim).values


@declare(functional.scale_by_cosine)
def _scale_by_cosine(func: Callable[..., Any], linear: Tensor, norm: Tensor, b: float, gamma: float) -> Tensor:
    return linear * functional.cosine_factor(_detached(linear), _detached(norm), b, gamma).to(linear.dtype)


@declare(functional.scale_and_offset)
def _scale_and_offset(func: Callable[..., Any], image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Where the stem reads the very images that `explain` differentiates by, they bring a factor for the offset.

    Its derivative comes with the backward pass, whereas a forward-mode derivative is carried through the whole network.
    """
    factor = getattr(image, "offset_factor", None)
    return image * scale + (constant(offset) if factor is None else offset * factor)


# Norms: statistics are constants; subtracting the mean of x's own features is linear.


@declare(F.batch_norm)
def _batch_norm(
    func: Any,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or not on_linear_path(x):
        return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * scale.reshape(shape).to(x.dtype) + constant(shift.reshape(shape).to(x.dtype))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + constant(bias)


@declare(F.layer_norm)
def _layer_norm(
    func: Any,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not on_linear_path(x):
        return func(x, normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    variance = _detached(x).var(dims, correction=0, keepdim=True)
    return _affine((x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt(), weight, bias)


@declare(F.group_norm)
def _group_norm(
    func: Any, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if not on_linear_path(x):
        return func(x, num_groups, weight, bias, eps)
    shape = (-1,) + (1,) * (x.ndim - 2)
    grouped = x.unflatten(1, (num_groups, -1)).flatten(2)
    normed = _layer_norm(F.layer_norm, grouped, grouped.shape[-1:], None, None, eps).reshape(x.shape)
    return _affine(
        normed, None if weight is None else weight.reshape(shape), None if bias is None else bias.reshape(shape)
    )


@declare(F.rms_norm)
def _rms_norm(
    func: Any, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not on_linear_path(x):
        return func(x, normalized_shape, weight, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * (_detached(x).square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


# Linear maps with a bias.


def _with_bias(
    func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, rest: Any, kw: Any, shape: Any
) -> Tensor:
    if bias is None or not on_linear_path(x):
        return func(x, weight, bias, *rest, **kw)
    return func(x, weight, None, *rest, **kw) + constant(bias.reshape(shape))


@declare(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
def _convolution(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **kw: Any) -> Tensor:
    return _with_bias(func, input, weight, bias, rest, kw, (-1,) + (1,) * (weight.ndim - 2))


@declare(F.linear)
def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _with_bias(func, input, weight, bias, (), {}, (-1,))


@declare(F.scaled_dot_product_attention)
def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention weights, recovered as the output for an identity matrix of values, are constants."""
    identity = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*key.shape[:-1], -1)
    weights = func(
        _detached(query),
        _detached(key),
        identity,
        _detached(attn_mask),
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return weights @ value


@declare(functional.to_logits)
def _to_logits(func: Any, y: Tensor, temperature: float, logit_bias: float) -> Tensor:
    if not on_linear_path(y):
        return func(y, temperature, logit_bias)
    y = y / temperature
    return y + constant(torch.full((), logit_bias, dtype=y.dtype, device=y.device))


# Sums with a constant, and products of two factors that both depend on the image.


def _addend(value: Any, like: Tensor) -> Any:
    """An operand of a sum with the linear path: marked as a constant unless it is on the path itself."""
    if on_linear_path(value):
        return value
    if not isinstance(value, Tensor):
        return constant(torch.full((), value, dtype=like.dtype, device=like.device)) if value else value
    return constant(value)


@declare(
    torch.add,
    torch.sub,
    torch.Tensor.add,
    torch.Tensor.sub,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__sub__,
    torch.Tensor.__rsub__,
    torch.Tensor.__iadd__,
    torch.Tensor.__isub__,
    torch.Tensor.add_,
    torch.Tensor.sub_,
    torch.rsub,
)
def _sum(func: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    if on_linear_path(a):
        return func(a, _addend(b, a), **kwargs)
    if on_linear_path(b):  # a constant cannot be changed in place into what depends on the image
        return _OUT_OF_PLACE.get(func, func)(_addend(a, b), b, **kwargs)
    return func(a, b, **kwargs)


_OUT_OF_PLACE: dict[Any, Any] = {
    torch.Tensor.__iadd__: torch.add,
    torch.Tensor.add_: torch.add,
    torch.Tensor.__isub__: torch.sub,
    torch.Tensor.sub_: torch.sub,
    torch.Tensor.__imul__: torch.mul,
    torch.Tensor.mul_: torch.mul,
}


@declare(torch.addcmul, torch.Tensor.addcmul)
def _addcmul(func: Any, input: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return _sum(torch.add, input, _product(torch.mul, a, b) * value)


@declare(torch.where)
def _where(func: Any, condition: Tensor, *branches: Any) -> Any:
    on_path = next((b for b in branches if on_linear_path(b)), None)
    return func(condition, *branches if on_path is None else (_addend(b, on_path) for b in branches))


@declare(torch.maximum, torch.minimum, torch.Tensor.maximum, torch.Tensor.minimum)
def _extremum(func: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    """Which of the two it is, is a constant of the linear map."""
    return _where(torch.where, func(_detached(a), _detached(b)) == _detached(a), a, b)


@declare(F.pad)
def _pad(func: Any, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    if not on_linear_path(x) or not value or not math.isfinite(value):
        return func(x, pad, mode, value)
    return func(x, pad, mode, 0.0) + constant(func(torch.zeros_like(_detached(x)), pad, mode, value))


@declare(torch.cat, torch.concat, torch.stack)
def _join(func: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    if any(on_linear_path(t) for t in tensors):
        tensors = [_addend(t, t) for t in tensors]
    return func(tensors, *args, **kwargs)


@declare(
    torch.mul,
    torch.Tensor.mul,
    torch.Tensor.__mul__,
    torch.Tensor.__rmul__,
    torch.Tensor.__imul__,
    torch.Tensor.mul_,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
)
def _product(func: Callable[..., Any], a: Any, b: Any) -> Any:
    """Two factors on the linear path share the product, half each; with one there is nothing to decide."""
    if not (on_linear_path(a) and on_linear_path(b)):
        return func(a, b)
    func = _OUT_OF_PLACE.get(func, func)
    return 0.5 * func(a, _detached(b)) + 0.5 * func(_detached(a), b)


@declare(torch.einsum)
def _einsum(func: Any, equation: str, *operands: Any) -> Tensor:
    """Factors on the linear path share the product equally."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    on_path = [i for i, x in enumerate(operands) if on_linear_path(x)]
    if len(on_path) < 2:
        return func(equation, *operands)
    parts = [func(equation, *(x if i == own else _detached(x) for i, x in enumerate(operands))) for own in on_path]
    return torch.stack(parts).mean(0)


@declare(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide, torch.Tensor.true_divide)
def _quotient(func: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    return func(a, _detached(b), **kwargs)


@declare(torch.Tensor.div_, torch.Tensor.__itruediv__)
def _quotient_in_place(func: Callable[..., Any], a: Tensor, b: Any, **kwargs: Any) -> Tensor:
    return torch.div(a, _detached(b), **kwargs)
