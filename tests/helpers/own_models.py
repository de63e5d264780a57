"""Networks that no library knows."""

from typing import Any

import torch
from torch import Tensor, nn

from timm_bcos import BcosConfig

COLORS: dict[str, Any] = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
PRESERVE = BcosConfig.finetune(b=1, bias=True, **COLORS)


class Two(nn.Module):
    """Two convolutions read the image."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 5, padding=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.left(x), self.right(x)], 1).relu().mean((2, 3)))


def small(channels: int = 3) -> nn.Sequential:
    """One convolution and a classifier."""
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(8, 5))
