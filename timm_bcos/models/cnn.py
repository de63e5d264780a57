"""The nine-layer network for CIFAR-10 of the first paper (appendix C.1.1 of https://arxiv.org/abs/2205.10268).

Only its plain architecture stands here, with timm's model interface; `bcos_models` converts it like any other.
"""

import torch
from torch import Tensor, nn

from .._compat import private
from ..nn.factory import Factory
from .pooled import PooledCnn


__all__ = ["Cnn9"]

CHANNELS = (64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)
STAGE_ENDS = (1, 4, 7)  # the last convolution at each resolution


class Cnn9(PooledCnn):
    """Eight 3×3 convolutions, then global pooling and a linear classifier, which the conversion swaps.

    Args:
        num_classes: K; 0 returns pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.

    Shape: (N, in_chans, 32, 32) to (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = Factory(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        inputs = (in_chans, *CHANNELS[:-1])
        self.features = nn.Sequential(
            *[
                nn.Conv2d(i, o, 3, stride, padding=1, bias=False, **dd)
                for i, o, stride in zip(inputs, CHANNELS, STRIDES, strict=True)
            ]
        )
        reductions = (1, 2, 4)
        self.feature_info = [
            dict(num_chs=CHANNELS[end], reduction=reduction, module=f"features.{end}")
            for end, reduction in zip(STAGE_ENDS, reductions, strict=True)
        ]
        self.num_features = CHANNELS[-1]
        self.head_drop: nn.Module = nn.Dropout(drop_rate)
        self.fc: nn.Module
        self.reset_classifier(num_classes, global_pool, **dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates, by convolution."""
        return dict(stem=r"^features\.0", blocks=r"^features\.(\d+)")

    def _stages(self) -> list[nn.Module]:
        starts = (0, *(end + 1 for end in STAGE_ENDS))
        return [self.features[start : end + 1] for start, end in zip(starts, STAGE_ENDS, strict=False)]

    def _keep_stages(self, count: int) -> None:
        self.features = self.features[: STAGE_ENDS[count - 1] + 1]

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 256, H/4, W/4)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return private.checkpoint_seq(self.features, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 256, H, W) to logits (N, K), or to pooled features before the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
