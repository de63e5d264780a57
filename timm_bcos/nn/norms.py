"""Norms that keep a model dynamic linear: they divide, but neither subtract a running mean nor add a bias.

Paper: B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers (TPAMI 2024),
https://arxiv.org/abs/2306.10898, section 3.3. torch's other norms need no class of their own: explanation mode treats
their statistics as constants (`timm_bcos.dynamic_linear`), and subtracting a mean over the features of x itself is
linear.

The classes are subclasses of torch's and timm's batch norms, so that tools find them: freezing, Lightning,
transformers, `torch.optim.swa_utils.update_bn`. The mean and the bias that such tools read are 0.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.overrides import handle_torch_function, has_torch_function
from typing_extensions import Self

from .._compat import private, timm_layers
from ..errors import ModelStateError
from . import autograd
from .execution import records_gradients
from .primitives import divide_by_deviation

__all__ = [
    "UncenteredBatchNorm1d",
    "UncenteredBatchNorm2d",
    "UncenteredBatchNormAct2d",
    "divide_by_shared_deviation",
    "is_shared",
    "shared_variance",
]


def is_shared(group: ProcessGroup | None) -> bool:
    """Whether the process group (None for all processes) has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def divide_by_shared_deviation(
    x: Tensor, weight: Tensor, eps: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """`timm_bcos.nn.primitives.divide_by_deviation` over the batches of all processes.

    Args:
        x: Batch of this process, (N, C, H, W). N may differ between processes.
        weight: (C,).
        eps: Constant added to the variance.
        group: Process group; None for all processes.

    Returns:
        weight · x / sqrt(var + eps), and the biased variance (C,), which carries no gradient.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(divide_by_shared_deviation, (x, weight), x, weight, eps, group)
    var = shared_variance(x, group)
    return x * (weight * (var + eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype), var.detach()


def shared_variance(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Biased variance (C,) of each channel over the batches of all processes; see `divide_by_shared_deviation`."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = wide.new_full((1,), x.numel() / x.shape[1])
    mean = _sum(torch.cat([wide.sum((0, 2, 3)), count]), group)
    mean, count = mean[:-1] / mean[-1], mean[-1].detach()
    return _sum((wide - mean.reshape(1, -1, 1, 1)).square().sum((0, 2, 3)), group) / count


def _sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over processes; its gradient is the sum of all processes' gradients."""
    return _AllReduce.apply(values, group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: ProcessGroup | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


CENTERED = ("running_mean", "bias")  # in state dicts of batch norms, but not of uncentered ones


class _UncenteredBatchNorm(private.BatchNorm):
    """Base class of the norms below; see `UncenteredBatchNorm2d`."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    __jit_unused_properties__ = ("bias",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # torch's norms would register a bias
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = True
        self.track_running_stats = True
        self.is_synchronized = False
        self.process_group: ProcessGroup | None = None
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.register_buffer("running_mean", zeros, persistent=False)
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device, dtype=torch.long))

    @classmethod
    def from_batch_norm(cls, norm: Any) -> Self:
        """Adopt the weight and the running variance of a batch norm, without its bias and mean."""
        new = cls(norm.num_features, norm.eps, norm.momentum, device="meta")  # all tensors are replaced
        for name in ("weight", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(norm, name))
        new.running_mean = torch.zeros_like(new.running_var)
        new.is_synchronized = isinstance(norm, nn.SyncBatchNorm)
        new.process_group = getattr(norm, "process_group", None)
        return new.train(norm.training)

    @property
    def bias(self) -> nn.Parameter:
        """Zeros for tools that copy a norm; not a parameter of this module."""
        return nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)

    @bias.setter
    def bias(self, value: nn.Parameter | None) -> None:
        self._refuse_bias(value)

    @torch.jit.unused
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Accept a bias of 0, which tools assign when they copy a norm."""
        if name == "bias":
            self._refuse_bias(param)
        else:
            super().register_parameter(name, param)

    @torch.jit.unused
    def _refuse_bias(self, value: nn.Parameter | None) -> None:
        if value is not None and not value.is_meta and value.any():
            raise ModelStateError(
                f"a {type(self).__name__} adds no bias, and cannot be given one that is not 0: replace the norm by a "
                f"plain one, or convert the model with bias=True"
            )

    def forward(self, input: Tensor) -> Tensor:
        return self.normalize(input)

    def normalize(self, x: Tensor) -> Tensor:
        """The norm itself; a method of its own because TorchScript has no `super()`."""
        if self.is_synchronized and x.dim() != 4:  # torch's synchronized norms take inputs of any dimension
            return self.normalize_maps(x.reshape(x.shape[0], x.shape[1], -1, 1)).reshape(x.shape)
        return self.normalize_maps(x)

    def normalize_maps(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if self.training and not torch.jit.is_scripting():
            return self.normalize_batch(x)
        var = self.running_var
        if self.training:
            var = x.var([0, 2, 3], unbiased=False)
            self.follow(var.detach())
        return x * (self.weight * (var + self.eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype)

    @torch.jit.unused
    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize by the batch's own variance, and update the running variance."""
        if self.is_synchronized and is_shared(self.process_group):
            y, var = divide_by_shared_deviation(x, self.weight, self.eps, self.process_group)
        else:
            divide = autograd.divide_by_deviation if records_gradients(x, self.weight) else divide_by_deviation
            y, var = divide(x, self.weight, self.eps)
        self.follow(var)
        return y

    def follow(self, var: Tensor) -> None:
        """Update the running variance with that of a batch, which carries no gradient."""
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        new = var.to(self.running_var.dtype)
        momentum = self.momentum
        if momentum is None:
            self.running_var.lerp_(new, 1 / self.num_batches_tracked.to(new.dtype))
        else:
            self.running_var.lerp_(new, momentum)

    def reset_running_stats(self) -> None:
        """Reset the running variance to 1, as torch's batch norms do."""
        self.init_non_persistent_buffers()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def init_non_persistent_buffers(self) -> None:
        """Fill the buffer that state dicts do not contain, after `to_empty`."""
        self.running_mean.zero_()

    def reset_parameters(self) -> None:
        """Reset the statistics and the weight, as torch's batch norms do."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accept a mean and a bias of 0, which norms have that were frozen when they were saved."""
        for name in CENTERED:
            value = state_dict.get(prefix + name)
            if value is not None and not value.is_meta and not value.any():
                del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        synchronized = ", is_synchronized=True" if self.is_synchronized else ""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}{synchronized}"


class UncenteredBatchNorm2d(_UncenteredBatchNorm, nn.BatchNorm2d):  # type: ignore[misc]
    """Batch norm without its additive parts: y = weight · x / sqrt(var + eps).

    `BatchNormUncentered2d` in the official code (package `bcos`).

    `var` is the *centered* variance of the batch (biased) in training and the running one in evaluation.

    Tools that replace it by a norm of their own find a `running_mean` and a `bias` of 0, so that a frozen norm computes
    the same. torch's trainable and synchronized norms would subtract means in training: a converted model replaces them
    by uncentered ones when it is trained (`timm_bcos.conversion.converted`).

    Args:
        num_features: Number of channels, C.
        eps: Constant added to the variance.
        momentum: Weight of the new batch in the running variance; None averages all batches, as in torch.

    Attributes:
        track_running_stats: Whether the running variance is updated. Lightning sets it to False to freeze norms.
        is_synchronized: Whether the variance is computed over all processes, as by `torch.nn.SyncBatchNorm`.
        process_group: Group of these processes; None for all.

    Shape: (N, C, ...) to the same.
    """


UncentredBatchNorm2d = UncenteredBatchNorm2d  # alias in British spelling


class UncenteredBatchNorm1d(_UncenteredBatchNorm, nn.BatchNorm1d):  # type: ignore[misc]
    """`UncenteredBatchNorm2d` for feature vectors (N, C) and sequences (N, C, L)."""

    def normalize(self, x: Tensor) -> Tensor:
        return self.normalize_maps(x.reshape(x.shape[0], x.shape[1], -1, 1)).reshape(x.shape)


class UncenteredBatchNormAct2d(UncenteredBatchNorm2d, timm_layers.BatchNormAct2d):
    """Uncentered batch norm with timm's drop and activation layers behind it (`timm.layers.BatchNormAct2d`)."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, device, dtype)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(self.normalize(input)))
