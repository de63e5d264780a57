"""Exact explanations: rows of the linear map that a B-cos model is for its input, logits = W(x) · x + constants.

Papers: https://arxiv.org/abs/2205.10268 (section 3.2), https://arxiv.org/abs/2306.10898 (section 3.1).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import AmbiguousBatch
from ..dynamic_linear.violations import Violation
from ..errors import InexactWarning, InputError, TargetError
from .inputs import Layer, check_images, check_model, layer_path
from .linearized import LinearizedModel
from .patches import split_input
from .regions import Position, Region
from .request import Request, Target, Targets, check_table, check_target
from .result import Explanation

__all__ = [
    "contrast",
    "explain",
    "explain_targets",
    "warn_if_inexact",
    "with_single_image_fallback",
]


Input = Tensor | Mapping[str, Tensor]


def explain(
    model: nn.Module,
    x: Input,
    target: Targets = None,
    *,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
    chunk: int | None = None,
) -> Explanation:
    """Explain one output per image, with one forward and one backward pass for the whole batch.

    The model is not changed, not even temporarily: other threads may use it meanwhile.

    Args:
        model: A B-cos model in evaluation mode.
        x: Images (N, C, H, W) in [0, 1], without mean/std normalization, or already encoded (N, 2C, H, W). Unchanged.
            For a NaFlex model also a dict of `patches` (N, L, P · P · C) in [0, 1], `patch_coord` and `patch_valid`:
            the patches are then the image, as a strip (N, C, L · P, P) of patches below each other (`fold_patches`).
        target: The class: None for the prediction, an int for all images, or N ints. A set of ints: the mean of their
            logits. A floating-point tensor (K,) or (N, K): a direction, whose product with the K outputs is explained.
            With `layer`, units (channels) instead of classes; None takes the one that is most active.
        layer: Inner module, or its path as in `model.named_modules()`, to explain one of its neurons.
        output: Key or index of the output, if the model (or the layer) returns more than one; None takes the first.
        position: Position in the map that a layer or the model returns: a (row, column), the index of a token, or a
            pair for each image, as in `Explanation.position`. None takes the position where the target is largest.
        region: The mean over a part of the map instead: a mask (H, W) or (N, H, W) of weights, at the size of the
            image or of the map; or a box (left, top, right, bottom) in pixels of the image, or N boxes. A tensor (N, 4)
            that is not boolean holds boxes.
        extra: Other arguments that the model's forward takes, by name. Tensors with N rows are taken image by image.
            What they add is a constant of the explanation; the image alone is explained.
        chunk: Images per pass, which bounds the memory that a large batch takes; None takes all at once.

    Returns:
        The explanation. Its `violations` are empty if it is exact.

    Raises:
        InputError: For tensors that are not images.
        TargetError: For a class, layer, output, unit, position or region that does not exist.
        ModelStateError: For a model in training mode, or one that is not a B-cos model.

    Warns:
        InexactWarning: If the model has parts that are not dynamic linear.

    Examples:
        >>> explanation = timm_bcos.explain(model, transform(photo)[None])
        >>> explanation.completeness_error, explanation.contribution_map
    """
    with torch.inference_mode(False):
        x, given = _check_input(model, x, layer, output, position, region, extra)
        request = Request.checked(x, check_target(target, len(x)), **given)
        return _explain(model, x, request, chunk)


def _check_input(
    model: nn.Module,
    x: object,
    layer: Layer,
    output: str | int | None,
    position: Position,
    region: Region,
    extra: Mapping[str, object] | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The images, and the arguments of `Request.checked`, of what a user has given."""
    stem = check_model(model)
    given, rest, patches = split_input(model, x, extra)
    image = check_images(given, stem)
    names = dict(layer=layer_path(model, layer), output=output, patches=patches)
    return image, dict(names, position=position, region=region, extra=rest)


def _explain(model: nn.Module, x: Tensor, request: Request, chunk: int | None) -> Explanation:
    def run(images: slice) -> list[Explanation]:
        part = request.of_images(images)
        return [LinearizedModel(model, x[images], part).explain(part)]

    return _in_chunks(run, len(x), chunk, callers=3)[0]


def explain_targets(
    model: nn.Module,
    x: Input,
    targets: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    top: int = 3,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
    chunk: int | None = None,
) -> list[Explanation]:
    """Explain several classes of each image with one forward pass, and a backward pass for all of them together.

    Args:
        model: As in `explain`.
        x: As in `explain`.
        targets: T classes for all images, or N rows of T classes, one row per image. A flat sequence always means the
            same classes for all images, even if it has N entries; for one class per image, use `explain`. None takes
            the `top` most probable classes of each image, best first.
        top: T where `targets` is None.
        layer: As in `explain`; targets are then its units.
        output: As in `explain`.
        position: As in `explain`; None takes the position where each class is largest.
        region: As in `explain`.
        extra: As in `explain`.
        chunk: As in `explain`.

    Returns:
        T explanations, one per class (column of `targets`).

    Raises:
        InputError: As in `explain`.
        TargetError: For targets of another shape, and as in `explain`.
        ModelStateError: As in `explain`.

    Example:
        >>> cats, dogs = timm_bcos.explain_targets(model, images, [281, 207])
    """
    with torch.inference_mode(False):
        image, given = _check_input(model, x, layer, output, position, region, extra)
        request = Request.checked(image, None, **given)
        table = None if targets is None else check_table(targets, len(image))

    def run(images: slice) -> list[Explanation]:
        part = request.of_images(images)
        model_run = LinearizedModel(model, image[images], part)
        classes = model_run.best_classes(top, part) if table is None else table[images]
        return model_run.explain_classes(classes, part)

    return _in_chunks(run, len(image), chunk, callers=2)


