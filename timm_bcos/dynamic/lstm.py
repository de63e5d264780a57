"""LSTMs in explanation mode: gates are constants, and the cell's tanh scales what goes through it.

With gates i, f, o and candidate g, c' = f · c + i · g and h' = o · tanh(c'). Given the gates, both are linear in the
input and the state before, but for the two tanh, which become x · slope as every activation does.
"""

from typing import Any

import torch
from torch import Tensor

from .functions import _activation, _linear
from .mode import declare, on_linear_path

__all__: list[str] = []

Weights = list[Tensor]


@declare(torch.lstm)
def _lstm(
    func: Any, x: Tensor, state: tuple[Tensor, Tensor], weights: Weights, has_biases: bool, num_layers: int,
    dropout: float, training: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `torch.lstm` for padded batches, step by step."""
    if not on_linear_path(x):
        return func(x, state, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first)
    sequence = x.transpose(0, 1) if batch_first else x  # (L, N, C)
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (num_layers * directions)
    hidden, cells = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = weights[index * per_cell : (index + 1) * per_cell]
            start = state[0][index], state[1][index]
            output, (h, c) = _run(sequence, start, own, has_biases, backwards=direction == 1)
            outputs.append(output)
            hidden.append(h)
            cells.append(c)
        sequence = torch.cat(outputs, 2)
    return sequence.transpose(0, 1) if batch_first else sequence, torch.stack(hidden), torch.stack(cells)


def _run(
    sequence: Tensor, state: tuple[Tensor, Tensor], weights: Weights, has_biases: bool, backwards: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer in one direction: (L, N, C) to (L, N, H) and the last state."""
    input_weight, state_weight, *rest = weights
    input_bias, state_bias = rest[:2] if has_biases else (None, None)
    projection = rest[-1] if len(rest) in (1, 3) else None
    from_input = _linear(torch.nn.functional.linear, sequence, input_weight, input_bias)
    outputs = []
    for step in reversed(from_input.unbind(0)) if backwards else from_input.unbind(0):
        h, c = state
        state = _cell(step + _of_state(h, state_weight, state_bias), c, projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _of_state(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The first state is a constant, whose bias must count as one too."""
    return _linear(torch.nn.functional.linear, h if on_linear_path(h) else h.detach().requires_grad_(), weight, bias)


def _cell(gates: Tensor, c: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor]:
    update, forget, candidate, output = gates.chunk(4, dim=1)
    c = forget.detach().sigmoid() * c + update.detach().sigmoid() * _activation(torch.tanh, candidate)
    h = output.detach().sigmoid() * _activation(torch.tanh, c)
    return (h if projection is None else h @ projection.T), c
