"""Recurrent layers in explanation mode: gates are constants, and the cell's tanh scales what goes through it.

With the gates given, a step is linear in its input and in the state before, but for tanh, which becomes x · slope as
every activation does. An LSTM computes c' = f · c + i · tanh(g) and h' = o · tanh(c'), a GRU h' = (1 - z) · n + z · h
with n = tanh(W x + r · (U h)).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate
from .products import linear
from .registry import Function, Mode, detached, named, on_linear_path, rule

__all__: list[str] = []

State = tuple[Tensor, ...]
Cell = Callable[[Mode, Function, Tensor, State, list[Tensor]], State]  # weights: input, state (and their biases)


def _projected(mode: Mode, func: Function, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = linear(mode, F.linear, x, weight)
    return y if bias is None else mode.add(y + bias, bias, func) if on_linear_path(y) else y + bias


def _gated(mode: Mode, func: Function, gate: Tensor, value: Tensor, *sources: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """gate · value, and what it was made of, the gate counting as a constant factor where the value is constant."""
    return detached(gate) * value, (value, *sources)


def _sum(mode: Mode, func: Function, *terms: tuple[Tensor, tuple[Any, ...]]) -> Tensor:
    """Terms of which any may be off the path."""
    total = terms[0][0]
    for term, _ in terms[1:]:
        total = total + term
    for term, sources in terms:
        if not on_linear_path(term):
            total = mode.add(total, term, func, *sources)
    return total


def _lstm_cell(mode: Mode, func: Function, x: Tensor, state: State, weights: list[Tensor]) -> State:
    h, c = state
    biases = weights[2:4] if len(weights) > 3 else [None, None]
    projection = weights[-1] if len(weights) in (3, 5) else None
    from_input, from_state = (
        _projected(mode, func, v, w, b) for v, w, b in zip((x, h), weights[:2], biases, strict=True)
    )
    gates = _sum(mode, func, (from_input, (x,)), (from_state, (h, *[b for b in biases if b is not None])))
    update, forget, candidate, output = gates.chunk(4, dim=1)
    kept = _gated(mode, func, forget.sigmoid(), c)
    c = _sum(mode, func, kept, (detached(update).sigmoid() * _tanh(mode, candidate), (candidate,)))
    h = detached(output).sigmoid() * _tanh(mode, c)
    return (h if projection is None else linear(mode, F.linear, h, projection)), c


def _gru_cell(mode: Mode, func: Function, x: Tensor, state: State, weights: list[Tensor]) -> State:
    (h,) = state
    biases = weights[2:4] if len(weights) > 3 else [None, None]
    from_input = _projected(mode, func, x, weights[0], biases[0]).chunk(3, 1)
    from_state = _projected(mode, func, h, weights[1], biases[1]).chunk(3, 1)
    reset, update = ((detached(a) + detached(b)).sigmoid() for a, b in zip(from_input[:2], from_state[:2], strict=True))
    made_of = (h, *[b for b in biases if b is not None])
    inner = _sum(mode, func, (from_input[2], (x,)), (reset * from_state[2], made_of))
    return (_sum(mode, func, ((1 - update) * _tanh(mode, inner), (inner,)), _gated(mode, func, update, h)),)


def _plain_cell(activation: Callable[[Mode, Tensor], Tensor]) -> Cell:
    def cell(mode: Mode, func: Function, x: Tensor, state: State, weights: list[Tensor]) -> State:
        (h,) = state
        biases = weights[2:4] if len(weights) > 3 else [None, None]
        from_input, from_state = (
            _projected(mode, func, v, w, b) for v, w, b in zip((x, h), weights[:2], biases, strict=True)
        )
        made_of = (h, *[b for b in biases if b is not None])
        return (activation(mode, _sum(mode, func, (from_input, (x,)), (from_state, made_of))),)

    return cell


def _tanh(mode: Mode, x: Tensor) -> Tensor:
    return activate(mode, torch.tanh, x)


def _relu(mode: Mode, x: Tensor) -> Tensor:
    return x.relu()


CELLS: dict[Function, Cell] = {
    torch.lstm: _lstm_cell,
    torch.gru: _gru_cell,
    torch.rnn_tanh: _plain_cell(_tanh),
    torch.rnn_relu: _plain_cell(_relu),
}
SINGLE: dict[Function, Cell] = {
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: CELLS[torch.rnn_tanh],
    torch.rnn_relu_cell: CELLS[torch.rnn_relu],
}


@rule(*SINGLE)
def _step(
    mode: Mode, func: Function, /, x: Tensor, state: Tensor | tuple[Tensor, ...], *weights: Tensor | None
) -> Tensor | State:
    several = not isinstance(state, Tensor)
    given = tuple(state) if several else (state,)
    new = SINGLE[func](mode, func, x, given, [w for w in weights if w is not None])
    return new if several else new[0]


@rule(*CELLS)
def _layers(mode: Mode, func: Function, /, *args: Any) -> tuple[Tensor, ...]:
    """As torch's functions, step by step, for padded batches (L, N, C) and for packed sequences."""
    if isinstance(args[3], bool):
        x, state, weights, _, num_layers, dropout, training, bidirectional, batch_first = args
        steps = list((x.transpose(0, 1) if batch_first else x).unbind(0))
    else:
        x, sizes, state, weights, _, num_layers, dropout, training, bidirectional = args
        steps, batch_first = list(x.split(sizes.tolist())), False
    states = (state,) if isinstance(state, Tensor) else tuple(state)
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (num_layers * directions)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = weights[index * per_cell : (index + 1) * per_cell]
            output, end = _run(mode, func, steps, tuple(s[index] for s in states), own, backwards=direction == 1)
            outputs.append(output)
            last.append(end)
        steps = [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)]
        if dropout and training and layer < num_layers - 1:
            steps = [F.dropout(step, dropout) for step in steps]
    ends = [torch.stack(column) for column in zip(*last, strict=True)]
    if not isinstance(args[3], bool):
        return (torch.cat(steps), *ends)
    return (torch.stack(steps, 1 if batch_first else 0), *ends)


def _run(
    mode: Mode, func: Function, steps: list[Tensor], state: State, weights: list[Tensor], backwards: bool
) -> tuple[list[Tensor], State]:
    """One layer in one direction: what it answers at each step, and the last state of each sequence.

    Steps are (n, C) each, of the first n sequences, the longest ones first; a state is (N, H) each.
    """
    outputs = []
    for x in reversed(steps) if backwards else steps:
        new = CELLS[func](mode, func, x, tuple(s[: len(x)] for s in state), weights)
        outputs.append(new[0])
        state = new if len(x) == len(state[0]) else tuple(
            torch.cat([changed, kept[len(x) :]]) for changed, kept in zip(new, state, strict=True)
        )  # fmt: skip
    return outputs[::-1] if backwards else outputs, state


@rule(*named("_pad_packed_sequence"))
def _padded(
    mode: Mode, func: Function, /, data: Tensor, sizes: Tensor, batch_first: bool, padding: float, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Packed sequences as a padded batch."""
    y, lengths = func(data, sizes, batch_first, 0.0, *rest)
    if not padding:
        return y, lengths
    is_padded = func(torch.ones_like(detached(data)), sizes, batch_first, 0.0, *rest)[0] == 0
    addend = is_padded.to(y.dtype) * padding
    return mode.add(y + addend, addend, func, padding), lengths
