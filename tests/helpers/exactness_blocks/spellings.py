"""Pairs of spellings of one function, whose explanations are the same numbers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import LSTM, C, packed, tokens

SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "clamp_min(min=)": (lambda z: z.clamp_min(min=0.05), lambda z: z.clamp(min=0.05)),
    "torch.clamp_min(z, min=)": (lambda z: torch.clamp_min(z, min=0.05), lambda z: z.clamp(min=0.05)),
    "clamp_min_(min=)": (lambda z: (z * 1).clamp_min_(min=0.05), lambda z: z.clamp(min=0.05)),
    "clamp_max(max=)": (lambda z: z.clamp_max(max=-0.05), lambda z: z.clamp(max=-0.05)),
    "hardtanh(max_val=, min_val=)": (lambda z: F.hardtanh(z, max_val=0.1, min_val=0.05), lambda z: z.clamp(0.05, 0.1)),
    "aten.clamp": (lambda z: torch.ops.aten.clamp(z, 0.05, 0.1), lambda z: z.clamp(0.05, 0.1)),
    "aten.clamp.Tensor": (lambda z: torch.ops.aten.clamp.Tensor(z, C * 0.1), lambda z: z.clamp(C * 0.1)),
    "aten.softplus": (lambda z: torch.ops.aten.softplus(z), F.softplus),
    "aten.threshold": (lambda z: torch.ops.aten.threshold(z, 0.1, 0.5), lambda z: F.threshold(z, 0.1, 0.5)),
    "packed sequences of one length": (
        packed(LSTM, [9, 9, 9]),
        lambda z: LSTM(tokens(z)[:, :27].unflatten(1, (3, 9)).flatten(0, 1))[0].unflatten(0, (-1, 3)).mean((1, 2)),
    ),
}
