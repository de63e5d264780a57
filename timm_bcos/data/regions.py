"""Object regions of a data set (masks or boxes), and cells of image grids."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..errors import InputError
from .datasets import LabeledImages
from .photos import photo_transform

__all__ = [
    "cell_masks",
    "cell_of_pixels",
    "cut_cells",
    "join_cells",
    "region_loader",
    "region_masks",
    "without_cell",
]


def cell_of_pixels(side: int, n: int) -> Tensor:
    """(n, side) matrix, 1 if the center of a pixel lies in a row or column of cells."""
    return F.one_hot((2 * torch.arange(side) + 1) * n // (2 * side), n).T


def cell_masks(height: int, width: int, n: int) -> Tensor:
    """(n², height, width) masks of the cells, row by row."""
    rows, columns = cell_of_pixels(height, n), cell_of_pixels(width, n)
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)


def without_cell(x: Tensor, cells: Tensor, n: int) -> Tensor:
    """Replace one cell of each image by the image's mean color.

    Args:
        x: Images (N, C, H, W).
        cells: Cell (N,) of each image, from 0 to n² - 1; -1 leaves the image unchanged.
        n: Number of cells per side.
    """
    masks = cell_masks(x.shape[2], x.shape[3], n).bool().to(x.device)
    hidden = masks[cells] & (cells >= 0)[:, None, None]
    return torch.where(hidden[:, None], x.mean((2, 3), keepdim=True), x)


def cut_cells(x: Tensor, n: int) -> Tensor:
    """Cut (N, C, H, W) into cells (N · n², C, H / n, W / n), row by row.

    Raises:
        InputError: If n does not divide both sides.
    """
    if x.shape[2] % n or x.shape[3] % n:
        raise InputError(f"{n} × {n} cells of {x.shape[2]} × {x.shape[3]} positions: {n} must divide both")
    cells = x.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (N, C, n, H / n, n, W / n)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join_cells(cells: Tensor, n: int) -> Tensor:
    """The inverse of `cut_cells`."""
    grid = cells.unflatten(0, (-1, n, n)).permute(0, 3, 1, 4, 2, 5)
    return grid.flatten(4, 5).flatten(2, 3)


COLUMNS = ("image", "left", "top", "right", "bottom")
Box = tuple[float, float, float, float]


def region_loader(model: nn.Module, dataset: LabeledImages, regions: Path) -> Callable[[int], Tensor]:
    """Return a function from an index of the data set to the mask (H, W) of its object, resized like the image.

    Args:
        model: Model that the images are resized for.
        dataset: Data set with timm's method `filename(index)`.
        regions: Directory of masks with the names and sizes of the images, white inside the object; or CSV file of
            boxes with the columns image, left, top, right, bottom in pixels, one or more boxes per image.

    Raises:
        InputError: If a file cannot be read. The function raises it for images without a region.
    """
    named: Any = dataset
    if not hasattr(named, "filename"):
        raise InputError("the data set has no file names, by which regions are found")
    mode, transform = photo_transform(model)
    draw = _drawn_boxes(regions) if regions.is_file() else _stored_masks(regions)

    def load(index: int) -> Tensor:
        name = Path(named.filename(index, basename=False, absolute=False)).as_posix()
        mask = transform(draw(name, dataset[index][0].size).convert(mode))[0].round()
        if not bool(mask.any()):
            raise InputError(f"the region of {name} in {regions} is empty once the photo is cropped for the model")
        return mask

    return load


def _stored_masks(folder: Path) -> Callable[[str, tuple[int, int]], Image.Image]:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give a folder of masks, or a CSV file of boxes")
    masks = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def draw(name: str, size: tuple[int, int]) -> Image.Image:
        path = masks.get(Path(name).with_suffix("").as_posix())
        if path is None:
            raise InputError(f"{folder} has no mask of {name}")
        try:
            mask = Image.open(path).convert("L")
        except (OSError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is not an image") from error
        if mask.size != size:
            raise InputError(f"{path} has {mask.size[0]} × {mask.size[1]} pixels, its photo {size[0]} × {size[1]}")
        return mask

    return draw


def _drawn_boxes(path: Path) -> Callable[[str, tuple[int, int]], Image.Image]:
    boxes = _read_boxes(path)

    def draw(name: str, size: tuple[int, int]) -> Image.Image:
        if name not in boxes:
            raise InputError(f"{path} has no box of {name}")
        mask = Image.new("L", size)
        for left, top, right, bottom in boxes[name]:
            ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
        return mask

    return draw


def _read_boxes(path: Path) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file") from error
    for number, row in enumerate(rows, start=2):
        found.setdefault(str(row.get("image")), []).append(_box(row, f"{path}, line {number}"))
    if not found:
        raise InputError(f"{path} has no boxes")
    return found


def _box(row: dict[str, str], place: str) -> Box:
    try:
        left, top, right, bottom = (float(row[column]) for column in COLUMNS[1:])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{place}: give the columns {', '.join(COLUMNS)}") from error
    if not (-math.inf < left < right < math.inf and -math.inf < top < bottom < math.inf):
        raise InputError(f"{place}: right must be greater than left, and bottom greater than top")
    return left, top, right, bottom


def region_masks(load: Callable[[int], Tensor], indices: Sequence[int]) -> Tensor:
    """(N, H, W) masks of several images."""
    return torch.stack([load(index) for index in indices])
