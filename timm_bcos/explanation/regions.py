"""Where in an output: at a position of its map, or over a region of the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TargetError

__all__ = ["Position", "PositionGrid", "Region", "check_region", "position_indices", "position_pairs", "region_weights"]

Position = int | tuple[int, int] | Sequence[Sequence[int]] | Tensor | None
Region = Tensor | Sequence[float] | Sequence[Sequence[float]] | None


@dataclass(frozen=True)
class PositionGrid:
    """The positions of an output.

    Attributes:
        rows: Number of rows; 1 for vectors and token sequences.
        columns: Number of columns; for token sequences, the number of tokens.
        prefix: Number of tokens before the patches (class and register tokens), which have no place in the image.
        patches: Rows and columns of the patches in a token sequence; None for a map, or if they do not form a grid.
    """

    rows: int
    columns: int
    prefix: int = 0
    patches: tuple[int, int] | None = None

    @classmethod
    def of_tokens(cls, count: int, prefix: int, size: tuple[int, int]) -> "PositionGrid":
        """Of a token sequence, whose patches cover an image of a size (height, width)."""
        patches = count - prefix
        rows = round((patches * size[0] / size[1]) ** 0.5) if patches > 0 else 0
        fits = rows > 0 and patches % rows == 0 and rows * size[1] == patches // rows * size[0]
        return cls(1, count, prefix, (rows, patches // rows) if fits else None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what lies in the image; (1, 1) where nothing does."""
        if self.rows > 1 or self.patches is None:
            return self.rows, self.columns if self.rows > 1 else 1
        return self.patches

    @property
    def hidden(self) -> int:
        """Positions before those of `shape`."""
        return 0 if self.rows > 1 else self.prefix


def position_indices(position: object, grid: PositionGrid, images: int) -> Tensor:
    """(N,) the numbers of positions, row by row.

    Args:
        position: (row, column) for all images, or an index of a token sequence; N pairs, as in `Explanation.position`.
        grid: The positions.
        images: N.

    Raises:
        TargetError: For positions that do not exist, or are none.
    """
    pairs = position_pairs(position, images)
    if pairs is None:
        return torch.full((images,), _position_index(position, grid))
    return torch.tensor([_position_index((row, column), grid) for row, column in pairs.tolist()])


def position_pairs(position: object, images: int) -> Tensor | None:
    """(N, 2) where one position is given for each of N images; None for anything else."""
    try:
        table = torch.as_tensor(position)
    except (TypeError, ValueError, RuntimeError):
        return None
    if table.is_floating_point() or table.dtype is torch.bool or table.shape != (images, 2):
        return None
    return table.detach().cpu()


def _position_index(position: object, grid: PositionGrid) -> int:
    if isinstance(position, Tensor) and position.ndim == 1:
        position = position.tolist()
    is_index = isinstance(position, Integral) and not isinstance(position, bool) and grid.rows == 1
    place: object = (0, position) if is_index else position
    if not isinstance(place, tuple | list) or len(place) != 2 or not all(isinstance(i, Integral) for i in place):
        raise TargetError(
            f"position={position!r}: give (row, column), or one pair for each image; for token sequences an index will "
            f"do"
        )
    row, column = map(int, place)
    if not (0 <= row < grid.rows and 0 <= column < grid.columns):
        raise TargetError(f"position={position!r}: the map has {grid.rows} rows and {grid.columns} columns")
    return row * grid.columns + column


def check_region(region: object, images: int, size: tuple[int, int]) -> Tensor | None:
    """(N, H, W) masks of what a user has given: a mask, or a box in pixels of the image.

    Args:
        region: (H, W) or (N, H, W), at the image's or the output's size; or (left, top, right, bottom), or N of them. A
            tensor (N, 4) holds boxes, unless it is boolean. Pixels that a box covers in part have that share as weight.
        images: N.
        size: Height and width of the images.

    Raises:
        TargetError: For anything else, and for regions that are empty.
    """
    if region is None:
        return None
    region = torch.as_tensor(region) if hasattr(region, "__array__") and not isinstance(region, Tensor) else region
    masks = _masks(region, images) if _is_mask(region, images) else _boxes(region, images, size)
    empty = (masks == 0).flatten(1).all(1).nonzero()
    if len(empty):
        raise TargetError(f"the region of image {int(empty[0])} is empty: nothing in it could be explained")
    return masks


def _is_mask(region: object, images: int) -> TypeGuard[Tensor]:
    if not isinstance(region, Tensor) or region.ndim < 2:
        return False
    return region.shape != (images, 4) or region.dtype is torch.bool


def _masks(region: Tensor, images: int) -> Tensor:
    if region.ndim not in (2, 3) or (region.ndim == 3 and len(region) != images):
        raise TargetError(f"a region of shape {tuple(region.shape)}: give a mask (H, W), or ({images}, H, W)")
    masks = region.detach().float()
    if not bool(masks.isfinite().all()) or bool((masks < 0).any()):
        raise TargetError("a region holds numbers that are negative or not finite: give weights of at least 0")
    return masks.expand(images, -1, -1)


def _boxes(region: object, images: int, size: tuple[int, int]) -> Tensor:
    try:
        boxes = torch.as_tensor(region).double().cpu()
    except (TypeError, ValueError, RuntimeError):
        boxes = torch.zeros(())
    if boxes.shape not in ((4,), (images, 4)):
        raise TargetError(
            f"region={region!r}: give a mask (H, W), or a box (left, top, right, bottom) in pixels of the image, or "
            f"one for each of the {images} images"
        )
    left, top, right, bottom = boxes.expand(images, 4).unbind(1)
    return (_overlap(top, bottom, size[0])[:, :, None] * _overlap(left, right, size[1])[:, None]).float()


def _overlap(start: Tensor, end: Tensor, pixels: int) -> Tensor:
    """(N, pixels) share of each pixel that lies between `start` and `end`."""
    first = torch.arange(pixels, dtype=torch.float64)
    overlap = torch.minimum(end[:, None], first + 1) - torch.maximum(start[:, None], first)
    return overlap.clamp_min(0)


def region_weights(masks: Tensor, grid: PositionGrid, size: tuple[int, int]) -> Tensor:
    """(N, P) weights of an output's positions, which sum to 1: the mean over a region.

    Args:
        masks: (N, H, W), at the image's size or the output's.
        grid: The P positions.
        size: Height and width of the images.

    Raises:
        TargetError: For masks of another size, or an output without a map.
    """
    shape = grid.shape
    if shape == (1, 1):
        raise TargetError("region: the output has no map of positions to take it from; leave it out")
    given = (masks.shape[1], masks.shape[2])
    if given not in (size, shape):
        raise TargetError(
            f"a region of {given[0]} × {given[1]}: the image has {size[0]} × {size[1]} pixels, the output {shape[0]} × "
            f"{shape[1]} positions; give a mask of one of these sizes"
        )
    weights = masks if given == shape else F.adaptive_avg_pool2d(masks, shape)
    weights = F.pad(weights.flatten(1), (grid.hidden, 0))
    return weights / weights.sum(1, keepdim=True)
