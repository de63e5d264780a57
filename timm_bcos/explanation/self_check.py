"""An explanation held against itself: does it sum up, and is it of what the model computes?"""

from dataclasses import replace

import torch
from torch import Tensor

from ..dynamic_linear.bias_tracker import changed_constants
from ..dynamic_linear.violations import Violation
from .result import Explanation
from .run import ModelRun

__all__ = [
    "another_image",
    "compare_outputs",
    "compare_with_another_image",
    "incomplete",
    "tolerance",
]


def tolerance(dtype: torch.dtype) -> float:
    """Relative differences that sums of many numbers show: 4e-11 in float64, 2e-5 in float32, 1e-2 in float16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def compare_outputs(run: ModelRun, found: Tensor | None = None) -> list[Violation]:
    """Hold outputs in explanation mode against those outside of it, and a batch against its images in other company.

    Args:
        run: The model at its images.
        found: The outputs in explanation mode; None compares the plain outputs of the batch.
    """
    if found is not None and not _difference(run, found, run.apart, "shifted"):
        return []
    together = run.plain(run.image)
    violations = [] if found is None else _difference(run, found, together, "shifted")
    return violations or _difference(run, together, run.apart, "images")


def _difference(run: ModelRun, found: Tensor, expected: Tensor, kind: str) -> list[Violation]:
    if found.shape != expected.shape:
        return [Violation("", f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}", kind)]
    change, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if change <= tolerance(expected.dtype) * scale:
        return []
    if run.rounding is None:
        return [Violation("", f"by {change / scale if scale else change:.1e} of the largest", "random")]
    return [] if change <= 10 * run.rounding else [
        Violation("", f"by {change / scale if scale else change:.1e} of the largest", kind)
    ]  # fmt: skip


def another_image(image: Tensor, darkest: float = 0.0, brightest: float = 1.0) -> Tensor:
    """Images of the same shape that have nothing in common with these: half upside down, half noise.

    Args:
        image: (N, C, H, W).
        darkest: Of their values in [0, 1].
        brightest: Likewise.
    """
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    return darkest + (brightest - darkest) * (image.flip(-2, -1) + noise) / 2


def compare_with_another_image(run: ModelRun) -> list[Violation]:
    """Constants are the same for any image: run another one, and compare what was booked as constant.

    With a dark and a bright one, too, where a number, or what changes the image before it is read, may be the same for
    two by chance. None of them is of one color: a deviation of 0 tells nothing, and slopes at 0 are not those beside
    it.
    """
    others = [another_image(run.image)]
    if run.tracker.has_escaped or not all(boundary.is_direct for boundary in run.tracker.boundaries):
        others += [another_image(run.image, 0.01, 0.2), another_image(run.image, 0.8, 0.99)]
    found: list[Violation] = []
    for image in others:
        _, tracker, *_ = run.trace(image, names_places=True)
        found += changed_constants(run.tracker, tracker)
    return list(dict.fromkeys(found))


def incomplete(
    run: ModelRun, explanation: Explanation, shift: Tensor | None, violations: tuple[Violation, ...]
) -> Explanation:
    """The explanation with its violations; among them that it does not sum up, where it does not but for rounding.

    Args:
        run: The model at its images.
        explanation: Of it.
        shift: (N,) what the model gives outside of explanation mode, less what is explained; None where nobody knows.
        violations: Found so far.
    """
    size = explanation.contributions.abs().double().sum((1, 2, 3)) + explanation.bias.abs().double()
    allowed = tolerance(explanation.logits.dtype) * (size + explanation.logit.abs().double())
    figure = f"{explanation.completeness_error.max().item():.1e} is missing"
    found = _excess(run, explanation.remainder, allowed, "incomplete", figure)
    if shift is not None and not violations:
        found += _excess(run, shift, allowed, "shifted", f"by {shift.abs().max().item():.1e}")
    narrow = 10 * (run.rounding or 0.0) if run.is_narrow else 0.0
    return replace(explanation, violations=tuple(dict.fromkeys((*violations, *found))), rounding=narrow)


def _excess(run: ModelRun, error: Tensor, allowed: Tensor, kind: str, figure: str) -> list[Violation]:
    """A violation where an error (N,) is larger than allowed, and than rounding is in this model."""
    error = error.abs()
    if not bool(((error > allowed) | error.isnan()).any()):
        return []
    if run.rounding is None:
        return [Violation("", "with " + figure, "random")]
    return [] if error.max().item() <= 10 * run.rounding else [Violation("", figure, kind)]
