"""Contributions at coarser scales: sums over square cells of pixels.

Contributions add up, so the sum over a cell is as exact as the contributions of its pixels. Where these alternate in
sign from pixel to pixel, the sum shows what they amount to.
"""

import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = ["cell_means", "cell_sums", "check_scale", "default_scale"]

CELLS = 11  # cells along the shorter side at the default scale, chosen by the measurement in docs/explaining.md


def default_scale(height: int, width: int) -> int:
    """Side of the cells that figures show by default, in pixels: 16 for images of 160 to 224 pixels, 4 for 32 pixels.

    A power of two, because strided layers of models reduce images by such factors.
    """
    return int(2 ** max(round(math.log2(min(height, width) / CELLS)), 0))


def check_scale(scale: object) -> int:
    """The side of a cell.

    Raises:
        InputError: If it is not an integer of at least 1.
    """
    if not isinstance(scale, Integral) or isinstance(scale, bool) or scale < 1:
        raise InputError(f"scale={scale!r}: give the side of a cell in pixels, a whole number from 1")
    return int(scale)


def cell_sums(maps: Tensor, scale: int) -> Tensor:
    """Sum maps over cells of scale × scale pixels, counted from the top left.

    Args:
        maps: (..., H, W).
        scale: Side of a cell in pixels. Cells at the right and bottom edge have fewer pixels if it does not divide the
            image.

    Returns:
        Sums (..., ⌈H / scale⌉, ⌈W / scale⌉) in float64. Their total is that of the map.

    Raises:
        InputError: For a scale that is not an integer of at least 1.
    """
    height, width = maps.shape[-2:]
    side = min(check_scale(scale), max(height, width, 1))
    padded = F.pad(maps.double(), (0, -width % side, 0, -height % side))
    return padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).sum((-3, -1))


def cell_means(maps: Tensor, scale: int, coverage: Tensor | None = None) -> Tensor:
    """Spread the sum of each cell evenly over its pixels: a coarser map of the same size and the same total.

    Args:
        maps: (..., H, W).
        scale: Side of a cell in pixels, as in `cell_sums`.
        coverage: (H, W) share of each pixel that counts, as `Photo.coverage` returns it. Only these parts are averaged,
            so the total of means · coverage is that of maps · coverage; of cells without any, all is averaged. None for
            all of every pixel.

    Returns:
        (..., H, W) in float64.
    """
    height, width = maps.shape[-2:]
    means = cell_sums(maps, scale) / cell_sums(torch.ones_like(maps), scale)
    if coverage is not None:
        shares = coverage.to(maps)
        areas = cell_sums(shares, scale)
        means = torch.where(areas > 0, cell_sums(maps * shares, scale) / areas, means)
    side = min(scale, max(height, width))
    return means.repeat_interleave(side, -2).repeat_interleave(side, -1)[..., :height, :width]
