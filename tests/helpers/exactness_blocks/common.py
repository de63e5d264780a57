"""Constants and wrappers that blocks of several kinds use; maps z are (N, 6, 12, 12) of float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Blocks = dict[str, Callable[[Tensor], Any]]

D = torch.float64
C = torch.linspace(-1, 1, 6, dtype=D)[:, None, None]
EYE = torch.eye(6, dtype=D)
torch.manual_seed(0)  # blocks are the same in every run
LSTM = nn.LSTM(6, 6, batch_first=True).double().eval()


def changed(function):
    def run(z):
        y = z * 1
        function(y, z)
        return y

    return run


def seq(z):
    return tokens(z)[:, :5]


def tokens(z):
    return z.flatten(2).transpose(1, 2)


def packed(layer, lengths):
    """Each image's tokens as sequences of several lengths."""

    def run(z):
        t = tokens(z)[:, :27].unflatten(1, (3, 9)).flatten(0, 1)
        several = torch.tensor(lengths).repeat(len(z))
        rows = nn.utils.rnn.pack_padded_sequence(t, several, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(layer(rows)[0], batch_first=True)[0].unflatten(0, (-1, 3)).mean((1, 2))

    return run


def each(function):
    return lambda z: torch.stack([function(t) for t in z])
