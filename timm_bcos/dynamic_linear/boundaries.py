"""Where a model reads its image: the gradient there is the row of W for the encoded image that was read.

What stands before (a shift, a crop, a mask, another order of the colors) maps the image x to P(x) = L x + p. The
encoding that is read is [P(x), 1 - P(x)]; with its gradient [g⁺, g⁻] the row of W for the encoding [x, 1 - x] is
[Lᵀg⁺, Lᵀg⁻]. What is left, (g⁺ - g⁻) · p + g⁻ · (1 - L 1), comes from constants, if L 1 does not depend on the image.
"""

from functools import cached_property

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..nn import functional
from .registry import Function, Mode, detached, rule

__all__ = [
    "Boundary",
]


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


@rule(functional.encode_image)
def _encode_image(mode: Mode, func: Function, /, image: Tensor, in_chans: int) -> Tensor:
    """The encoding of the image is a boundary; that of features, or without a bias tracker, a sum and a join."""
    if mode.tracker is None or not torch.is_grad_enabled():
        return _checked(mode, func(image, in_chans))
    encoded: Tensor = func(detached(image), in_chans)
    first, second = encoded.chunk(2, 1)
    if encoded.shape == image.shape and not torch.allclose(first + second, torch.ones_like(first), atol=1e-6):
        return image  # of twice the channels: no encoding, as far as values tell
    if mode.is_image(image) and mode.leaf is not None:
        boundary = Boundary(image[:, :in_chans], mode.leaf)
        mode.tracker.boundaries.append(boundary)
        return boundary.encoded.clone()
    if encoded.shape == image.shape:
        return image
    return torch.cat([image, mode.add(1 - image, 1.0, func)], 1)


def _checked(mode: Mode, encoded: Tensor) -> Tensor:
    """Refuse what is no encoding, where W(x) is trained.

    Raises:
        ModelStateError: If the model changes the encoded image before its stem reads it.
    """
    leaf = mode.leaf
    if leaf is not None and not (encoded.shape == leaf.shape and torch.equal(encoded, leaf)):
        first, second = detached(encoded).chunk(2, dim=1)
        if bool((first + second - 1).abs().max() > max(1e-3, 4 * torch.finfo(encoded.dtype).eps)):
            raise ModelStateError(
                "the model changes images before its stem reads them, as by normalizing or padding them: take that "
                "out of its forward, and convert it with BcosConfig(mean=..., std=...)"
            )
    return encoded
