"""Plain models for CIFAR-10 that timm lacks, with timm's interface; `bcos_models` converts them.

`Cnn9` is the CNN of https://arxiv.org/abs/2205.10268. `CifarResNet` are the residual networks of
https://arxiv.org/abs/1512.03385 (section 4.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from torch import Tensor, nn
from typing_extensions import Unpack

from .._compat import private
from ..errors import InputError
from ..nn.module_utils import Factory

__all__ = [
    "CifarResNet",
    "Cnn9",
    "PooledCnn",
]

checkpoint = private.checkpoint
checkpoint_seq = private.checkpoint_seq


class PooledCnn(nn.Module):
    """timm's interface for a CNN with global pooling and a linear classifier.

    Subclasses define `feature_info`, `num_features`, `forward_features`, `forward_head` and their stages.

    Attributes:
        classifier: Name of the linear layer.
    """

    classifier = "fc"
    num_features: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.global_pool: Any
        self.feature_info: list[dict[str, Any]]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        module: nn.Module = getattr(self, self.classifier)
        return module

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **dd: Unpack[Factory]) -> None:
        """A new classifier for `num_classes`, 0 for none; the pooling stays unless given."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, linear = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **(dd or get_device_dtype(self))
        )
        setattr(self, self.classifier, linear.train(self.training))
        self.global_pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the last feature map; `pre_logits` returns pooled features."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _stages(self) -> list[nn.Module]:
        """The layers up to the end of each resolution."""
        raise NotImplementedError

    def _keep_stages(self, count: int) -> None:
        """Drop the layers behind the first `count` stages."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps at the end of each resolution, as timm's models give them.

        Args:
            x: Images.
            indices: Indices of the maps; an integer n for the last n, None for all.
            norm: Unused; there is no final norm.
            stop_early: Whether to skip the layers behind the last map.
            output_fmt: Format of the maps; must be NCHW.
            intermediates_only: Whether to return the maps without the final features.

        Returns:
            (final features, maps), or the maps alone.

        Raises:
            InputError: For another format of the maps than NCHW.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt={output_fmt!r}: this model's maps are NCHW")
        stages = self._stages()
        take, last = private.feature_take_indices(len(stages), indices)
        maps = []
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = checkpoint(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last of the given maps, and the head."""
        take, last = private.feature_take_indices(len(self.feature_info), indices)
        pruned = last < len(self.feature_info) - 1
        if pruned:
            self._keep_stages(last + 1)
            self.num_features = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take


CHANNELS = (64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)
STAGE_ENDS = (1, 4, 7)  # the last convolution at each resolution


class Cnn9(PooledCnn):
    """Eight 3×3 convolutions, then global pooling and a linear classifier, which the conversion swaps.

    Args:
        num_classes: Number of classes, K; 0 for pooled features as the output.
        in_chans: Number of image channels.
        global_pool: timm's type of pooling.
        drop_rate: Dropout rate before the classifier.

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
            return checkpoint_seq(self.features, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 256, H, W) to logits (N, K), or to pooled features before the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


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
        num_classes: Number of classes, K; 0 for pooled features as the output.
        in_chans: Number of image channels.
        global_pool: timm's type of pooling.
        drop_rate: Dropout rate before the classifier.

    Shape: (N, in_chans, 32, 32) to (N, num_classes).

    Raises:
        InputError: For a depth that is not 6n + 2.
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
            raise InputError(f"depth={depth}: a CIFAR ResNet has 6n + 2 layers")
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


def _stage(inputs: int, outputs: int, stride: int, blocks: int, **dd: Unpack[Factory]) -> nn.Sequential:
    return nn.Sequential(
        Block(inputs, outputs, stride, **dd), *[Block(outputs, outputs, 1, **dd) for _ in range(blocks - 1)]
    )
