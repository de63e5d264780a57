"""Photos without labels, in batches that are the same in every run."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

__all__ = ["SOURCES", "Batches", "load_images"]


BACKGROUND = "lightgrey"  # of what is cut out


@dataclass(frozen=True)
class Source:
    """Images of a kind: their part of a batch, what share of an image a crop is, the shorter side kept."""

    part: int
    share: tuple[float, float]
    side: int


SOURCES = dict(
    photos=Source(18, (0.15, 1.0), 256), scenes=Source(6, (0.02, 0.6), 720), icons=Source(8, (0.6, 1.0), 32)
)  # fmt: skip


def load_images(roots: Sequence[str], side: int) -> list[Image.Image]:
    """All images of tars and folders, with a shorter side of at most `side` pixels; too small ones are left out."""
    found = []
    for root in roots:
        dataset: Any = timm.data.create_dataset("", root=root, input_img_mode="RGBA")
        for i in tqdm(range(len(dataset)), f"reading {Path(root).name}", disable=None):
            image = dataset[i][0]
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
            if min(image.size) < min(side, 64):
                continue
            ratio = min(1.0, side / min(image.size))
            found.append(image.resize([round(length * ratio) for length in image.size], Image.Resampling.LANCZOS))
    return found


class Batches:
    """Batches of crops without labels, each the same in every run.

    Args:
        images: By kind, the names of `SOURCES`.
        size: Of the crops, in pixels.
        batch_size: N, of all kinds that there are.
        seed: Of all draws.
    """

    def __init__(self, images: dict[str, list[Image.Image]], size: int, batch_size: int = 32, seed: int = 0) -> None:
        self.images = {kind: some for kind, some in images.items() if some}
        self.size, self.seed = size, seed
        whole = sum(SOURCES[kind].part for kind in self.images)
        self.counts = {kind: batch_size * SOURCES[kind].part // whole for kind in self.images}
        self.counts[next(iter(self.images))] += batch_size - sum(self.counts.values())

    def __getitem__(self, number: int) -> Tensor:
        """(N, 3, S, S) in [0, 1]."""
        draw = random.Random(f"{self.seed} {number}")
        crops = [
            self.crop(draw.choice(some), SOURCES[kind].share, draw)
            for kind, some in self.images.items() for _ in range(self.counts[kind])
        ]  # fmt: skip
        draw.shuffle(crops)
        return self.mixed(torch.stack(crops), draw).contiguous(memory_format=torch.channels_last)

    def crop(self, image: Image.Image, share: tuple[float, float], draw: random.Random) -> Tensor:
        """A crop, perhaps flipped, with other colors."""
        area, ratio = image.width * image.height * draw.uniform(*share), math.exp(draw.uniform(-0.29, 0.29))
        width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
        left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        small = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
        x = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        if draw.random() < 0.5:
            x = x.flip(2)
        if draw.random() < 0.15:
            x = x[torch.tensor(draw.sample(range(3), 3))]
        if draw.random() < 0.6:  # saturation, contrast, brightness
            gray = x.mean(0, keepdim=True)
            x = gray + (x - gray) * draw.uniform(0.4, 1.6)
            x = (x - x.mean()) * draw.uniform(0.7, 1.3) + x.mean() * draw.uniform(0.7, 1.3)
        return x.clamp(0, 1)

    def mixed(self, x: Tensor, draw: random.Random) -> Tensor:
        """Blended, pasted into each other, four in one, or as they are."""
        kind, size = draw.random(), self.size
        if kind < 0.25:
            return x.lerp(x.flip(0), 0.5 * draw.random())
        if kind < 0.5:
            width, height = (draw.randint(size // 3, size * 3 // 4) for _ in range(2))
            left, top = draw.randint(0, size - width), draw.randint(0, size - height)
            window = (..., slice(top, top + height), slice(left, left + width))
            pasted = x.clone()
            pasted[window] = x.flip(0)[window]
            return pasted
        if kind < 0.6:
            small = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
            first, second, third, fourth = (small.roll(shift, 0) for shift in range(4))
            return torch.cat([torch.cat([first, second], 3), torch.cat([third, fourth], 3)], 2)
        return x

    def prepared(self, first: int, end: int, workers: int = 1, pin: bool = False) -> DataLoader[Tensor]:
        """Batches `first` to `end`, made by other processes ahead of their use."""
        return DataLoader(_Numbered(self), None, sampler=range(first, end), num_workers=workers, pin_memory=pin)


class _Numbered(Dataset[Tensor]):
    """What torch's loader takes."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Tensor:
        return self.batches[number]
