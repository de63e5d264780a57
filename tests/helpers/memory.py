"""Memory that is given back to the system."""

import ctypes
import gc
import sys


def free_memory() -> None:
    """Collect garbage and give back what was freed."""
    gc.collect()
    trim()


def trim() -> None:
    """Give back what was freed; glibc keeps most of it for later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
