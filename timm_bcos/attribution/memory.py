"""What bounds the memory of attribution methods: few pixels in a pass, and cosines that are not kept for backward."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..nn.cosine import scale_by_cosine

__all__ = ["RecomputedCosines", "images_at_once"]

# Pixels of a pass. With a graph: nine images of 224 × 224, or one 3×3 grid of such images.
WITH_GRAPH = 672 * 672
WITHOUT_GRAPH = 32 * 224 * 224


def images_at_once(x: Tensor, has_graph: bool = True) -> int:
    """How many images of the size of x (N, C, H, W) a pass takes, so that memory does not grow with their size.

    Args:
        x: Images.
        has_graph: Whether the pass is differentiated.
    """
    pixels = WITH_GRAPH if has_graph else WITHOUT_GRAPH
    return max(pixels // (x.shape[-2] * x.shape[-1]), 1)


class RecomputedCosines(TorchFunctionMode):
    """While active, the cosine factor of B-cos layers is computed again in the backward pass.

    Its intermediate results (powers, quotients) are cheap to compute and are more than half of what autograd keeps of a
    B-cos network whose B is not 2.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        given = kwargs or {}
        needs_graph = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if func is scale_by_cosine and needs_graph:
            run = partial(func, **given)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        return func(*args, **given)
