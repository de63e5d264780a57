"""How large feature maps are worked through: as a whole, or in parts of an image per thread.

On a CPU, memory that comes fresh from the system costs more than a step per part, whose temporaries stay in the cache
of the core that made them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["is_program", "pieces"]

LARGE = 1 << 21  # elements, above which a batch is taken in parts


def pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of images in parts that the cache can hold: (N, ...) as it is, or an image per thread at a time.

    Args:
        x: Feature maps; their size decides.
        others: Split in the same way.
    """
    if is_program(x):  # which is for batches of any size
        return iter([(x, *others)])
    size = torch.get_num_threads() if x.device.type == "cpu" and x.numel() > LARGE else len(x)
    return zip(*(tensor.split(size) for tensor in (x, *others)), strict=True)


def is_program(x: Tensor) -> bool:
    """Whether what is done with x is being written down, by torch.compile, torch.export or a tracer, not only done."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x.numel(), int)
