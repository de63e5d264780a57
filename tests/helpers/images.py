"""Images: the repository's photos, and smooth noise."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .scripts import SCRIPTS

PHOTOS = SCRIPTS / "photos"


def real_image(size: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Square crops of the repository's photos, (batch, 3, size, size) in [0, 1]."""
    crops = []
    for path in sorted(PHOTOS.glob("*.jpg"))[:batch]:
        image = Image.open(path).convert("RGB").resize((size, size))
        crops.append(torch.tensor(list(image.tobytes()), dtype=dtype).reshape(size, size, 3).permute(2, 0, 1) / 255)
    return torch.stack(crops)


def normalized(x: Tensor, cfg: dict) -> Tensor:
    """As timm's transform does it for a plain model."""
    mean, std = (torch.tensor(cfg[key], dtype=x.dtype)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def smooth_noise(batch: int, channels: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.interpolate(torch.rand(batch, channels, 8, 8, dtype=dtype), size, mode="bilinear")


def four_photos(size: int) -> Tensor:
    """Three photos and the first one mirrored, (4, 3, size, size)."""
    x = real_image(size, 3)
    return torch.cat([x, x[:1].flip(3)])
