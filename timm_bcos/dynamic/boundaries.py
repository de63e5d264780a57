"""Where a model reads its image: the gradient there is the row of W for the encoded image that was read.

What stands before (a shift, a crop, a mask, another order of the colors) maps the image x to P(x) = L x + p. The
encoding that is read is [P(x), 1 - P(x)]; with its gradient [g⁺, g⁻] the row of W for the encoding [x, 1 - x] is
[Lᵀg⁺, Lᵀg⁻]. What is left, (g⁺ - g⁻) · p + g⁻ · (1 - L 1), comes from constants, if L 1 does not depend on the image.
"""

from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Boundary"]


class Boundary:
    """One reading of the image.

    Args:
        read: (N, C, H', W') what is read, with the graph to the image.
        image: (N, C, H, W) the image, a leaf.

    Attributes:
        encoded: (N, 2C, H', W') the encoding, a leaf from which the model's graph starts.
    """

    def __init__(self, read: Tensor, image: Tensor) -> None:
        self.read, self.image = read, image
        encoded = torch.cat([read.detach(), 1 - read.detach()], 1)
        self.encoded = encoded.requires_grad_()

    @cached_property
    def is_direct(self) -> bool:
        """Whether the image is read as it is."""
        node = self.read.grad_fn
        while node is not None and type(node).__name__ == "CloneBackward0":
            node = node.next_functions[0][0]
        return type(node).__name__ == "AccumulateGrad" and self.read.shape == self.image.shape

    @cached_property
    def lost(self) -> Tensor:
        """1 - L 1, (N, C, H', W'): what a complement that is read has beside the image's complement.

        L 1 is the derivative of Lᵀv by v, along an image of ones.
        """
        v = torch.zeros_like(self.read).requires_grad_()
        (pulled,) = torch.autograd.grad(self.read, self.image, v, create_graph=True, allow_unused=True)
        if pulled is None or not pulled.requires_grad:
            return torch.ones_like(self.read)
        (ones,) = torch.autograd.grad(pulled, v, torch.ones_like(pulled), allow_unused=True, retain_graph=True)
        return torch.ones_like(v) if ones is None else 1 - ones.detach()

    def loses_as(self, other: "Boundary") -> bool:
        """Whether the complement's constant is the same as for another image."""
        if self.is_direct and other.is_direct:
            return True
        if not bool(other.lost.isfinite().all()):  # a black image divided by its deviation tells nothing
            return True
        return self.lost.shape == other.lost.shape and torch.allclose(
            self.lost, other.lost, rtol=0, atol=torch.finfo(self.lost.dtype).eps ** (2 / 3)
        )

    def pull_back(self, grad: Tensor, factors: list[Tensor]) -> list[Tensor | None]:
        """Gradients by the image and by other leaves of what was read."""
        return list(torch.autograd.grad(self.read, factors, grad, retain_graph=True, allow_unused=True))
