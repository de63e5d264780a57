"""Images cut into n × n cells."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = ["cell_masks", "cell_of_pixels", "cut_cells", "join_cells", "without_cell"]


def cell_of_pixels(side: int, n: int) -> Tensor:
    """(n, side), 1 where a pixel lies in a row or column of cells; where n divides no side, its centre counts."""
    return F.one_hot((2 * torch.arange(side) + 1) * n // (2 * side), n).T


def cell_masks(height: int, width: int, n: int) -> Tensor:
    """(n², height, width), 1 in one cell each, row by row."""
    rows, columns = cell_of_pixels(height, n), cell_of_pixels(width, n)
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(0, 1)


def without_cell(x: Tensor, cells: Tensor, n: int) -> Tensor:
    """Images that show their mean colour in one cell.

    Args:
        x: (N, C, H, W).
        cells: (N,) the cell of each, from 0 to n² - 1; -1 leaves an image whole.
        n: Cells per side.
    """
    masks = cell_masks(x.shape[2], x.shape[3], n).bool().to(x.device)
    hidden = masks[cells] & (cells >= 0)[:, None, None]
    return torch.where(hidden[:, None], x.mean((2, 3), keepdim=True), x)


def cut_cells(x: Tensor, n: int) -> Tensor:
    """(N, C, H, W) to (N · n², C, H / n, W / n), row by row.

    Raises:
        InputError: If n divides no side.
    """
    if x.shape[2] % n or x.shape[3] % n:
        raise InputError(f"{n} × {n} cells of {x.shape[2]} × {x.shape[3]} positions: {n} must divide both")
    cells = x.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (N, C, n, H / n, n, W / n)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def join_cells(cells: Tensor, n: int) -> Tensor:
    """What `cut_cells` has cut."""
    grid = cells.unflatten(0, (-1, n, n)).permute(0, 3, 1, 4, 2, 5)
    return grid.flatten(4, 5).flatten(2, 3)
