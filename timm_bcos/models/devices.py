"""Devices by name. torch is imported on first use, so that the command line can import this module."""

from typing import TYPE_CHECKING

from ..errors import InputError
from ..files import first_line

if TYPE_CHECKING:
    import torch

__all__ = ["find_device"]


def find_device(name: "torch.device | str") -> "torch.device":
    """Find a device by torch's name.

    Raises:
        InputError: If the device is not available.
    """
    import torch

    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # fails on 'meta', which holds no numbers
    except Exception as error:  # each backend raises its own
        choices = ", ".join(_devices())
        raise InputError(f"no device {str(name)!r} here ({first_line(error)}): choose {choices}") from error
    return device


def _devices() -> list[str]:
    import torch

    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available())]
