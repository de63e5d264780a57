"""Hand-written backward passes for training: the gradients that autograd derives, in less time and memory.

For the backward pass a B-cos layer saves its input x, its weight, its response y and the norm n of x or of its patches.
At B = 2 the linear response a follows from y, since |a| = sqrt(|y| · n / γ), and the norm layer behind it saves y
anyway. Effective weights are computed again. Second derivatives and batched gradients are those of the formulas
(`functional`), which are computed again, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import functional, primitives
from .execution import pieces, runs_eagerly, saved_tensors_have_hooks
from .primitives import (
    EPS,
    by_window_sum,
    cosine_factor,
    effective_weight,
    feature_norm,
    has_amplitude,
    inverse_norm,
    norm_power,
    patch_norm,
    per_unit,
    row_norm,
    scale_by_cosine,
    sum_of_groups,
)

__all__ = ["Convolution", "LinearMap", "Unit", "bcos_response", "divide_by_deviation"]


class Unit(NamedTuple):
    """The settings of a layer's units, as in `functional.bcos_linear`."""

    b: float
    gamma: float
    max_out: int
    normalize_weight: bool


@dataclass(frozen=True)
class Convolution:
    """The linear transform of `functional.bcos_conv2d`, with the norms of its patches."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    eps: float
    axis: ClassVar[int] = 1  # of the units

    def formula(self, x: Tensor, weight: Tensor, unit: Unit) -> Tensor:
        """The response by torch's own functions."""
        return functional.bcos_conv2d(x, weight, **vars(self), **unit._asdict())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The transform itself, for an effective weight."""
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, G, H', W') of the patches."""
        return patch_norm(x, list(weight.shape[2:]), **vars(self))

    def sum_of_units(self, values: Tensor) -> Tensor:
        """Sum over the units that share a norm."""
        return sum_of_groups(values, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, is_wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients by x and by the effective weight, those that are wanted."""
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None,
            self.stride, self.padding, self.dilation, False, [0, 0], self.groups, [*is_wanted, False],
        )  # fmt: skip
        return by_x, by_weight

    def spread_to_input(self, values: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The sum of the values (N, G, H', W') of all windows that contain an element of x, for each element."""
        size, kernel = [len(x), self.groups, *x.shape[2:]], list(weight.shape[2:])
        sums = by_window_sum(values, size, kernel, self.stride, self.padding, self.dilation)
        return per_unit(sums, x, self.groups)


@dataclass(frozen=True)
class LinearMap:
    """The linear transform of `functional.bcos_linear`, with the norms of its vectors; see `Convolution`."""

    axis: ClassVar[int] = -1
    groups: ClassVar[int] = 1

    def formula(self, x: Tensor, weight: Tensor, unit: Unit) -> Tensor:
        return functional.bcos_linear(x, weight, **unit._asdict())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return feature_norm(x)

    def sum_of_units(self, values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, is_wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        by_x = grad @ weight if is_wanted[0] else None
        by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if is_wanted[1] else None
        return by_x, by_weight

    def spread_to_input(self, values: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return values


Transform = Convolution | LinearMap


def bcos_response(x: Tensor, weight: Tensor, transform: Transform, unit: Unit) -> Tensor:
    """`transform.formula`, for any B but 1, with a backward pass by hand."""
    if transform.axis == 1 and x.ndim == 3:  # a single image
        return bcos_response(x[None], weight, transform, unit)[0]
    if not has_amplitude(unit.b, unit.normalize_weight):
        return _BcosResponse.apply(_as_autocast(x), weight, transform, unit)
    y: Tensor = _BcosResponse.apply(_as_autocast(x), weight, transform, unit._replace(normalize_weight=True))
    amplitude = row_norm(weight).to(y.dtype)
    return y * (amplitude.reshape(-1, 1, 1) if transform.axis == 1 else amplitude)


def divide_by_deviation(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`primitives.divide_by_deviation`."""
    return _DivideByDeviation.apply(x, weight, eps)


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives the inputs of torch's own layers."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on "meta"
    return x.to(torch.get_autocast_dtype(kind)) if is_on and x.dtype != torch.float64 else x


class _Saved(FunctionCtx):
    """What the forward pass saves for the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    transform: Transform
    unit: Unit
    eps: float
    response: "_Response | None"


class _Response(NamedTuple):
    """A response that is saved although others may change it in place: its memory, and its version when saved."""

    alias: Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether it has not been changed in place since, as `x += shortcut` does."""
        return self.alias._version == self.version


class _BcosResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, weight: Tensor, transform: Transform, unit: Unit) -> Tensor:
        norm = transform.norm(x, weight)
        y, ctx.response, kept = _respond(transform.linear(x, _used(weight, unit, x.dtype)), norm, unit, transform)
        ctx.save_for_backward(x, weight, norm, *kept)
        ctx.transform, ctx.unit = transform, unit
        return y

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, *kept = ctx.saved_tensors
        transform, unit = ctx.transform, ctx.unit
        if torch.is_grad_enabled() or not runs_eagerly(grad):
            return *_gradients_of(partial(transform.formula, unit=unit), (x, weight), grad, ctx), None, None
        used = _used(weight, unit, x.dtype)
        saved, is_response, winner = _kept(ctx, kept, lambda: transform.linear(x, used))
        by_linear, by_norm = _by_response(grad, norm, saved, is_response, winner, unit, transform)
        by_x, by_used = transform.backward(by_linear, x, used, ctx.needs_input_grad[:2])
        if by_x is not None:  # x has an effect on the norm, too: ∂n/∂x = x / n
            by_x.addcmul_(x, transform.spread_to_input(by_norm / norm, x, weight).to(x.dtype))
        return by_x, _by_weight(by_used, weight, unit), None, None


def _used(weight: Tensor, unit: Unit, dtype: torch.dtype) -> Tensor:
    return effective_weight(weight, unit.b, unit.normalize_weight).to(dtype)


def _by_weight(by_used: Tensor | None, weight: Tensor, unit: Unit) -> Tensor | None:
    """From the gradient g by w · n^-p to that by w: n^-p · (g - p · ŵ · ŵᵀg)."""
    if by_used is None:
        return None
    power, inverse = norm_power(unit.b, unit.normalize_weight), inverse_norm(weight, 1.0)
    along = (by_used * weight).sum(list(range(1, weight.ndim)), keepdim=True)
    by_weight = torch.addcmul(by_used.to(inverse.dtype), weight, -power * inverse.square() * along)
    return by_weight.mul_(inverse.pow(power)).to(weight.dtype)


def _respond(
    linear: Tensor, norm: Tensor, unit: Unit, transform: Transform
) -> tuple[Tensor, _Response | None, list[Tensor]]:
    """The response; the same if it is saved; and the tensors to save. May overwrite `linear`."""
    winner: list[Tensor] = []
    if unit.max_out > 1:
        linear, *winner = _max_out(linear, unit.max_out, transform.axis)
    keeps_response = _keeps_response(linear, unit)
    y = scale_by_cosine(linear, norm, unit.b, unit.gamma, keeps_response, transform.groups)
    if not keeps_response:
        return y, None, [linear, *winner]
    return y, _Response(y.detach(), y._version), winner


def _keeps_response(x: Tensor, unit: Unit) -> bool:
    """Whether the response is saved, from which |a| follows at B = 2.

    Not in float16, in which squares overflow, nor under hooks, which see saved tensors only.
    """
    return unit.b == 2 and x.dtype != torch.float16 and not saved_tensors_have_hooks()


def _kept(ctx: _Saved, kept: list[Tensor], respond: Callable[[], Tensor]) -> tuple[Tensor, bool, list[Tensor]]:
    """What the forward pass saved, whether it is the response or the linear response, and MaxOut's winners.

    If the response has been changed in place since, the linear response is computed again.
    """
    if ctx.response is None:
        return kept[0], False, kept[1:]
    if ctx.response.is_unchanged():
        return ctx.response.alias, True, kept
    linear = respond()
    return (_max_out(linear, ctx.unit.max_out, ctx.transform.axis)[0] if kept else linear), False, kept


def _by_response(
    grad: Tensor, norm: Tensor, saved: Tensor, is_response: bool, winner: list[Tensor], unit: Unit, transform: Transform
) -> tuple[Tensor, Tensor]:
    """The gradients by the linear responses (all those of MaxOut) and by the norm."""
    by_linear, by_norm = torch.empty_like(saved), torch.empty_like(norm)
    gradients = _of_square if is_response else _of_power
    for piece, n, g, out, out_norm in pieces(saved, norm, grad, by_linear, by_norm):
        products = gradients(piece, per_unit(n, piece, transform.groups), g, unit, out)
        out_norm.copy_(transform.sum_of_units(products)).div_(n).neg_()
    return (_to_winners(by_linear, winner[0], unit.max_out, transform.axis) if winner else by_linear), by_norm


def _of_square(y: Tensor, norm: Tensor, grad: Tensor, unit: Unit, out: Tensor) -> Tensor:
    """Write the gradient by a of y = γ · |a| · a / n to `out`; return y · grad, of which -∂/∂n · n is the sum.

    ∂y/∂a = 2γ · |a| / n = 2 · sqrt(γ · |y| / n), and ∂y/∂n = -y / n.
    """
    torch.abs(y, out=out).mul_(4 * abs(unit.gamma) / norm).sqrt_().mul_(grad if unit.gamma > 0 else -grad)
    return y * grad


def _of_power(linear: Tensor, norm: Tensor, grad: Tensor, unit: Unit, out: Tensor) -> Tensor:
    """`_of_square` for y = f · a with f = γ · (|a| / n + ε)^(B-1), from a instead of y; ε is 0 at B = 2."""
    factor = cosine_factor(linear, norm, unit.b, unit.gamma)
    slope = factor  # a · ∂f/∂a
    if unit.b != 2:
        cosine = linear.abs() / norm
        slope = factor * ((unit.b - 1) * cosine / (cosine + EPS))
    out.copy_((factor + slope) * grad)
    return linear * slope * grad


def _max_out(x: Tensor, units: int, dim: int) -> tuple[Tensor, Tensor]:
    """The largest of each M neighbors, and its index among them; of equal ones the first."""
    best, *others = _neighbors(x, units, dim)
    winner = torch.zeros_like(best, dtype=torch.uint8)
    for i, other in enumerate(others, start=1):
        winner.masked_fill_(other > best, i)
        best = torch.maximum(best, other)
    return best, winner


def _to_winners(grad: Tensor, winner: Tensor, units: int, dim: int) -> Tensor:
    """Spread the gradient by the largest of M neighbors to all of them: 0 for the others. Keeps the memory layout."""
    axis = dim % grad.ndim
    size = [*grad.shape[:axis], units * grad.shape[axis], *grad.shape[axis + 1 :]]
    is_last = grad.ndim == 4 and grad.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last and dim == 1 else torch.contiguous_format
    spread = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    for i, neighbor in enumerate(_neighbors(spread, units, dim)):
        neighbor.copy_(grad * (winner == i))
    return spread


def _neighbors(x: Tensor, units: int, dim: int) -> tuple[Tensor, ...]:
    """Views of the first, second, ... of each M neighbors along a dimension, 1 or -1."""
    return x.unflatten(dim, (-1, units)).unbind(dim + 1 if dim >= 0 else dim)


def _gradients_of(
    formula: Callable[..., Any], inputs: tuple[Tensor, ...], grad: Tensor, ctx: _Saved
) -> list[Tensor | None]:
    """The gradients by the inputs that need one, by autograd through the formula, which is computed again."""
    create_graph = torch.is_grad_enabled()
    is_wanted = ctx.needs_input_grad[: len(inputs)]
    wanted = [x for x, wants in zip(inputs, is_wanted, strict=True) if wants]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=create_graph))
    return [next(found) if wants else None for wants in is_wanted]


class _DivideByDeviation(torch.autograd.Function):
    """Uses d var / d x = 2 (x - mean) / n and d (1 / sqrt(var + ε)) / d var = -1/2 (var + ε)^(-3/2)."""

    @staticmethod
    def forward(ctx: _Saved, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean, var = _mean_and_variance(x)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(var)
        return x * _channels(weight * inverse, x), var

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_eagerly(grad):
            formula = lambda x, weight: primitives.divide_by_deviation(x, weight, ctx.eps)[0]  # noqa: E731
            return *_gradients_of(formula, (x, weight), grad, ctx), None
        dot = torch.stack([(part * g).sum((0, 2, 3), dtype=mean.dtype) for part, g in pieces(x, grad)]).sum(0)
        slope = dot * weight * inverse**3 / -(x.numel() // len(dot))
        by_grad, by_x, constant = (_channels(value, x) for value in (weight * inverse, slope, -slope * mean))
        result = torch.empty_like(x)
        for part, g, out in pieces(x, grad, result):
            torch.addcmul(constant, part, by_x, out=out).addcmul_(g, by_grad)
        return result, (dot * inverse).to(weight.dtype), None


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """`primitives.mean_and_variance`, computed image by image and then combined."""
    means, variances = [], []
    for (part,) in pieces(x):
        wide = part.float() if x.dtype in (torch.float16, torch.bfloat16) else part
        mean = wide.mean((2, 3), keepdim=True)
        from_mean = wide - mean
        means.append(mean.flatten(1))
        variances.append(from_mean.mul_(from_mean).mean((2, 3)))
    mean = torch.cat(means)
    return mean.mean(0), torch.cat(variances).mean(0).add_(mean.var(0, correction=0))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1).to(x.dtype)
