"""Checks made at each explanation: does it sum up, and is it of what the model computes?"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dynamic_linear.bias_tracker import changed_constants
from ..dynamic_linear.violations import Violation
from .result import Explanation
from .run import ModelRun

__all__ = [
    "add_violations",
    "another_image",
    "compare_outputs",
    "compare_with_another_image",
    "tolerance",
]


def tolerance(dtype: torch.dtype) -> float:
    """Relative differences that sums of many numbers show: 4e-11 in float64, 2e-5 in float32, 1e-2 in float16."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def compare_outputs(run: ModelRun, found: Tensor | None = None) -> list[Violation]:
    """Compare outputs in explanation mode with those outside of it, and a batch with the same images in other batches.

    Args:
        run: Run of the model on its images.
        found: Outputs in explanation mode; None compares the plain outputs of the batch only.
    """
    if found is not None and not _difference(run, found, run.plain_output_in_parts, "shifted"):
        return []
    together = run.plain_output(run.image)
    violations = [] if found is None else _difference(run, found, together, "shifted")
    return violations or _difference(run, together, run.plain_output_in_parts, "images")


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
        darkest: Smallest value of the new images, in [0, 1].
        brightest: Largest value of the new images, in [0, 1].
    """
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    return darkest + (brightest - darkest) * (image.flip(-2, -1) + noise) / 2


SPOTS = 4


def _spots(image: Tensor, seed: int) -> Tensor:
    """Images of the same shape with large spots of random colors, which differ from each other as photos do."""
    coarse = torch.rand(*image.shape[:2], 3, 3, generator=torch.Generator().manual_seed(seed))
    tint = torch.rand(*image.shape[:2], 1, 1, generator=torch.Generator().manual_seed(seed))
    spots = F.interpolate((coarse + tint) / 2, image.shape[2:], mode="bilinear")
    return (0.02 + 0.96 * spots).to(image)


def compare_with_another_image(run: ModelRun) -> list[Violation]:
    """Run the model on another image, and find supposed constants that differ: constants are the same for any image.

    Where a number taken from the image, or a change of it before it is read, may agree for two images by chance, a dark
    and a bright image and several of large colored spots are tried, too. No image is of a single color, because a
    deviation of 0 and slopes at 0 are special cases.
    """
    others = [another_image(run.image)]
    if run.tracker.has_escaped or not all(boundary.is_direct for boundary in run.tracker.boundaries):
        others += [another_image(run.image, 0.01, 0.2), another_image(run.image, 0.8, 0.99)]
    if run.tracker.has_escaped:
        others += [_spots(run.image, seed) for seed in range(SPOTS)]
    found: list[Violation] = []
    for image in others:
        _, tracker, *_ = run.forward(image, names_places=True)
        found += changed_constants(run.tracker, tracker)
    return list(dict.fromkeys(found))


def add_violations(
    run: ModelRun, explanation: Explanation, shift: Tensor | None, violations: tuple[Violation, ...]
) -> Explanation:
    """Add violations to an explanation; among them, that it does not sum up, if more than rounding is missing.

    Args:
        run: Run of the model on its images.
        explanation: Explanation of the run.
        shift: Output outside of explanation mode minus the explained output (N,); None if it is unknown.
        violations: Violations found so far.
    """
    size = explanation.contributions.abs().double().sum((1, 2, 3)) + explanation.bias.abs().double()
    allowed = tolerance(explanation.logits.dtype) * (size + explanation.logit.abs().double())
    figure = f"{explanation.completeness_error.max().item():.1e} is missing"
    found = _excess(run, explanation.remainder, allowed, "incomplete", figure)
    if shift is not None and not violations:
        found += _excess(run, shift, allowed, "shifted", f"by {shift.abs().max().item():.1e}")
    rounding = run.rounding if run.has_reduced_precision else None
    known = 0.0 if rounding is None or not math.isfinite(rounding) else 10 * rounding  # NaN if an output is
    return replace(explanation, violations=tuple(dict.fromkeys((*violations, *found))), rounding=known)


def _excess(run: ModelRun, error: Tensor, allowed: Tensor, kind: str, figure: str) -> list[Violation]:
    """A violation where an error (N,) is larger than allowed, and than rounding is in this model."""
    error = error.abs()
    if not bool(((error > allowed) | error.isnan()).any()):
        return []
    if run.rounding is None:
        return [Violation("", "with " + figure, "random")]
    return [] if error.max().item() <= 10 * run.rounding else [Violation("", figure, kind)]
