"""Explanations as pictures: weights in colour, contribution maps."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..files import AUTHOR, atomic_path

__all__ = ["map_to_rgba", "overlay", "save_image", "weights_to_rgba"]

EPS = 1e-12  # keeps 0 / 0 at 0


def weights_to_rgba(weights: Tensor, contribution_map: Tensor, smooth: int = 15, percentile: float = 99.5) -> Tensor:
    """Decode rows of W(x) into pictures (section 4.3 of https://arxiv.org/abs/2205.10268).

    Each pixel's weight vector, in the encoding [r, g, b, 1-r, 1-g, 1-b], is read as a colour; its opacity is the
    vector's norm where the pixel speaks for the target and 0 elsewhere, smoothed, 1 at the given percentile.

    Args:
        weights: (N, 2C, H, W), C being 3, or 1 for grey.
        contribution_map: (N, H, W).
        smooth: Odd side length of the box filter on the opacity, 0 for none.
        percentile: Of each picture's opacity that becomes 1, in [0, 100].

    Returns:
        (N, H, W, 4) in [0, 1].
    """
    channels = weights.shape[1] // 2
    if channels not in (1, 3):
        raise InputError(f"pictures need 1 or 3 image channels, these weights have {channels}")
    direction = (weights / (weights.abs().amax(1, keepdim=True) + EPS)).clamp_min(0)
    positive, negative = direction.split(channels, dim=1)
    colour = (positive / (positive + negative + EPS)).expand(-1, 3, -1, -1)
    opacity = weights.norm(dim=1, keepdim=True).masked_fill(contribution_map[:, None] < 0, 0)
    if smooth:
        opacity = F.avg_pool2d(opacity, smooth, stride=1, padding=(smooth - 1) // 2)
    full = opacity.double().flatten(1).quantile(percentile / 100, dim=1).to(opacity.dtype)
    opacity = (opacity / full.clamp_min(EPS)[:, None, None, None]).clamp(0, 1)
    return torch.cat([colour, opacity], 1).permute(0, 2, 3, 1)


def on_white(rgba: Tensor) -> Tensor:
    """(..., 4) pictures laid on white, (..., 3)."""
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def map_to_rgba(contribution_map: Tensor, percentile: float = 99.5) -> Tensor:
    """Contribution maps in diverging colours, red for and blue against, over a range symmetric about 0 (white).

    Args:
        contribution_map: (N, H, W), or a single (H, W).
        percentile: Of |contribution| at which colours saturate, per map.

    Returns:
        (N, H, W, 4) in [0, 1]; (H, W, 4) for a single map.
    """
    from matplotlib import colormaps

    if contribution_map.ndim == 2:
        return map_to_rgba(contribution_map[None], percentile)[0]

    full = contribution_map.abs().double().flatten(1).quantile(percentile / 100, dim=1).clamp_min(EPS)
    unit = (contribution_map.double() / full[:, None, None]).clamp(-1, 1) / 2 + 0.5
    return torch.from_numpy(colormaps["bwr"](unit.detach().cpu().numpy()))


def overlay(image: Tensor, contribution_map: Tensor, opacity: float = 0.9) -> Tensor:
    """Contribution maps over the images in grey; the colour is as strong as the contribution.

    Args:
        image: (N, C, H, W) in [0, 1].
        contribution_map: (N, H, W).
        opacity: Of the strongest contributions.

    Returns:
        (N, H, W, 3) in [0, 1].
    """
    colours = map_to_rgba(contribution_map)[..., :3]
    strength = (1 - colours.amin(-1, keepdim=True)) * opacity
    grey = 0.5 + image.detach().cpu().double().mean(1)[..., None] / 2  # light enough for blue to show
    return grey * (1 - strength) + colours * strength


def faded(image: Tensor, region: Tensor, opacity: float = 0.35) -> Tensor:
    """Images (N, C, H, W) in [0, 1] that are pale outside a region (N, rows, columns) of booleans."""
    inside = F.interpolate(region[:, None].to(image.dtype), image.shape[-2:], mode="nearest")
    return 1 - (1 - image) * (opacity + (1 - opacity) * inside)


def save_image(picture: Tensor, path: str | os.PathLike[str]) -> None:
    """Write one picture (H, W, 3 or 4) in [0, 1], whole or not at all; a PNG names this package as its maker."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    array = (picture.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    notes = PngInfo()
    notes.add_text("Software", AUTHOR)
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, pnginfo=notes)
