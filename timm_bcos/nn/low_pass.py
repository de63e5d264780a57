"""The low-pass filter of anti-aliased downsampling.

Paper: Making Convolutional Networks Shift-Invariant Again, https://arxiv.org/abs/1904.11486.
"""

import torch
from torch import Tensor

from .._compat import timm_layers
from .functional import low_pass

__all__ = ["LowPass2d"]


class LowPass2d(timm_layers.BlurPool2d):  # type: ignore[misc]
    """timm's binomial filter [1, 2, 1] / 4 over height and width, for maps of any size.

    It removes the highest frequency, of period 2, and halves the one of period 4.

    Args:
        channels: Of the map; None takes them from the input.
        stride: Of the output: 1, or 2.

    Shape: (N, C, H, W) to (N, C, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    filt: Tensor

    def __init__(
        self,
        channels: int | None = None,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, filt_size=3, stride=stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return low_pass(x, self.filt, self.stride)
