"""What bounds the memory of attribution methods: few pixels in a pass."""

from torch import Tensor

__all__ = ["images_at_once"]

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
