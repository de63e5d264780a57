"""The residual networks for CIFAR-10 of https://arxiv.org/abs/1512.03385 (section 4.2), which timm does not have.

Only the plain architecture stands here, with timm's model interface; `bcos_models` converts it like any other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .._compat import private
from ..nn.factory import Factory
from .pooled import PooledCnn

checkpoint_seq = private.checkpoint_seq

__all__ = ["CifarResNet"]

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3×3 convolutions; where the size changes, the shortcut subsamples and pads channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(outputs, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(outputs, **dd)
        self.act2 = nn.ReLU()
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.act2(y + shortcut)


class CifarResNet(PooledCnn):
    """6n + 2 layers in three stages of 16, 32 and 64 channels.

    Args:
        depth: 6n + 2: 20, 32, 44, 56 or 110 in the paper.
        num_classes: K; 0 returns pooled features.
        in_chans: Image channels.
        global_pool: timm's pooling type.
        drop_rate: Dropout before the classifier.

    Shape: (N, in_chans, 32, 32) to (N, num_classes).

    Raises:
        ValueError: For a depth that is not 6n + 2.
    """

    classifier = "linear"

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers")
        dd = Factory(device=device, dtype=dtype)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, 1, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0], **dd)
        self.act1 = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], 1, blocks, **dd)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], 2, blocks, **dd)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], 2, blocks, **dd)
        self.feature_info = [
            dict(num_chs=width, reduction=2**i, module=f"layer{i + 1}") for i, width in enumerate(WIDTHS)
        ]
        self.head_drop: nn.Module = nn.Dropout(drop_rate)
        self.linear: nn.Module
        self.reset_classifier(num_classes, global_pool, **dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates, by stage or by block."""
        return dict(stem=r"^conv1|bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    def _stages(self) -> list[nn.Module]:
        return [nn.Sequential(self.conv1, self.bn1, self.act1, self.layer1), self.layer2, self.layer3]

    def _keep_stages(self, count: int) -> None:
        for i in range(count, len(WIDTHS)):
            setattr(self, f"layer{i + 1}", nn.Identity())

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 64, H/4, W/4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out and classify features (N, 64, H, W)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stage(inputs: int, outputs: int, stride: int, blocks: int, **dd: Unpack[Factory]) -> nn.Sequential:
    return nn.Sequential(
        Block(inputs, outputs, stride, **dd), *[Block(outputs, outputs, 1, **dd) for _ in range(blocks - 1)]
    )
