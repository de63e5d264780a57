"""Superpixels: segments of an image that follow its edges, and the contributions of each.

Contributions add up, so the sum over a superpixel is as exact as the contributions of its pixels.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, MissingError

__all__ = ["Superpixels", "segment", "slic_segments", "superpixel_sums"]


class Superpixels(NamedTuple):
    """Segments of N images, and the contributions of each.

    Attributes:
        labels: (N, H, W) segment of each pixel, numbered from 0 in each image.
        sums: (N, S) contributions of the segments in float64; 0 for numbers that an image does not have.
    """

    labels: Tensor
    sums: Tensor

    @property
    def map(self) -> Tensor:
        """(N, H, W) the sum of the segment that each pixel belongs to, in float64."""
        return self.sums.gather(1, self.labels.flatten(1)).view_as(self.labels)


def superpixel_sums(images: Tensor, maps: Tensor, count: int) -> Superpixels:
    """Segment images and sum maps over the segments.

    Args:
        images: (N, C, H, W) in [0, 1].
        maps: (N, H, W).
        count: Approximate number of segments per image.

    Raises:
        InputError: For a count that is not an integer of at least 1, or no images.
        MissingError: If scikit-image is not installed.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise InputError(f"count={count!r}: give the number of superpixels per image, a whole number from 1")
    if len(images) == 0:
        raise InputError("no images to divide into superpixels")
    labels = torch.stack([slic_segments(image, int(count)) for image in images])
    sums = maps.new_zeros(len(maps), int(labels.max()) + 1, dtype=torch.float64)
    return Superpixels(labels, sums.scatter_add_(1, labels.flatten(1), maps.flatten(1).double()))


def slic_segments(image: Tensor, count: int) -> Tensor:
    """Segment an image by SLIC (https://doi.org/10.1109/TPAMI.2012.120).

    Args:
        image: (C, H, W) in [0, 1].
        count: Approximate number of segments.

    Returns:
        (H, W) segment of each pixel, numbered from 0.

    Raises:
        MissingError: If scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise MissingError("superpixels need scikit-image: pip install 'timm_bcos[attribution]'") from error
    return segment(slic, image, n_segments=count, start_label=0, channel_axis=-1)


def segment(method: Callable[..., Any], image: Tensor, **options: Any) -> Tensor:
    """Segment an image by a function of scikit-image. Images of one channel are segmented as color images.

    Args:
        method: Function of `skimage.segmentation`.
        image: (C, H, W) in [0, 1]. Three channels are colors, which are compared in CIELAB.
        options: Options of the function.

    Returns:
        (H, W) segment of each pixel, numbered from 0 without gaps.
    """
    image = image.expand(3, -1, -1) if len(image) == 1 else image
    pixels = image.detach().movedim(0, -1).double().cpu().numpy()
    segments = method(pixels, convert2lab=len(image) == 3, **options)
    return torch.from_numpy(segments).unique(return_inverse=True)[1].to(image.device)
