"""MaxOut: the largest response of neighbouring units (section 4 of arXiv 2205.10268)."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["max_out"]


def max_out(x: Tensor, units: int, dim: int) -> Tensor:
    """MaxOut: the largest response of each M neighbouring units (section 4 of arXiv 2205.10268).

    Args:
        x: Responses, unit m of output o at index o · M + m.
        units: M.
        dim: 1 for feature maps (N, O · M, H, W), -1 for feature vectors (..., O · M).

    Returns:
        The same with O instead of O · M.
    """
    if not torch.jit.is_scripting() and has_torch_function_unary(x):
        return handle_torch_function(max_out, (x,), x, units, dim)
    neighbours = x.unflatten(dim, [-1, units]).unbind(dim + 1 if dim >= 0 else dim)
    best = neighbours[0]
    for other in neighbours[1:]:  # faster than a maximum along an axis
        best = torch.maximum(best, other)
    return best
