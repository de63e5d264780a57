"""Why one class and not another: the difference of rows of W(x), as exact as each of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .explanation import Explanation
from .forward import check_place, explain_readout
from .inputs import check_images, check_model
from .places import Position, Region
from .targets import Asked, Targets, check_target

__all__ = ["contrast"]


def contrast(
    model: nn.Module,
    x: Tensor,
    a: Targets,
    b: Targets,
    *,
    layer: str | None = None,
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
        a: The class that is asked for: an int for all images, or N ints; a set of ints for the mean of their logits
            (all dogs), or a direction, as in `explain`.
        b: The class, set or direction that is asked against, given likewise; another than `a`.
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
        TargetError: For classes that do not exist, are no ints, or are the same, and as in `explain`.
        ModelStateError: As in `explain`.

    Example:
        >>> explanation = timm_bcos.contrast(model, images, a=281, b=282)
        >>> explanation.logit, explanation.completeness_error
        >>> dogs_not_cats = timm_bcos.contrast(model, images, set(range(151, 269)), set(range(281, 286)))
    """
    with torch.inference_mode(False):
        check_images(x, check_model(model))
        first, second = (_check_side(name, value, len(x)) for name, value in (("a", a), ("b", b)))
        _refuse_same(first, second)
        place = check_place(position, region, x)
        return explain_readout(model, x, first, second, place, layer=layer, output=output, extra=extra, chunk=chunk)


def _check_side(name: str, value: Targets, images: int) -> Asked:
    asked = check_target(value, images, name)
    if asked is None:
        raise TargetError(f"{name}=None: give a class for it")
    return asked.cpu() if isinstance(asked, Tensor) else asked


def _refuse_same(a: Asked, b: Asked) -> None:
    if isinstance(a, frozenset) or isinstance(b, frozenset):
        if a == b:
            raise TargetError(f"a and b are both the classes {set(a or ())}: give two different sets")
        return
    if a is None or b is None or a.is_floating_point() or b.is_floating_point():
        return
    same = a[a == b]
    if len(same):
        raise TargetError(f"a and b are both class {int(same[0])}: give two different classes")
