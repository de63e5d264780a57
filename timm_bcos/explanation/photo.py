"""A photo, and the part of it that a model's image shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Box", "Photo"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo, and the part of it that a model's image shows after resizing, cropping and padding.

    Attributes:
        image: The upright photo at its original size.
        box: (left, top, right, bottom) of the model's image, in pixels of the photo. A crop lies within the photo;
            padding reaches beyond it.
        name: Name of the photo, for instance its file name.
    """

    image: "Image"
    box: Box
    name: str = ""

    def spread(self, values: Tensor) -> Tensor:
        """Spread contributions of the model's image over the photo.

        Each value is distributed evenly over the area that it stands for, so sums over an area stay the same. Photo
        pixels outside the box get 0; values of padding lie outside the photo and are dropped.

        Args:
            values: (rows, columns) contributions that tile the model's image, for instance one per pixel.

        Returns:
            (height, width) contributions of the photo's pixels, in float64.
        """
        left, top, right, bottom = self.box
        width, height = self.image.size
        rows, columns = values.shape
        down = _shares(height, top, bottom, rows).to(values.device)
        across = _shares(width, left, right, columns).to(values.device)
        return down @ values.detach().double() @ across.T

    def average(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Average values of the photo's pixels over the pixels of the model's image, for instance a mask.

        Args:
            values: (height, width) values of the photo's pixels.
            size: Rows and columns of the model's image.

        Returns:
            (rows, columns) averages in float64. Padding counts as 0.
        """
        left, top, right, bottom = self.box
        height, width = values.shape
        down, across = _shares(height, top, bottom, size[0]), _shares(width, left, right, size[1])
        return down.T @ values.detach().cpu().double() @ across


def _shares(pixels: int, start: float, end: float, parts: int) -> Tensor:
    """(pixels, parts) share of each of `parts` equal intervals from `start` to `end` that lies within each pixel."""
    edges = torch.linspace(start, end, parts + 1, dtype=torch.float64)
    first = torch.arange(pixels, dtype=torch.float64)[:, None]
    overlap = torch.minimum(first + 1, edges[1:]) - torch.maximum(first, edges[:-1])
    return overlap.clamp_min(0) * parts / (end - start)
