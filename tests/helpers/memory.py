"""Memory that is given back to the system."""

import ctypes
import gc
import sys

import torch


def free_memory() -> None:
    """Forget what compilers keep, collect garbage, and give back what was freed."""
    forget_scripts()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    trim()


def has_scripted() -> bool:
    """Whether a module has been compiled by `torch.jit.script` since `forget_scripts`."""
    return bool(torch.jit._recursive.concrete_type_store.type_store)


def forget_scripts() -> None:
    """Let go of the classes that TorchScript keeps until the process ends: tens of megabytes for each model.

    torch's own tests do the same (torch/testing/_internal/jit_utils.py).
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


def trim() -> None:
    """Give back what was freed; glibc keeps most of it for later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
