"""What an output is made of: a backward pass from it, back through what stands before the first layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dynamic_linear.bias_tracker import BiasTracker, by_image
from ..dynamic_linear.violations import Violation

__all__ = ["LinearPart", "linear_part", "linear_parts"]

AT_ONCE = 64  # gradients of one image each that a backward pass computes together

Grads = list[Tensor | None]


@dataclass
class LinearPart:
    """What an output is made of: weights · encoded image + constants, and what should not be there.

    Attributes:
        weights: (N, 2C, H, W) the row of W(x), by the encoding [x, 1 - x].
        constant_bias: (N,) contribution of constants.
        gate_bias: (N,) contribution of image-dependent values that are added.
        violations: Parts of the model before this output that are not dynamic linear.
    """

    weights: Tensor
    constant_bias: Tensor
    gate_bias: Tensor
    violations: tuple[Violation, ...]


def linear_part(value: Tensor, leaf: Tensor, tracker: BiasTracker) -> LinearPart:
    """Take an output apart, with one backward pass; the graph stays for others.

    Args:
        value: A scalar: the sum over images of an output each.
        leaf: (N, C, H, W) the images.
        tracker: Constants of the forward pass.
    """
    factors = _factors(leaf, tracker)
    grads = torch.autograd.grad(value, factors, retain_graph=True, allow_unused=True)
    return _part_of(list(grads), factors, tracker)


def linear_parts(values: Tensor, leaf: Tensor, tracker: BiasTracker) -> list[LinearPart]:
    """The same of several outputs (T,), as many in one backward pass as memory and the model's functions allow."""
    at_once = max(1, AT_ONCE // len(leaf))
    return [part for some in values.split(at_once) for part in _together(some, leaf, tracker)]


def _together(values: Tensor, leaf: Tensor, tracker: BiasTracker) -> list[LinearPart]:
    if len(values) > 1:
        factors, each = _factors(leaf, tracker), torch.eye(len(values)).to(values)
        try:
            grads = torch.autograd.grad(
                values, factors, each, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # a function whose gradient cannot be taken for several outputs at once
            pass
        else:
            rows: list[Grads] = [[None if g is None else g[i] for g in grads] for i in range(len(values))]
            return [_part_of(row, factors, tracker) for row in rows]
    return [linear_part(value, leaf, tracker) for value in values]


def _factors(leaf: Tensor, tracker: BiasTracker) -> list[Tensor]:
    readings = [boundary.encoded for boundary in tracker.boundaries]
    return [leaf, tracker.constants, *(factor for factor, _ in tracker.suspects), *readings]


def _part_of(grads: Grads, factors: Sequence[Tensor], tracker: BiasTracker) -> LinearPart:
    leaf, suspects = factors[0], tracker.suspects
    weights, grads = _to_image(grads, list(factors), tracker)
    zeros = torch.zeros_like(factors[1])
    reached = [
        (violation, grad) for (_, violation), grad in zip(suspects, grads[2 : 2 + len(suspects)], strict=True)
        if grad is not None
    ]  # fmt: skip
    added = [grad for violation, grad in reached if violation.kind == "added"]
    constants = zeros if grads[1] is None else grads[1]
    if grads[0] is not None:  # what reads the image without a reader takes no complements
        weights = weights + torch.cat([grads[0], torch.zeros_like(leaf)], 1)
    return LinearPart(
        weights, constants, torch.stack(added).sum(0) if added else zeros, tuple(dict.fromkeys(d for d, _ in reached))
    )


def _to_image(grads: Grads, factors: list[Tensor], tracker: BiasTracker) -> tuple[Tensor, Grads]:
    """(N, 2C, H, W) weights by the image, and gradients by everything else, from those by what was read.

    The last reading comes first: it may depend on the ones before.
    """
    count = len(factors) - len(tracker.boundaries)
    channels = factors[0].shape[1]
    direct: Tensor | None = None
    for index in reversed(range(count, len(factors))):
        boundary, grad = tracker.boundaries[index - count], grads[index]
        if grad is None:
            continue
        if boundary.is_direct:
            direct = grad if direct is None else direct + grad
            continue
        first, second = grad.chunk(2, 1)
        shown, hidden = (boundary.pull_back(half, factors[:index]) for half in (first, second))
        pulled = torch.cat([_or_zeros(shown[0], factors[0]), _or_zeros(hidden[0], factors[0])], 1)
        direct = pulled if direct is None else direct + pulled
        for i in range(1, index):
            grads[i] = _sum(grads[i], shown[i], hidden[i])
        white = by_image(second, torch.ones(()).to(second), len(factors[0])) - pulled[:, channels:].flatten(1).sum(1)
        grads[1] = white if grads[1] is None else grads[1] + white
    weights = torch.cat([torch.zeros_like(factors[0])] * 2, 1) if direct is None else direct
    return weights, grads


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _sum(old: Tensor | None, added: Tensor | None, taken: Tensor | None) -> Tensor | None:
    """old + added - taken, of which each may be missing."""
    for sign, term in ((1, added), (-1, taken)):
        if term is not None:
            old = sign * term if old is None else old + sign * term
    return old
