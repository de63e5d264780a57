"""Weights as B-cos layers use them: rows of unit norm, or of the norm that the response asks for.

Section 3.2.2 of https://arxiv.org/abs/2205.10268 (ŵ), section 3 of https://arxiv.org/abs/2411.00715 (free rows).
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["effective_weight", "inverse_norm", "norm_power", "row_norm", "unit_weight"]


def norm_power(b: float, normalize_weight: bool) -> float:
    """By which power of its norm a layer divides each row of its weight.

    1 gives unit rows. Free rows keep ‖w‖ at B = 1 and √‖w‖ at B = 2, because the response squares it; for any other B
    their norm multiplies the response instead.
    """
    if normalize_weight or b not in (1.0, 2.0):
        return 1.0
    return 0.0 if b == 1.0 else 0.5


def effective_weight(weight: Tensor, b: float, normalize_weight: bool) -> Tensor:
    """What a layer multiplies x by: `unit_weight` to the power that `norm_power` gives."""
    power = norm_power(b, normalize_weight)
    return weight if power == 0.0 else unit_weight(weight, power)


def unit_weight(weight: Tensor, power: float = 1.0) -> Tensor:
    """Divide each output row of a weight by its Euclidean norm to the given power; 1 gives ŵ.

    Args:
        weight: (O, ...), one row per output unit.
        power: 1 for unit norm; 1/2 leaves rows of norm √‖w‖, whose B = 2 unit has the amplitude of w itself.

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
    """(O, 1, ...) 1 / norm of each row to a power; 1 for a row of zeros, which stays one."""
    norm = row_norm(weight)
    norm = norm + (norm == 0).to(norm.dtype)
    # by roots: compiled, a power is computed again for every element of the row
    inverse = norm.rsqrt() if power == 0.5 else norm.reciprocal() if power == 1.0 else norm.pow(-power)
    return inverse.reshape([-1] + [1] * (weight.ndim - 1))
