"""How a call is executed: by eager PyTorch alone, or under something that must see the formulas as they stand."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from .._compat import private

__all__ = ["only_infers", "pieces", "records_gradients", "runs_eagerly", "saved_tensors_have_hooks"]

_is_transformed = private.are_functorch_transforms_active
_is_batched = private.is_legacy_batchedtensor
_top_hooks = private.top_saved_tensors_hooks
LARGE = 1 << 21  # elements, above which a CPU takes a batch in pieces


def pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A batch as it is; or, of large maps on a CPU, an image per thread at a time.

    Memory that comes fresh from the system costs a CPU more than a step per piece, whose temporaries stay in its cache:
    8 to 10 % of the inference of a fused ResNet-50 or ConvNeXt-tiny, batch 8, 224².

    Args:
        x: (N, ...), whose size decides.
        others: (N, ...), split in the same way.
    """
    if x.device.type != "cpu" or x.numel() <= LARGE or any(len(tensor) != len(x) for tensor in others):
        return iter([(x, *others)])
    return zip(*(tensor.split(torch.get_num_threads()) for tensor in (x, *others)), strict=True)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether torch just computes.

    False while calls are written down (torch.compile, torch.export, tracers), transformed (torch.func, forward-mode
    derivatives, batched gradients: of some of these torch has no public way to tell), or overridden (explanation mode,
    torch.fx).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or has_torch_function(tensors):
        return False
    if _is_transformed() or any(map(_is_batched, tensors)):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)


def saved_tensors_have_hooks() -> bool:
    """Whether somebody (a checkpoint, memory that is offloaded) wants to see what graphs save."""
    return _top_hooks(False) is not None


def records_gradients(*tensors: Tensor) -> bool:
    """Whether eager PyTorch records the backward pass of a function of these tensors."""
    return runs_eagerly(*tensors) and _wants_gradients(tensors)


def only_infers(*tensors: Tensor) -> bool:
    """Whether eager PyTorch computes a function of these tensors, whose gradients nobody wants."""
    return runs_eagerly(*tensors) and not _wants_gradients(tensors)


def _wants_gradients(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
