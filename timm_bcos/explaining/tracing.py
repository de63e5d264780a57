"""Modules one by one, in the order of execution: which of them is the first where something is wrong?"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..dynamic.account import Account
from ..dynamic.accounting import AccountingMode
from ..dynamic.mode import active, ordinary_autograd
from ..nn.modules import first_output, hooked
from .inputs import check_model
from .linear_parts import linear_part
from .linearised import is_encoding, rows_of
from .self_check import tolerance as rounding_of

__all__ = ["first_break", "first_dead", "first_difference"]

Extra = Mapping[str, object]
Outputs = list[tuple[str, Tensor]]


def first_break(model: nn.Module, x: Tensor, extra: Extra, tolerance: float) -> str | None:
    """The first module whose output is not W(x) · x + constants, or not the one outside of explanation mode.

    Args:
        model: A private copy, on which hooks may be registered.
        x: Images; the first one is taken.
        extra: Other arguments of the model.
        tolerance: Of sums, relative.

    Returns:
        Its path, '' for the root; None if there is none.
    """
    image = _image(model, x)[:1]
    own = rows_of(extra, slice(0, 1), len(x))
    plain = _traced_outputs(model, image, own)
    with ordinary_autograd(x.device):
        leaf = image.clone().requires_grad_()
        account = Account(model, 1, leaf)
        with active(AccountingMode(leaf, account)):
            found = _traced_outputs(model, leaf.clone(), own)
        for (name, output), (_, expected) in zip(found, plain, strict=False):
            is_shifted = output.shape != expected.shape or not _is_close(output.detach(), expected)
            if is_shifted or (output.requires_grad and not _adds_up(output, leaf, account, tolerance)):
                return name
    return None


def first_difference(model: nn.Module, x: Tensor, other: Tensor, rows: slice, extra: Extra) -> str | None:
    """The first module whose outputs for x, of which the rows are taken, are not those for another batch."""
    found = _traced_outputs(model, _image(model, x), extra)
    again = _traced_outputs(model, _image(model, other), rows_of(extra, rows, len(x)))
    for (name, output), (_, expected) in zip(found, again, strict=False):
        part = output[rows] if len(output) == len(x) else output
        if part.shape != expected.shape or not _is_close(part, expected):
            return name
    return None


def first_dead(model: nn.Module, x: Tensor, extra: Extra) -> str | None:
    """The first module whose output is 0 everywhere."""
    found = _traced_outputs(model, _image(model, x), extra)
    return next((name for name, output in found if not bool(output.any())), None)


def _image(model: nn.Module, x: Tensor) -> Tensor:
    channels = check_model(model).image_channels
    return (x[:, :channels] if is_encoding(x, channels) else x).detach()


def _traced_outputs(model: nn.Module, x: Tensor, extra: Extra) -> Outputs:
    """What each module returns; the values are kept as they were then."""
    outputs: Outputs = []
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: object, output: object) -> None:
        output = first_output(output)
        if isinstance(output, Tensor) and output.is_floating_point():
            outputs.append((names[module], output.clone()))

    with hooked(names, record):
        if x.requires_grad:
            model(x, **extra)
        else:
            with torch.no_grad():
                model(x.clone(), **extra)
    return outputs


def _is_close(output: Tensor, expected: Tensor) -> bool:
    return bool((output - expected).abs().max() <= 100 * rounding_of(output.dtype) * expected.abs().max())


def _adds_up(output: Tensor, leaf: Tensor, account: Account, tolerance: float) -> bool:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    expected = (output * direction).sum()
    part = linear_part(expected, leaf, account)
    encoded = torch.cat([leaf, 1 - leaf], 1)
    total = (part.weights * encoded).sum() + part.constant_bias.sum() + part.gate_bias.sum()
    return bool((total - expected).abs() <= tolerance * expected.abs().clamp_min((output * direction).norm()))
