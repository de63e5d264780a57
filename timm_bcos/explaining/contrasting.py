"""Why one class and not another: the difference of two rows of W(x), as exact as each of them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import TargetError
from .explanation import Explanation
from .forward import Targets, check_targets, explain_targets
from .inputs import check_images, check_model

__all__ = ["contrast"]


def contrast(model: nn.Module, x: Tensor, a: Targets, b: Targets) -> Explanation:
    """Explain the difference of two logits of each image: "why a, not b".

    Logits are linear in the encoded image, and so are their differences: row a minus row b of W(x) explains
    logit a − logit b exactly. One forward pass, and a backward pass for each of the two classes.

    Args:
        model: As in `explain`.
        x: As in `explain`.
        a: The class that is asked for: an int for all images, or N ints.
        b: The class that is asked against, given likewise; another than `a`.

    Returns:
        The explanation whose `target` is a and whose `versus` is b: `weights`, `bias`, `logit` and all that follows
        from them are differences, positive where they speak for a. A logit bias that the classes share cancels.

    Raises:
        InputError: As in `explain`.
        TargetError: For classes that do not exist, are no ints, or are the same.
        ModelStateError: As in `explain`.

    Example:
        >>> explanation = timm_bcos.contrast(model, images, a=281, b=282)
        >>> explanation.logit, explanation.completeness_error
    """
    check_images(x, check_model(model))
    table = torch.stack([_check_classes(name, value, len(x)) for name, value in (("a", a), ("b", b))], 1)
    same = table[table[:, 0] == table[:, 1]]
    if len(same):
        raise TargetError(f"a and b are both class {int(same[0, 0])}: give two different classes")
    return _difference(*explain_targets(model, x, table))


def _check_classes(name: str, value: Targets, images: int) -> Tensor:
    classes = check_targets(value, images, name)
    if classes is None:
        raise TargetError(f"{name}=None: give a class for it")
    return classes.cpu()


def _difference(a: Explanation, b: Explanation) -> Explanation:
    return replace(
        a,
        versus=b.target,
        weights=a.weights - b.weights,
        bias=a.bias - b.bias,
        constant_bias=a.constant_bias - b.constant_bias,
        defects=tuple(dict.fromkeys(a.defects + b.defects)),
        logit_bias=0.0,
    )
