"""Where to compute."""

import torch

from ..errors import InputError
from ..files import first_line

__all__ = ["find_device"]


def find_device(name: str) -> torch.device:
    """A device by torch's name.

    Raises:
        InputError: If there is none here.
    """
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # which 'meta' cannot give
    except Exception as error:  # each backend raises its own
        raise InputError(f"no device {name!r} here ({first_line(error)}): choose {', '.join(_devices())}") from error
    return device


def _devices() -> list[str]:
    return ["cpu", *(name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available())]
