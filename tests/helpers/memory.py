"""Memory that is given back to the system."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

GROWTH = 500  # MB
_after_freeing = 0


def free_memory() -> None:
    """Forget what compilers keep, collect garbage, and give back what was freed."""
    global _after_freeing
    forget_scripts()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    trim()
    _after_freeing = resident_memory()


def has_grown() -> bool:
    """Whether the process has grown much since `free_memory`, for instance by models that only wait to be collected."""
    return resident_memory() > _after_freeing + GROWTH


def resident_memory() -> int:
    """Resident memory of this process in MB; 0 where Linux does not tell it."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20 if statistics.exists() else 0


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
