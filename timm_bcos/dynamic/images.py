"""The image that a model reads is the one that is explained."""

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..nn import functional
from .boundaries import Boundary
from .table import Function, Mode, detached, handles

__all__: list[str] = []


@handles(functional.encode_image)
def _encode_image(mode: Mode, func: Function, /, image: Tensor, in_chans: int) -> Tensor:
    """The encoding of the image is a boundary; that of features, or where nobody keeps account, a sum and a join."""
    if mode.account is None or not torch.is_grad_enabled():
        return _checked(mode, func(image, in_chans))
    encoded: Tensor = func(detached(image), in_chans)
    first, second = encoded.chunk(2, 1)
    if encoded.shape == image.shape and not torch.allclose(first + second, torch.ones_like(first), atol=1e-6):
        return image  # of twice the channels: no encoding, as far as values tell
    if mode.is_image(image) and mode.leaf is not None:
        boundary = Boundary(image[:, :in_chans], mode.leaf)
        mode.account.boundaries.append(boundary)
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
