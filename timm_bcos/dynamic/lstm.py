"""LSTMs in explanation mode: gates are constants, and the cell's tanh scales what goes through it.

With gates i, f, o and candidate g, c' = f · c + i · g and h' = o · tanh(c'). Given the gates, both are linear in the
input and the state before, but for the two tanh, which become x · slope as every activation does.
"""

import torch
from torch import Tensor

from .activations import activate
from .layers import linear
from .table import Function, Mode, detached, handles, on_linear_path

__all__: list[str] = []

Weights = list[Tensor]


@handles(torch.lstm)
def _lstm(
    mode: Mode, func: Function, /, x: Tensor, state: tuple[Tensor, Tensor], weights: Weights, has_biases: bool,
    num_layers: int, dropout: float, training: bool, bidirectional: bool, batch_first: bool,
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
            output, (h, c) = _run(mode, sequence, start, own, has_biases, backwards=direction == 1)
            outputs.append(output)
            hidden.append(h)
            cells.append(c)
        sequence = torch.cat(outputs, 2)
    return sequence.transpose(0, 1) if batch_first else sequence, torch.stack(hidden), torch.stack(cells)


def _run(
    mode: Mode, sequence: Tensor, state: tuple[Tensor, Tensor], weights: Weights, has_biases: bool, backwards: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer in one direction: (L, N, C) to (L, N, H) and the last state."""
    input_weight, state_weight, *rest = weights
    input_bias, state_bias = rest[:2] if has_biases else (None, None)
    projection = rest[-1] if len(rest) in (1, 3) else None
    from_input = linear(mode, torch.nn.functional.linear, sequence, input_weight, input_bias)
    outputs = []
    for step in reversed(from_input.unbind(0)) if backwards else from_input.unbind(0):
        h, c = state
        from_state = linear(mode, torch.nn.functional.linear, h, state_weight, state_bias)
        gates = mode.add(step + from_state, from_state, torch.lstm)  # the first state is a constant
        state = _cell(mode, gates, c, projection)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _cell(mode: Mode, gates: Tensor, c: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor]:
    update, forget, candidate, output = gates.chunk(4, dim=1)
    kept = detached(forget).sigmoid() * c
    c = mode.add(kept + detached(update).sigmoid() * activate(mode, torch.tanh, candidate), kept, torch.lstm, c)
    h = detached(output).sigmoid() * activate(mode, torch.tanh, c)
    return (h if projection is None else h @ projection.T), c
