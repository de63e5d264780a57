"""Products: with one factor on the linear path there is nothing to decide, several share the product equally."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Function, Mode, Operand, detached, named, on_linear_path, rule

__all__ = [
    "CONVOLUTIONS",
    "linear",
    "share",
]

CONVOLUTIONS = named("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")


@rule(*CONVOLUTIONS)
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


@rule(*named("convolution"))
def _any_convolution(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> Tensor:
    """torch's one function behind all convolutions, which exported programs call."""
    y = share(lambda x, w: func(x, w, None, *rest), [input, weight])
    if bias is None:
        return y
    shaped = bias.reshape((-1,) + (1,) * (weight.ndim - 2))
    return mode.add(y + shaped, shaped, func, bias)


@rule(*named("linear"))
def linear(mode: Mode, func: Function, /, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    if on_linear_path(weight) or on_linear_path(bias):
        y = share(lambda x, w: func(x, w), [input, weight])
        return y if bias is None else mode.add(y + bias, bias, func)
    y = func(input, weight, bias)
    return y if bias is None else mode.add(y, bias, func)


PRODUCTS = """
    mul __mul__ __rmul__ multiply matmul __matmul__ __rmatmul__ mm bmm mv dot vdot inner outer ger kron tensordot
    chain_matmul multi_dot vecdot cross
"""
IN_PLACE = {
    **dict.fromkeys(named("mul_ __imul__ multiply_"), torch.mul),
    **dict.fromkeys(named("__imatmul__"), torch.matmul),
}


def share(func: Function, operands: Sequence[object], **kwargs: object) -> Tensor:
    """A multilinear function of its operands: factors on the linear path take equal parts of the result."""
    on_path = [i for i, x in enumerate(operands) if on_linear_path(x)]
    if len(on_path) < 2:
        return func(*operands, **kwargs)
    parts = [func(*(x if i == own else detached(x) for i, x in enumerate(operands)), **kwargs) for own in on_path]
    return sum(parts[1:], parts[0]) / len(parts)


ORDER = [
    "input",
    "self",
    "tensor1",
    "mat1",
    "batch1",
    "vec1",
    "x",
    "other",
    "tensor2",
    "mat",
    "mat2",
    "batch2",
    "vec",
    "vec2",
]


def _in_order(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors that were given by name, in the order in which torch's signatures have them."""
    return dict(sorted(factors.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))


@rule(*named(PRODUCTS))
def _product(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> Tensor:
    operands = _in_order({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})
    rest = {name: value for name, value in kwargs.items() if name not in operands}
    if len(args) == 1 and isinstance(args[0], list | tuple):  # multi_dot
        return share(lambda *factors: func(list(factors)), list(args[0]), **rest)
    return share(func, [*args, *operands.values()], **rest)


@rule(*IN_PLACE)
def _product_in_place(mode: Mode, func: Function, /, input: Tensor, other: Operand) -> Tensor:
    if not (on_linear_path(input) and on_linear_path(other)):
        return func(input, other)
    return input.copy_(share(IN_PLACE[func], [input.clone(), other]))


@rule(*named("einsum"))
def _einsum(mode: Mode, func: Function, /, equation: str, *operands: object) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    return share(lambda *factors: func(equation, *factors), operands)


@rule(torch.sparse.mm, *named("smm hspmm"))
def _sparse_product(mode: Mode, func: Function, /, *args: Tensor) -> Tensor:
    return share(torch.sparse.mm, args)


@rule(*named("bilinear"))
def _bilinear(
    mode: Mode, func: Function, /, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    y = share(func, [input1, input2, weight])
    return y if bias is None else mode.add(y + bias, bias, func)


@rule(torch.sparse.addmm, *named("addcmul addmm addbmm baddbmm addmv addr"))
def _sum_and_product(
    mode: Mode, func: Function, /, input: Tensor, *factors: Tensor, value: float = 1, beta: float = 1,
    alpha: float = 1, **named_factors: Tensor,
) -> Tensor:  # fmt: skip
    operands = [*factors, *_in_order(named_factors).values()]
    product = share(_product_of(func), operands) * (value * alpha)
    return _sum(mode, func, input if beta else None, beta, product, [*operands, value, alpha])


def _sum(
    mode: Mode, func: Function, input: Tensor | None, beta: float, term: Tensor, sources: Sequence[Operand]
) -> Tensor:
    """beta · input + term; as in torch, an input times 0 does not count, be it infinite."""
    if input is None:
        return term
    scaled = input if beta == 1 else input * beta
    y = scaled + term
    for part, made_of in ((scaled, (input, beta)), (term, sources)):
        if not on_linear_path(part):
            y = mode.add(y, part, func, *made_of)
    return y


def _product_of(func: Function) -> Callable[..., Tensor]:
    if func.__name__ == "addcmul":
        return torch.mul
    if func.__name__ == "addr":
        return torch.outer
    if func is torch.sparse.addmm:
        return torch.sparse.mm
    if func.__name__ == "addbmm":
        return lambda a, b: torch.bmm(a, b).sum(0)
    return torch.matmul


@rule(*named("div __truediv__ true_divide divide"))
def _quotient(mode: Mode, func: Function, /, input: Operand, other: Operand, **kwargs: object) -> Tensor:
    if not on_linear_path(input) or kwargs.get("rounding_mode"):
        return func(detached(input), detached(other), **kwargs)
    return func(input, detached(other), **kwargs)


@rule(*named("div_ __itruediv__ divide_ true_divide_"))
def _quotient_in_place(mode: Mode, func: Function, /, input: Tensor, other: Operand, **kwargs: object) -> Tensor:
    return func(input, detached(other), **kwargs)


@rule(*named("addcdiv"))
def _sum_and_quotient(
    mode: Mode, func: Function, /, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tensor:
    quotient = _quotient(mode, torch.div, tensor1, tensor2) * value
    return _sum(mode, func, input, 1, quotient, [tensor1, tensor2, value])


# Where the right-hand side of a system of equations stands, whose solution is linear in it.
RIGHT_HAND_SIDES = {
    **dict.fromkeys(named("solve solve_ex solve_triangular tensorsolve lstsq"), 1),
    **dict.fromkeys(named("cholesky_solve lu_solve triangular_solve"), 0),
    **dict.fromkeys([torch.linalg.lu_solve, torch.linalg.ldl_solve], 2),
}


@rule(*RIGHT_HAND_SIDES)
def _solve(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> Any:
    """A⁻¹ B, the matrix being a gate."""
    place = RIGHT_HAND_SIDES[func]
    operands = [x if i == place else detached(x) for i, x in enumerate(args)]
    return func(*operands, **{name: x if name in ("B", "input") else detached(x) for name, x in kwargs.items()})


@rule(*named("ldexp"))
def _scaled_by_power(mode: Mode, func: Function, /, input: Tensor, other: Tensor) -> Tensor:
    return func(input, detached(other))


@rule(*named("polar"))
def _polar(mode: Mode, func: Function, /, abs: Tensor, angle: Tensor) -> Tensor:
    """abs · exp(i · angle), the direction being a gate."""
    return abs * func(torch.ones_like(detached(abs)), detached(angle))


@rule(*named("renorm"))
def _renorm(mode: Mode, func: Function, /, input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Slices along a dimension, each times a statistic."""
    point = detached(input)
    scale = func(point, p, dim, maxnorm) / torch.where(point == 0, 1.0, point)
    others = [d for d in range(point.ndim) if d != dim % point.ndim]
    largest = point.abs().movedim(dim, 0).flatten(1).argmax(1, keepdim=True)  # where the quotient is surest
    factor = scale.movedim(dim, 0).flatten(1).gather(1, largest)[:, 0]
    return input * factor.reshape([-1 if d not in others else 1 for d in range(point.ndim)])


@rule(F.embedding)
def _embedding(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor, padding_idx: int | None = None,
    max_norm: float | None = None, *args: object, **kwargs: object,
) -> Tensor:  # fmt: skip
    """Rows of a table that may itself be on the path."""
    if max_norm is not None:
        raise NotImplementedError("embedding with max_norm changes its table in place")
    return func(detached(input), weight)


@rule(F.embedding_bag)
def _embedding_bag(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor, offsets: Tensor | None = None,
    max_norm: float | None = None, norm_type: float = 2, scale_grad_by_freq: bool = False,
    reduction: str = "mean", sparse: bool = False, per_sample_weights: Tensor | None = None, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Sums of rows of a table, each with a weight: a product of both."""
    reduction = kwargs.pop("mode", reduction)
    if max_norm is not None:
        raise NotImplementedError("embedding_bag with max_norm changes its table in place")
    fixed = (None, norm_type, scale_grad_by_freq, reduction, False)

    def bag(table: Tensor, weights: Tensor | None) -> Tensor:
        return func(detached(input), table, detached(offsets), *fixed, weights, *args, **kwargs)

    return share(bag, [weight, per_sample_weights])


@rule(*named("grid_sample affine_grid grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator"))
def _grid_sample(mode: Mode, func: Function, /, input: Tensor, grid: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Where to sample is a constant of the linear map."""
    return func(input, detached(grid), *args, **kwargs)
