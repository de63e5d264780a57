"""How a call is executed: by eager PyTorch alone, or under something that must see the formulas as they stand."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

__all__ = ["only_infers", "records_gradients", "runs_eagerly"]


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether torch just computes.

    Torch has no public way to ask for transforms. False while calls are written down (torch.compile, torch.export, tracers), transformed (torch.func, forward-mode
    derivatives, batched gradients) or overridden (explanation mode, torch.fx).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or has_torch_function(tensors):
        return False
    if torch._C._are_functorch_transforms_active() or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors)):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)


def records_gradients(*tensors: Tensor) -> bool:
    """Whether eager PyTorch records the backward pass of a function of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and runs_eagerly(*tensors)


def only_infers(*tensors: Tensor) -> bool:
    """Whether eager PyTorch computes a function of these tensors, whose gradients nobody wants."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and runs_eagerly(*tensors)
