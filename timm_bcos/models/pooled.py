"""timm's model interface for networks that end in global pooling and one linear layer."""

from typing import Any

import torch
from timm.layers import create_classifier, get_device_dtype
from torch import Tensor, nn
from typing_extensions import Unpack

from .._compat import private
from ..nn.factory import Factory

checkpoint = private.checkpoint

__all__ = ["PooledCnn"]


class PooledCnn(nn.Module):
    """What timm asks of a model, for a subclass with `feature_info`, `num_features` and stages.

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

    def _stages(self) -> list[nn.Module]:
        """The layers up to the end of each resolution."""
        raise NotImplementedError

    def _keep_stages(self, count: int) -> None:
        """Drop the layers behind the first stages."""
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
        """Drop the layers behind the last map wanted, and the head."""
        take, last = private.feature_take_indices(len(self.feature_info), indices)
        pruned = last < len(self.feature_info) - 1
        if pruned:
            self._keep_stages(last + 1)
            self.num_features = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take
