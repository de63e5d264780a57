"""How a call is executed: by eager PyTorch alone, or under a compiler, tracer or transform."""

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
LARGE = 1 << 21  # elements of a batch that a CPU processes in pieces


def pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split batches of large maps on a CPU into pieces of one image per thread; other batches are returned as they are.

    Temporaries of pieces stay in the CPU's cache. This saves 8 to 10 % of the time of inference of a fused ResNet-50 or
    ConvNeXt-tiny at batch 8, 224².

    Args:
        x: (N, ...). Its size decides.
        others: (N, ...), split in the same way.
    """
    if x.device.type != "cpu" or x.numel() <= LARGE or any(len(tensor) != len(x) for tensor in others):
        return iter([(x, *others)])
    return zip(*(tensor.split(torch.get_num_threads()) for tensor in (x, *others)), strict=True)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether eager PyTorch executes functions of these tensors, without anything in between.

    False while calls are compiled or traced (torch.compile, torch.export, torch.jit.trace), transformed (torch.func,
    forward-mode derivatives, batched gradients), or overridden (explanation mode, torch.fx).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or has_torch_function(tensors):
        return False
    if _is_transformed() or any(map(_is_batched, tensors)):
        return False
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)


def saved_tensors_have_hooks() -> bool:
    """Whether hooks change what autograd saves, as gradient checkpointing and offloading to memory do."""
    return _top_hooks(False) is not None


def records_gradients(*tensors: Tensor) -> bool:
    """Whether eager PyTorch records the backward pass of a function of these tensors."""
    return runs_eagerly(*tensors) and _wants_gradients(tensors)


def only_infers(*tensors: Tensor) -> bool:
    """Whether eager PyTorch computes a function of these tensors without recording gradients."""
    return runs_eagerly(*tensors) and not _wants_gradients(tensors)


def _wants_gradients(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
