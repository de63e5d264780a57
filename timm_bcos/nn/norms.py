"""Norms that keep a network dynamic linear: they divide, but neither subtract a running mean nor add a bias.

Paper: B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers (TPAMI 2024),
https://arxiv.org/abs/2306.10898, section 3.3. torch's other norms need no class of their own: explanation mode treats
their statistics as constants (`timm_bcos.dynamic`), and subtracting a mean over the features of x itself is linear.
"""

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import autograd
from .deviation import divide_by_deviation
from .execution import records_gradients

__all__ = ["UncentredBatchNorm1d", "UncentredBatchNorm2d", "UncentredBatchNormAct2d"]


class UncentredBatchNorm2d(nn.Module):
    """Batch norm without its additive parts: y = weight · x / sqrt(var + eps).

    `var` is the *centred* variance of the batch (biased) in training and the running one in evaluation. It is no
    subclass of torch's batch norm on purpose: `convert_sync_batchnorm` would silently replace it by a centred one.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running variance; None averages all batches, as in torch.

    Shape: (N, C, H, W) to the same.
    """

    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device, dtype=torch.long))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Self:
        """Adopt the weight and the running statistics of a batch norm; its bias is left behind."""
        new = cls(norm.num_features, norm.eps, norm.momentum, device="meta")  # no storage: everything is adopted
        for name in ("weight", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(norm, name))
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x)

    def normalize(self, x: Tensor) -> Tensor:
        """The norm itself; a method of its own because TorchScript has no `super()`."""
        if not self.training:
            return x * (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1).to(x.dtype)
        return self.normalize_batch(x)

    @torch.jit.unused  # TorchScript serves inference
    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalise by the batch's own variance, and let the running one follow."""
        divide = autograd.divide_by_deviation if records_gradients(x, self.weight) else divide_by_deviation
        y, var = divide(x, self.weight, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            new = var.to(self.running_var.dtype)
            if self.momentum is None:
                self.running_var.lerp_(new, 1 / self.num_batches_tracked.to(new.dtype))
            else:
                self.running_var.lerp_(new, self.momentum)
        return y

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Begin anew, as torch's batch norms do."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class UncentredBatchNorm1d(UncentredBatchNorm2d):
    """The same for feature vectors (N, C) and sequences (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x.reshape(x.shape[0], x.shape[1], -1, 1)).reshape(x.shape)


class UncentredBatchNormAct2d(UncentredBatchNorm2d):
    """Uncentred batch norm with timm's drop and activation layers behind it (`timm.layers.BatchNormAct2d`)."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, device, dtype)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalize(x)))
