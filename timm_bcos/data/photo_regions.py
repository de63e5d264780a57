"""Regions of photos, brought to the images that a model sees."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TargetError
from ..explanation.photo import Photo

__all__ = ["regions_in_images"]

FORMS = "give a box (left, top, right, bottom) in pixels of the photo, a mask of its size, or one of these per photo"


def regions_in_images(region: Any, photos: Sequence[Photo], size: tuple[int, int]) -> Tensor:
    """Transform regions as the photos have been.

    Args:
        region: A box (left, top, right, bottom) in pixels of the photo, or a mask (height, width) of its size, for all
            N photos; or one for each, also as an array (N, 4) or (N, height, width). An array (N, 4) that is not
            boolean holds boxes.
        photos: The photos.
        size: Height and width of the model's images.

    Returns:
        (N, 4) boxes in pixels of the images; or (N, H, W) masks, whose pixels are means of the photo's mask.

    Raises:
        TargetError: If a region has another form, or lies outside of what the model sees.
    """
    regions = _for_each(region, len(photos))
    names = [photo.name or f"photos[{i}]" for i, photo in enumerate(photos)]
    if all(one.shape == (4,) for one in regions):
        return torch.stack([_box(*given, size) for given in zip(regions, photos, names, strict=True)])
    return torch.stack([_mask(*given, size) for given in zip(regions, photos, names, strict=True)])


def _for_each(region: Any, count: int) -> list[np.ndarray]:
    if isinstance(region, list | tuple) and any(np.ndim(_array(one)) for one in region):
        regions = [_array(one) for one in region]
    else:
        given = _array(region)
        is_one = given.ndim == 1 or (given.ndim == 2 and (given.shape != (count, 4) or given.dtype == bool))
        regions = [given] * count if is_one else list(given) if given.ndim > 1 else []
    if len(regions) != count:
        raise TargetError(f"region of {len(regions) or 'no'} photos, but there are {count}: {FORMS}")
    return regions


def _array(region: Any) -> np.ndarray:
    if isinstance(region, Tensor):
        region = region.detach().cpu()
        region = region.float() if region.is_floating_point() else region
    try:
        array = np.asarray(region.convert("L") if isinstance(region, Image.Image) else region)
    except ValueError:  # lists of different lengths
        array = np.asarray(region, dtype=object)
    if array.dtype.kind not in "biuf":
        raise TargetError(f"a region of {array.dtype} values: {FORMS}")
    return array


def _box(region: np.ndarray, photo: Photo, name: str, size: tuple[int, int]) -> Tensor:
    box = torch.tensor(region.tolist(), dtype=torch.float64)
    left, top, right, bottom = photo.box
    start = torch.tensor([left, top, left, top], dtype=torch.float64)
    scale = torch.tensor([size[1] / (right - left), size[0] / (bottom - top)] * 2, dtype=torch.float64)
    limits = torch.tensor([size[1], size[0]] * 2)
    moved = ((box - start) * scale).round(decimals=6)  # whole pixels stay whole
    inside = moved.clamp_min(0).minimum(limits)
    if not bool((inside[2:] > inside[:2]).all()):
        raise _outside(f"the region {tuple(region.tolist())} of {name}", photo)
    return inside


def _mask(region: np.ndarray, photo: Photo, name: str, size: tuple[int, int]) -> Tensor:
    width, height = photo.image.size
    if region.shape != (height, width):
        raise TargetError(f"region of shape {region.shape} for {name}, which has {width} × {height} pixels: {FORMS}")
    mask = photo.average(torch.tensor(region.astype(np.float64)), size)
    if bool((mask == 0).all()):
        raise _outside(f"the region of {name}", photo)
    return mask


def _outside(region: str, photo: Photo) -> TargetError:
    seen = ", ".join(f"{edge:.0f}" for edge in photo.box)
    return TargetError(
        f"{region} is empty, or outside of what the model sees: left, top, right and bottom of that are {seen}; "
        f"crop='none' shows the whole photo"
    )