T = TypeVar("T")
Explain = Callable[[slice], list[Explanation]]


def _in_chunks(explain: Explain, count: int, chunk: int | None, callers: int) -> list[Explanation]:
    """Explain chunk by chunk; warnings name the line that called the function `callers` above."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, Integral) or chunk < 1):
        raise InputError(f"chunk={chunk!r}: give the number of images per pass, at least 1, or None for all")
    size = count if chunk is None else int(chunk)
    with torch.inference_mode(False):
        parts = [_explain_chunk(explain, range(i, min(i + size, count))) for i in range(0, count, size)]
    found = parts[0] if len(parts) == 1 else [Explanation.stack(column) for column in zip(*parts, strict=True)]
    warn_if_inexact(found, callers + 1)
    return found


def warn_if_inexact(found: Sequence[Explanation], callers: int) -> None:
    """Warn of each violation once; warnings name the line that called the function `callers` above this one."""
    for violation in dict.fromkeys(violation for explanation in found for violation in explanation.violations):
        warnings.warn(f"the explanation is not exact: {violation}", InexactWarning, stacklevel=callers + 1)


def _explain_chunk(explain: Explain, images: range) -> list[Explanation]:
    def stack(singles: Sequence[list[Explanation]]) -> list[Explanation]:
        return [Explanation.stack(column) for column in zip(*singles, strict=True)]

    def with_violations(found: list[Explanation], violations: tuple[Violation, ...]) -> list[Explanation]:
        return [replace(e, violations=tuple(dict.fromkeys((*e.violations, *violations)))) for e in found]

    return with_single_image_fallback(explain, images, lambda found: found, stack, with_violations)


def with_single_image_fallback(
    find: Callable[[slice], T], images: range, explanations: Callable[[T], Sequence[Explanation]],
    stack: Callable[[Sequence[T]], T], with_violations: Callable[[T, tuple[Violation, ...]], T],
) -> T:  # fmt: skip
    """Explain all images at once, or one by one if the layout of a tensor does not show which part is of which image.

    Args:
        find: Function that computes a result for some of the images.
        images: Range of all images.
        explanations: Function that returns the explanations in a result.
        stack: Function that joins the results of single images.
        with_violations: Function that adds violations, which only the batch has shown, to a result.
    """
    violations: tuple[Violation, ...] = ()
    try:
        found = find(slice(images.start, images.stop))
    except AmbiguousBatch as signal:
        violations = signal.violations  # single images are never ambiguous
    else:
        seen = [violation for explanation in explanations(found) for violation in explanation.violations]
        if len(images) == 1 or not any(violation.kind == "incomplete" for violation in seen):
            return found
        violations = tuple(violation for violation in seen if violation.kind == "images")
    return with_violations(stack([find(slice(i, i + 1)) for i in images]), violations)


def contrast(
    model: nn.Module,
    x: Input,
    a: Targets,
    b: Targets,
    *,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
    chunk: int | None = None,
) -> Explanation:
    """Explain the difference of two outputs of each image: "why a, not b".

    Outputs are linear in the encoded image, and so are their differences: row a minus row b of W(x) explains
    logit a − logit b exactly, with one forward and one backward pass.

    Args:
        model: As in `explain`.
        x: As in `explain`.
        a: Class whose logit is explained: an int for all images, or N ints; a set of ints for the mean of their logits
            (all dogs), or a direction, as in `explain`.
        b: Class, set or direction whose logit is subtracted, in the same format; different from `a`.
        layer: As in `explain`; a and b are then its units.
        output: As in `explain`.
        position: As in `explain`; None takes where the difference is largest.
        region: As in `explain`.
        extra: As in `explain`.
        chunk: As in `explain`.

    Returns:
        The explanation of the difference: `weights`, `bias`, `logit` and all that follows from them are positive where
        they speak for a. Of two classes, its `target` is a and its `versus` is b; else its `direction` is the
        difference. A logit bias that the classes share cancels.

    Raises:
        InputError: As in `explain`.
        TargetError: For classes that do not exist, are not ints, or are the same, and as in `explain`.
        ModelStateError: As in `explain`.

    Example:
        >>> explanation = timm_bcos.contrast(model, images, a=281, b=282)
        >>> explanation.logit, explanation.completeness_error
        >>> dogs_not_cats = timm_bcos.contrast(model, images, set(range(151, 269)), set(range(281, 286)))
    """
    with torch.inference_mode(False):
        x, given = _check_input(model, x, layer, output, position, region, extra)
        first, second = (_check_side(name, value, len(x)) for name, value in (("a", a), ("b", b)))
        _refuse_same(first, second)
        return _explain(model, x, Request.checked(x, first, second, **given), chunk)


def _check_side(name: str, value: Targets, images: int) -> Target:
    asked = check_target(value, images, name)
    if asked is None:
        raise TargetError(f"{name}=None: give a class for it")
    return asked.cpu() if isinstance(asked, Tensor) else asked


def _refuse_same(a: Target, b: Target) -> None:
    if isinstance(a, frozenset) or isinstance(b, frozenset):
        if a == b:
            raise TargetError(f"a and b are both the classes {set(a or ())}: give two different sets")
        return
    if a is None or b is None or a.is_floating_point() or b.is_floating_point():
        return
    same = a[a == b]
    if len(same):
        raise TargetError(f"a and b are both class {int(same[0])}: give two different classes")
