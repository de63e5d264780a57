"""The uncentred batch norm of several processes' batches, as `torch.nn.SyncBatchNorm` shares its statistics."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["divide_by_shared_deviation", "is_shared"]


def is_shared(group: ProcessGroup | None) -> bool:
    """Whether there are other processes in the group (None for all of them) to share statistics with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def divide_by_shared_deviation(
    x: Tensor, weight: Tensor, eps: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """`timm_bcos.nn.deviation.divide_by_deviation` of all processes' batches together.

    Args:
        x: (N, C, H, W), of this process; N may differ between them.
        weight: (C,).
        eps: Added to the variance.
        group: The processes; None for all.

    Returns:
        weight · x / sqrt(var + eps), and the biased variance (C,), which carries no gradient.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = wide.new_full((1,), x.numel() / x.shape[1])
    mean = _sum(torch.cat([wide.sum((0, 2, 3)), count]), group)
    mean, count = mean[:-1] / mean[-1], mean[-1].detach()
    var = _sum((wide - mean.reshape(1, -1, 1, 1)).square().sum((0, 2, 3)), group) / count
    return x * (weight * (var + eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype), var.detach()


def _sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over processes; its gradient is the sum of all processes' gradients."""
    return _AllReduce.apply(values, group)  # type: ignore[no-any-return]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: ProcessGroup | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
