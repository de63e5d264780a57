"""The layers that read the image: they encode its colors and apply the normalization of pretrained models.

The official code (package `bcos`) encodes images in the data transforms (`AddInverse`).

Section 3.2.2 of https://arxiv.org/abs/2205.10268 (the encoding), section 3 of https://arxiv.org/abs/2411.00715
(normalized stems).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import encode_image, scale_and_offset
from .layers import BcosConv2d
from .module_utils import Factory, buffer_device

__all__ = ["BcosStem", "ImageReader", "image_channels"]


class BcosStem(BcosConv2d):
    """The convolution that reads the image: encodes it, optionally normalizes, then convolves.

    Args:
        image_channels: Number of channels of the image; the weight has twice as many input channels.
        mean: Channel means of a pretrained model's normalization; None for no normalization.
        std: Channel standard deviations, given together with `mean`.

    The encoding e is normalized as (e - [m, 1-m]) / [s, s] *before* any zero padding; with weights [w, -w] / 2 the
    layer then equals the original convolution of the normalized image, at the borders too.

    Shape: (N, image_channels, H, W) in [0, 1], or encoded (N, 2 · image_channels, H, W), to (N, out_channels, H', W').

    Raises:
        InputError: For settings that `BcosConv2d` refuses.
    """

    input_scale: Tensor
    input_offset: Tensor

    def __init__(
        self, image_channels: int, *args: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(2 * image_channels, *args, **kwargs)
        self.image_channels = image_channels
        self.normalize_input = mean is not None and std is not None
        self.statistics = _statistics(mean, std) if self.normalize_input else _statistics(None, None)
        for name in ("input_scale", "input_offset"):
            empty = self.weight.new_empty(2 * image_channels, 1, 1, device=buffer_device(self.weight))
            self.register_buffer(name, empty, persistent=False)
        self.init_non_persistent_buffers()

    @torch.jit.unused
    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that state dicts do not contain, after `to_empty`; called by timm."""
        mean = _per_channel(self.statistics["mean"] or (0.0,), self.image_channels)
        std = _per_channel(self.statistics["std"] or (1.0,), self.image_channels)
        scale = (1 / std).repeat(2)
        self.input_scale.copy_(scale.reshape(-1, 1, 1))
        self.input_offset.copy_((-torch.cat([mean, 1 - mean]) * scale).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        encoded = encode_image(x, self.image_channels)
        if self.normalize_input:
            encoded = scale_and_offset(encoded, self.input_scale, self.input_offset)
        return self.respond(encoded)


class ImageReader(nn.Module):
    """Reads the image for models that have no single first convolution, for example because they split its colors.

    It encodes the image as `BcosStem` does and returns the normalized image, (image - complement) / 2 with scale and
    offset, which is a linear map of the encoding.

    Args:
        image_channels: Number of channels of the image, C.
        mean: Channel means of the model's normalization; None for 0.5.
        std: Channel standard deviations; None for 1.

    Shape: (N, C, H, W) in [0, 1], or encoded (N, 2C, H, W), to (N, C, H, W).
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self, image_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_channels = image_channels
        self.statistics = _statistics(mean, std)
        for name in ("scale", "offset"):
            empty = torch.empty(image_channels, 1, 1, **Factory(device=device, dtype=dtype))
            self.register_buffer(name, empty, persistent=False)
        self.init_non_persistent_buffers()

    @torch.jit.unused
    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that state dicts do not contain, after `to_empty`; called by timm."""
        mean = _per_channel(self.statistics["mean"] or (0.5,), self.image_channels)
        std = _per_channel(self.statistics["std"] or (1.0,), self.image_channels)
        self.scale.copy_((1 / std).reshape(-1, 1, 1))
        self.offset.copy_(((0.5 - mean) / std).reshape(-1, 1, 1))

    @property
    def weight(self) -> Tensor:
        """A tensor of the reader's device and dtype, as other layers have one."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        image, complement = encode_image(x, self.image_channels).chunk(2, dim=1)
        return (image - complement) * (self.scale / 2) + self.offset


Statistics = dict[str, tuple[float, ...] | None]


def _statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> Statistics:
    """Numbers instead of tensors, which would lose their values on the meta device."""
    given = dict(mean=mean, std=std)
    return {name: None if values is None else tuple(map(float, values)) for name, values in given.items()}


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu").expand(channels)


def image_channels(model: nn.Module) -> int | None:
    """Number of channels of a model's images: that of its B-cos stem, or else its `in_chans`.

    Args:
        model: B-cos or plain model.

    Returns:
        The number without the complements of an encoded image; None for a plain model without `in_chans`.
    """
    for module in model.modules():
        if isinstance(module, BcosStem | ImageReader):
            return module.image_channels
    channels = getattr(model, "in_chans", None)
    return channels if isinstance(channels, int) else None
