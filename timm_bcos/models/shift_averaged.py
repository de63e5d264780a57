"""The mean of a model's logits over small shifts of the image, whose explanations are smoother and still exact.

Strided convolutions and pooling sample every second position only, which shows as checkerboards in W(x). Shifts are
linear maps T of the image, so that W(x) of the mean logit is the mean of W(T x) · T over the shifts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..nn.functional import encode_image
from ..nn.stems import BcosStem, ImageReader, image_channels

__all__ = ["ShiftAveraged"]


class ShiftAveraged(nn.Module):
    """The mean logits over shifts by 0, ..., size - 1 pixels in both directions; pixels at the border are repeated.

    `explain` explains this mean instead of the model's logit for the image itself. A forward pass takes size² passes of
    the model.

    Args:
        model: A B-cos model, (N, C, H, W) to (N, K).
        size: Number of shifts per direction, in pixels. 4 is the product of the first strides in most models.

    Raises:
        InputError: For a model without B-cos stem, or a size below 1.

    Examples:
        >>> smooth = ShiftAveraged(model, 4).eval()
        >>> timm_bcos.explain(smooth, x).save("smooth.png")
    """

    def __init__(self, model: nn.Module, size: int = 4) -> None:
        super().__init__()
        channels = image_channels(model)
        if channels is None or not any(isinstance(m, BcosStem | ImageReader) for m in model.modules()):
            raise InputError(f"{type(model).__name__} is no B-cos model: convert it with timm_bcos.bcosify(model)")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"size={size!r}: give the number of pixels to shift by, at least 1")
        self.model = model
        self.size = size
        self.in_chans = channels
        for name in ("num_classes", "pretrained_cfg", "bcos_config"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def get_classifier(self) -> Any:
        """The model's classifier, whose logit bias is that of the mean, too; None if the model has no such method."""
        tell = getattr(self.model, "get_classifier", None)
        return tell() if callable(tell) else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1], or encoded, to (N, K) mean logits."""
        encoded = encode_image(x, self.in_chans)
        height, width = encoded.shape[-2:]
        before = self.size // 2
        around = F.pad(encoded, (before, self.size - 1 - before) * 2, mode="replicate")
        offsets = [(row, column) for row in range(self.size) for column in range(self.size)]
        logits = [self.model(around[:, :, r : r + height, c : c + width]) for r, c in offsets]
        return torch.stack(logits).mean(0)
