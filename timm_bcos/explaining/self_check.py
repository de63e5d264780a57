"""An explanation held against itself: does it sum up, and is it of what the model computes?"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dynamic.account import changed_constants
from ..dynamic.defects import Defect
from .explanation import Explanation

if TYPE_CHECKING:
    from .linearised import Linearised

__all__ = [
    "Rounding",
    "another_image",
    "compare_outputs",
    "compare_with_another_image",
    "incomplete",
    "tolerance",
]


def tolerance(dtype: torch.dtype) -> float:
    """Relative differences that sums of many numbers show: 4e-11 in float64, 2e-5 in float32, 1e-2 in float16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


class Rounding:
    """What a change of the image in its last digits does to the outputs: measured when it is asked for.

    A deep untrained model may amplify rounding a million times.

    Args:
        outputs: Of images, outside of explanation mode.
        image: The images.

    Attributes:
        eps: Of the narrowest type on the image's path.
    """

    def __init__(self, outputs: Callable[[Tensor], Tensor], image: Tensor) -> None:
        self._outputs, self._image = outputs, image
        self.eps = torch.finfo(image.dtype).eps

    @property
    def is_narrow(self) -> bool:
        """Whether a part of the model computes in a narrower type than its input's."""
        return self.eps > torch.finfo(self._image.dtype).eps

    @cached_property
    def largest(self) -> float:
        """Largest change of an output."""
        up = torch.rand(self._image.shape, generator=torch.Generator().manual_seed(0)).to(self._image) < 0.5
        other = self._image * (1 + self.eps * (2 * up.to(self._image.dtype) - 1))
        return (self._outputs(other) - self._outputs(self._image)).abs().max().item()


def compare_outputs(run: "Linearised", found: Tensor | None = None) -> list[Defect]:
    """Hold outputs in explanation mode against those outside of it, and a batch against its images in other company.

    Args:
        run: The model at its images.
        found: The outputs in explanation mode; None compares the plain outputs of the batch.
    """
    apart = _apart(run)
    if found is not None and not _difference(found, apart, run.rounding, "shifted"):
        return []
    together = run.plain(run.image)
    defects = [] if found is None else _difference(found, together, run.rounding, "shifted")
    return defects + _difference(together, apart, run.rounding, "images")


def _apart(run: "Linearised") -> Tensor:
    """The plain outputs of the first image alone, and of the others without it."""
    if len(run.image) == 1:
        return run.plain(run.image)
    return torch.cat([run.plain(run.image, slice(0, 1)), run.plain(run.image, slice(1, None))])


def _difference(found: Tensor, expected: Tensor, rounding: Rounding, kind: str) -> list[Defect]:
    if found.shape != expected.shape:
        return [Defect("", f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}", kind)]
    change, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if change <= tolerance(expected.dtype) * scale or change <= 10 * rounding.largest:
        return []
    return [Defect("", f"by {change / scale if scale else change:.1e} of the largest", kind)]


def another_image(image: Tensor) -> Tensor:
    """Images of the same shape that have nothing in common with these, but look alike: half upside down, half noise."""
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    return (image.flip(-2, -1) + noise) / 2


def compare_with_another_image(run: "Linearised") -> list[Defect]:
    """Constants are the same for any image: run another one, and compare what was booked as constant.

    Where numbers have left torch, with three others: a number may happen to be the same for two images.
    """
    others = [another_image(run.image)]
    if run.account.has_escaped:
        others += [torch.zeros_like(run.image), torch.ones_like(run.image)]
    found: list[Defect] = []
    for image in others:
        _, account, *_ = run._pass(image, names_places=True)
        found += changed_constants(run.account, account)
    return list(dict.fromkeys(found))


def incomplete(explanation: Explanation, defects: tuple[Defect, ...], rounding: Rounding) -> Explanation:
    """The explanation with its defects; among them that it does not sum up, where it does not but for rounding."""
    error = explanation.remainder.abs()
    size = explanation.contributions.abs().double().sum((1, 2, 3)) + explanation.bias.abs().double()
    excess = error > tolerance(explanation.logits.dtype) * (size + explanation.logit.abs().double())
    if bool((excess | error.isnan()).any()) and not error.max().item() <= 10 * rounding.largest:
        figure = f"{explanation.completeness_error.max().item():.1e} is missing"
        defects = (*defects, Defect("", figure, "incomplete"))
    return replace(
        explanation,
        defects=tuple(dict.fromkeys(defects)),
        rounding=10 * rounding.largest if rounding.is_narrow else 0.0,
    )
