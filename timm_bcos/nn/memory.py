"""How large feature maps are worked through: as a whole, or one image after the other.

On a CPU, memory that comes fresh from the system costs more than a step per image, whose temporaries stay in the
processor's cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["pieces"]

LARGE = 1 << 21  # elements, from which on images are taken one by one


def pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Batches of images in parts that the cache can hold: (N, ...) as it is, or N times (1, ...).

    Args:
        x: Feature maps; their size decides.
        others: Split in the same way.
    """
    size = 1 if _takes_images_singly(x) else len(x)
    return zip(*(tensor.split(size) for tensor in (x, *others)), strict=True)


def _takes_images_singly(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x.numel(), int):
        return False  # a program is for batches of any size
    return x.device.type == "cpu" and x.numel() > LARGE
