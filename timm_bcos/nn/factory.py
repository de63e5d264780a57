"""Where, and as what, a module makes its parameters: torch's factory keywords."""

import torch
from typing_extensions import TypedDict

__all__ = ["Factory"]


class Factory(TypedDict, total=False):
    """Keywords that every layer hands to those inside it."""

    device: torch.device | str | None
    dtype: torch.dtype | None
