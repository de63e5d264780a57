"""The nine-layer network for CIFAR-10 of the first paper (appendix C.1.1 of https://arxiv.org/abs/2205.10268).

Only its plain architecture stands here, with timm's model interface; `bcos_models` converts it like any other.
"""

from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint, checkpoint_seq
from torch import Tensor, nn

__all__ = ["Cnn9"]

CHANNELS = (64, 64, 128, 128, 128, 256, 256, 256)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)
STAGE_ENDS = (1, 4, 7)  # the last convolution at each resolution


class Cnn9(nn.Module):
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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
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
        self.global_pool, self.head_drop, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates, by convolution."""
        return dict(stem=r"^features\.0", blocks=r"^features\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes`, 0 for none; the pooling stays unless given."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **get_device_dtype(self)
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps at the end of each resolution, as timm's models give them.

        Args:
            x: Images.
            indices: The last n if an int, all if None, else which.
            norm: Unused, there is no norm.
            stop_early: Stop after the last one wanted.
            output_fmt: Must be NCHW.
            intermediates_only: Leave out the final features.

        Returns:
            (final features, maps), or the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: this network's maps are NCHW")
        take, last = feature_take_indices(len(STAGE_ENDS), indices)
        ends = [STAGE_ENDS[i] for i in take]
        layers = self.features[: STAGE_ENDS[last] + 1] if stop_early else self.features
        maps = []
        for i, layer in enumerate(layers):
            x = checkpoint(layer, x) if self.grad_checkpointing and not torch.jit.is_scripting() else layer(x)
            if i in ends:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last map wanted, and the head."""
        take, last = feature_take_indices(len(STAGE_ENDS), indices)
        pruned = last < len(STAGE_ENDS) - 1
        self.features = self.features[: STAGE_ENDS[last] + 1]
        if pruned:
            self.num_features = CHANNELS[STAGE_ENDS[last]]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 256, H/4, W/4)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.features, x)
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, 256, H, W) to logits (N, K), or to pooled features before the classifier."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
