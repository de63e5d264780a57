"""A photo, and the part of it that a model's image shows."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Box", "Photo"]

Box = tuple[float, float, float, float]
PALE = 0.35  # opacity of what the model does not see


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

    def coverage(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) share of each part of the model's image that shows the photo; the rest is padding."""
        left, top, right, bottom = self.box
        width, height = self.image.size
        return torch.outer(_inside(height, top, bottom, rows), _inside(width, left, right, columns))

    @property
    def padding(self) -> float:
        """Share of the model's image that is padding, in [0, 1]."""
        return 1 - self.coverage(1, 1).item()

    def enlarge(self, picture: "Image") -> "Image":
        """Bring a picture of the model's image to its place on the photo.

        Args:
            picture: RGBA picture that covers the model's image, at any size.

        Returns:
            RGBA picture of the photo's size, transparent outside the box.
        """
        from PIL import Image

        left, top, right, bottom = self._rectangle
        layer = Image.new("RGBA", self.image.size)
        if left < right and top < bottom:
            source = _scaled((left, top, right, bottom), self.box, picture.size)
            part = picture.resize((right - left, bottom - top), Image.Resampling.BOX, box=source)
            layer.paste(part, (left, top))
        return layer

    def gray(self) -> "Image":
        """The photo in gray as a background, light enough for blue to show, and pale outside the box."""
        light = self.image.convert("RGB").convert("L", (1 / 3, 1 / 3, 1 / 3, 0)).point(lambda v: 127.5 + v / 2)
        rectangle = self._rectangle
        found = light.point(lambda v: 255 - PALE * (255 - v))
        found.paste(light.crop(rectangle), rectangle[:2])
        return found

    @property
    def _rectangle(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the photo's pixels whose centers lie in the box."""
        width, height = self.image.size
        left, top, right, bottom = (math.ceil(edge - 0.5) for edge in self.box)
        left, top = min(max(left, 0), width), min(max(top, 0), height)
        return left, top, max(min(right, width), left), max(min(bottom, height), top)


def _shares(pixels: int, start: float, end: float, parts: int) -> Tensor:
    """(pixels, parts) share of each of `parts` equal intervals from `start` to `end` that lies within each pixel."""
    edges = torch.linspace(start, end, parts + 1, dtype=torch.float64)
    first = torch.arange(pixels, dtype=torch.float64)[:, None]
    overlap = torch.minimum(first + 1, edges[1:]) - torch.maximum(first, edges[:-1])
    return overlap.clamp_min(0) * parts / (end - start)


def _inside(pixels: int, start: float, end: float, parts: int) -> Tensor:
    """(parts,) share of each of `parts` equal intervals from `start` to `end` that lies within the pixels."""
    edges = torch.linspace(start, end, parts + 1, dtype=torch.float64)
    seen = edges.clamp(0, pixels).diff()
    return torch.where(seen == edges.diff(), 1.0, seen / edges.diff())


def _scaled(rectangle: Box, box: Box, size: tuple[int, int]) -> Box:
    """A rectangle of the photo in pixels of a picture of this size that covers the box, as far as it lies in it."""
    left, top, right, bottom = box
    width, height = size
    across = [min(max((x - left) / (right - left), 0), 1) * width for x in rectangle[::2]]
    down = [min(max((y - top) / (bottom - top), 0), 1) * height for y in rectangle[1::2]]
    return across[0], down[0], across[1], down[1]
