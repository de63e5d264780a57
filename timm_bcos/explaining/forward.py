"""Exact explanations: rows of the linear map that a B-cos network is for its input, logits = W(x) · x + constants.

Papers: https://arxiv.org/abs/2205.10268 (section 3.2), https://arxiv.org/abs/2306.10898 (section 3.1).
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..dynamic.account import AmbiguousBatch
from ..dynamic.mode import paused
from ..errors import InexactWarning, InputError, TargetError
from .explanation import Explanation
from .inputs import check_images, check_model
from .linearised import Linearised

__all__ = ["Targets", "check_targets", "explain", "explain_targets"]

Targets = int | Sequence[int] | Tensor | None
Position = int | tuple[int, int] | None


def explain(
    model: nn.Module,
    x: Tensor,
    target: Targets = None,
    *,
    layer: str | None = None,
    position: Position = None,
    chunk: int | None = None,
) -> Explanation:
    """Explain one output per image, with one forward and one backward pass for the whole batch.

    Nothing of the model is changed, not even for the moment: other threads may use it meanwhile.

    Args:
        model: A B-cos network in evaluation mode.
        x: Images (N, C, H, W) in [0, 1], without mean/std normalisation, or already encoded (N, 2C, H, W). Unchanged.
        target: The class: None for the prediction, an int for all images, or N ints. With `layer`, the unit (channel);
            None takes the one that is most active.
        layer: Path of an inner module, as in `model.named_modules()`, to explain one of its neurons.
        position: The neuron's (row, column), or index for token sequences; None takes where the unit is most active.
        chunk: Images per pass, which bounds the memory that a large batch takes; None takes all at once.

    Returns:
        The explanation. Its `defects` are empty if it is exact.

    Raises:
        InputError: For tensors that are no images as above.
        TargetError: For a class, layer, unit or position that does not exist.
        ModelStateError: For a model in training mode, or one that is no B-cos network.

    Warns:
        InexactWarning: If the network has parts that are not dynamic linear.

    Examples:
        >>> explanation = timm_bcos.explain(model, transform(photo)[None])
        >>> explanation.completeness_error, explanation.contribution_map
    """
    check_images(x, check_model(model))
    units = check_targets(target, len(x))

    def ask(part: Linearised, images: slice) -> list[Explanation]:
        return [part.explain(None if units is None else units[images], position)]

    return _explain_all(model, x, layer, ask, chunk)[0]


def explain_targets(
    model: nn.Module,
    x: Tensor,
    targets: Sequence[Sequence[int]] | Tensor | None = None,
    *,
    top: int = 3,
    chunk: int | None = None,
) -> list[Explanation]:
    """Explain several classes of each image with one forward pass, and a backward pass for all of them together.

    Args:
        model: As in `explain`.
        x: As in `explain`.
        targets: (N, T) classes; None takes the `top` most probable ones of each image, best first.
        top: T where `targets` is None.
        chunk: As in `explain`.

    Returns:
        T explanations, one per column of `targets`.
    """
    check_images(x, check_model(model))
    table = None if targets is None else _check_table(targets, len(x))

    def ask(part: Linearised, images: slice) -> list[Explanation]:
        columns = part.best_classes(top) if table is None else table[images]
        return part.explain_classes(columns)

    return _explain_all(model, x, None, ask, chunk)


Ask = Callable[[Linearised, slice], list[Explanation]]


def _explain_all(model: nn.Module, x: Tensor, layer: str | None, ask: Ask, chunk: int | None) -> list[Explanation]:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk={chunk!r}: give the number of images per pass, at least 1, or None for all")
    size = chunk or len(x)
    with paused():
        parts = [_explain_chunk(model, x, layer, ask, slice(i, i + size)) for i in range(0, len(x), size)]
    found = parts[0] if len(parts) == 1 else [Explanation.stack(column) for column in zip(*parts, strict=True)]
    for defect in dict.fromkeys(defect for explanation in found for defect in explanation.defects):
        warnings.warn(f"the explanation is not exact: {defect}", InexactWarning, stacklevel=4)
    return found


def _explain_chunk(model: nn.Module, x: Tensor, layer: str | None, ask: Ask, images: slice) -> list[Explanation]:
    """All at once, or image by image where a tensor's layout does not tell what is of which image."""
    try:
        found = ask(Linearised(model, x[images], layer), images)
        is_mixed = any(map(_is_mixed, found))
    except AmbiguousBatch:
        is_mixed = True
    places = range(*images.indices(len(x)))
    if is_mixed and len(places) > 1:
        singles = [ask(Linearised(model, x[i : i + 1], layer), slice(i, i + 1)) for i in places]
        found = [Explanation.stack(column) for column in zip(*singles, strict=True)]
    return found


def _is_mixed(explanation: Explanation) -> bool:
    """Whether constants add up for the batch, but were booked to the wrong images."""
    total = explanation.contributions.double().sum((1, 2, 3)) + explanation.bias.double()
    error = total - explanation.logit.double()
    return bool(explanation.completeness_error.max() > 1e-4 and error.sum().abs() < 1e-2 * error.abs().sum())


def check_targets(target: object, images: int, name: str = "target") -> Tensor | None:
    """(N,) classes or units; None for the strongest. Errors call the argument `name`."""
    if target is None:
        return None
    units = _integers(target)
    if units is None or units.ndim > 1 or (units.ndim == 1 and len(units) != images):
        raise TargetError(f"{name}={target!r}: give an int, or one int for each of the {images} images")
    return units.expand(images)


def _check_table(targets: object, images: int) -> Tensor:
    table = _integers(targets)
    if table is None or table.ndim != 2 or len(table) != images:
        shape = f"of shape {tuple(table.shape)}" if table is not None else repr(targets)
        raise TargetError(f"targets {shape}: give {images} rows (one per image) of classes")
    return table


def _integers(values: object) -> Tensor | None:
    """As a tensor of int64; None for what are no whole numbers."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
    return tensor.detach().long() if is_whole else None
