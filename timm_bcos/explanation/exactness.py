"""Is a model's explanation exact? And if it is not, where does it break?"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import BiasTracker
from ..dynamic_linear.mode import active, ordinary_autograd
from ..dynamic_linear.tracking_mode import BiasTrackingMode
from ..dynamic_linear.violations import Violation
from ..errors import BcosError, InexactWarning, InputError
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.module_utils import channel_axis, converted_part, first_output, frozen_copy, hooked, image_size, pick_output
from ..nn.stems import BcosStem, ImageReader
from .api import explain
from .inputs import check_images, check_model, is_encoding, rows_of
from .linear_parts import linear_part
from .linearized import LinearizedModel
from .patches import StripModel, split_input
from .request import Request
from .self_check import another_image, compare_with_another_image
from .self_check import tolerance as rounding_of

__all__ = [
    "ExactnessReport",
    "calibrate",
    "check",
    "first_break",
    "first_dead",
    "first_difference",
    "random_image",
]

Extra = Mapping[str, object]
ModelOutputs = list[tuple[str, Tensor]]


def first_break(model: nn.Module, x: Tensor, extra: Extra, tolerance: float) -> str | None:
    """The first module whose output is not W(x) · x + constants, or not the one outside of explanation mode.

    Args:
        model: A private copy, on which hooks may be registered.
        x: Images, of which the first one is used.
        extra: Other arguments of the model.
        tolerance: Largest relative error of sums.

    Returns:
        Its path, '' for the root; None if there is none.
    """
    image = _image(model, x)[:1]
    own = rows_of(extra, slice(0, 1), len(x))
    plain = _traced_outputs(model, image, own)
    with ordinary_autograd(x.device):
        leaf = image.clone().requires_grad_()
        tracker = BiasTracker(model, 1, leaf)
        with active(BiasTrackingMode(leaf, tracker)):
            found = _traced_outputs(model, leaf.clone(), own)
        for (name, output), (_, expected) in zip(found, plain, strict=False):
            is_shifted = output.shape != expected.shape or not _is_close(output.detach(), expected)
            if is_shifted or (output.requires_grad and not _adds_up(output, leaf, tracker, tolerance)):
                return name
    return None


def first_difference(model: nn.Module, x: Tensor, other: Tensor, rows: slice, extra: Extra) -> str | None:
    """The first module whose outputs for some rows of x differ from those for another batch of these images."""
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


def _traced_outputs(model: nn.Module, x: Tensor, extra: Extra) -> ModelOutputs:
    """What each module returns; the values are kept as they were then."""
    outputs: ModelOutputs = []
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


def _adds_up(output: Tensor, leaf: Tensor, tracker: BiasTracker, tolerance: float) -> bool:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    expected = (output * direction).sum()
    part = linear_part(expected, leaf, tracker)
    encoded = torch.cat([leaf, 1 - leaf], 1)
    total = (part.weights * encoded).sum() + part.constant_bias.sum() + part.gate_bias.sum()
    return bool((total - expected).abs() <= tolerance * expected.abs().clamp_min((output * direction).norm()))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
PLACELESS = ("shifted", "images", "incomplete", "random", "dead")


@dataclass(frozen=True)
class ExactnessReport:
    """The verdict on a model.

    Attributes:
        completeness_error: Largest |Σ contributions + bias - logit| / |logit - logit bias| over the images.
        logit_shift: Largest change of a logit in explanation mode, relative to the largest logit.
        image_share: Smallest share of (logit - logit bias) that the image explains; the rest comes from constants.
        tolerance: Largest completeness error and logit shift of an exact explanation.
        rounding: Largest change of a logit when the image changes in its last digits, relative to the largest logit. A
            deep untrained model may amplify rounding a million times; a logit shift of that size is rounding.
        randomness: Largest change of a logit from one run to the next, relative to the largest logit.
        violations: Everything that makes explanations inexact, such as functions that are not known to be linear, and
            added values that depend on the image.
        breaks_at: Path of the first module whose output is not W(x) · x + constants; None if exact.
    """

    completeness_error: float
    logit_shift: float
    image_share: float
    tolerance: float
    rounding: float = 0.0
    randomness: float = 0.0
    violations: tuple[Violation, ...] = ()
    breaks_at: str | None = None

    @property
    def defects(self) -> tuple[Violation, ...]:
        """The violations, as earlier versions called them."""
        return self.violations

    @property
    def exact(self) -> bool:
        """Whether nothing is left unexplained.

        No violation, no randomness, a completeness error within the tolerance, and a logit shift within it or mere
        rounding.
        """
        return (
            not self.violations
            and self.randomness == 0
            and self.completeness_error <= self.tolerance
            and self.logit_shift <= max(self.tolerance, 10 * self.rounding)
        )


def check(
    model: nn.Module,
    x: Tensor | Mapping[str, Tensor] | None = None,
    *,
    tolerance: float | None = None,
    output: str | int | None = None,
    extra: Mapping[str, object] | None = None,
) -> ExactnessReport:
    """Measure whether explanations sum up to logits, and find computations that explanations cannot represent.

    Measured in float64, on a private copy, wherever the device and the model allow it: the faint signal of an untrained
    model may drown in float32's rounding. Every constant is compared with the one that another image gives, and a batch
    with its first image alone.

    Args:
        model: A B-cos model in evaluation mode. Let running statistics have a scale first (train it, or run it once
            in training mode): a model whose signal vanishes proves nothing.
        x: Images (N, C, H, W) in [0, 1], or a NaFlex input as in `explain`; None makes two random images of the model's
            input size.
        tolerance: None is 1e-10 for a model in float64, 1e-4 for one in float32 and 1e-2 for others.
        output: Key or index of the output, as in `explain`. In a map, the position with the strongest class is checked.
        extra: Other arguments of the model, by name, as in `explain`.

    Returns:
        The verdict; where it is not exact, with the first module, in the order of execution, that breaks it.

    Raises:
        InputError: For tensors that are not images.
        ModelStateError: For a model in training mode, or one that is not a B-cos model.
    """
    with torch.inference_mode(False):
        stem = check_model(model)
        images, rest, patches = split_input(model, x, extra)
        model = frozen_copy(getattr(model, "_orig_mod", model))
        if patches is None:
            return _check(model, stem, images, tolerance, output, rest)
        return _unwrapped(_check(StripModel(model, patches), stem, images, tolerance, output, rest))


def _unwrapped(report: ExactnessReport) -> ExactnessReport:
    """The report on the only child of a model, named `model`."""
    violations = (replace(v, module=v.module.removeprefix("model").removeprefix(".")) for v in report.violations)
    breaks_at = report.breaks_at and (report.breaks_at.removeprefix("model").removeprefix(".") or "(root)")
    return replace(report, violations=tuple(dict.fromkeys(violations)), breaks_at=breaks_at)


def _check(
    model: nn.Module,
    stem: BcosStem | ImageReader,
    x: object,
    tolerance: float | None,
    output: str | int | None,
    extra: dict[str, object],
) -> ExactnessReport:
    """The verdict on a private copy of a model, whose original is read by `stem`."""
    if x is None:
        image = random_image(stem.image_channels, image_size(model)).to(stem.weight.device)
        x = image if extra else torch.cat([image, another_image(image)])
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(f"expected a tensor of pixels in [0, 1], got {getattr(x, 'dtype', type(x).__name__)}")
    check_images(x, stem)
    if tolerance is None:
        tolerance = TOLERANCE.get(stem.weight.dtype, 1e-2)
    if stem.weight.device.type != "mps":
        model, x, extra = _widened(model, x, extra, output)
    verdict = _measure(model, x, tolerance, output, extra)
    return verdict if verdict.exact else _placed(model, verdict, x, output, extra)


def _widened(
    model: nn.Module, x: Tensor, extra: dict[str, object], output: str | int | None
) -> tuple[nn.Module, Tensor, dict[str, object]]:
    """The model, its images and other arguments in float64; as they are if the model has parts that stay narrow."""
    dtypes = {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
    own = next(t.dtype for t in model.parameters())
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in extra.items()}
    try:
        _outputs(model.double(), x.detach().double(), output, wide)
    except (RuntimeError, BcosError):
        model.to(own)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(dtypes[name])
        return model, x.detach().to(own), extra
    return model, x.detach().double(), wide


def _measure(model: nn.Module, x: Tensor, tolerance: float, output: str | int | None, extra: Extra) -> ExactnessReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactWarning)  # the verdict says it
        explanation = explain(model, x, output=output, extra=extra)
        request = Request(output=output, extra=rows_of(extra, slice(0, 1), len(x)))
        first = LinearizedModel(model, x[:1], request, checks=False)
        changed = first.with_inplace_fallback(lambda: compare_with_another_image(first))
    logits = partial(_logits, model, output=output, position=explanation.position, extra=extra)
    image = x[:, : x.shape[1] // 2] if is_encoding(x, check_model(model).image_channels) else x
    plain, again = logits(image), logits(image)
    signal = explanation.logit - explanation.logit_bias
    violations = [*explanation.violations, *changed]
    if not bool((plain - explanation.logit_bias).any()):
        violations.append(Violation("", "untrained or broken", "dead"))
    randomness = _distance(again, plain)
    if randomness:
        violations.append(Violation("", f"by {randomness:.1e} of the largest", "random"))
    return ExactnessReport(
        completeness_error=explanation.completeness_error.max().item(),
        logit_shift=_distance(explanation.logits, plain),
        image_share=(explanation.contributions.sum((1, 2, 3)) / signal).min().item(),
        tolerance=tolerance,
        rounding=_distance(logits(_with_other_last_digits(image)), plain),
        randomness=randomness,
        violations=tuple(dict.fromkeys(violations)),
    )


def _placed(
    model: nn.Module, verdict: ExactnessReport, x: Tensor, output: str | int | None, extra: Extra
) -> ExactnessReport:
    """The verdict with the first module that is to blame, in `breaks_at` and in violations that name none."""
    found = next((v.module for v in verdict.violations if v.kind not in PLACELESS), None)
    kinds = {violation.kind for violation in verdict.violations}
    place = found
    if place is None and "dead" in kinds:
        place = first_dead(model, x, extra)
    if place is None and "random" in kinds:
        place = first_difference(model, x, x, slice(None), extra)
    if place is None and "images" in kinds:
        place = first_difference(model, x, x[:1], slice(0, 1), extra)
    if place is None:
        place = first_break(model, x, extra, verdict.tolerance)
    if place is None and verdict.exact is False:
        place = ""
    named = [replace(v, module=place or "") if v.kind in PLACELESS else v for v in verdict.violations]
    return replace(verdict, violations=tuple(dict.fromkeys(named)), breaks_at=place or "(root)")


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor, output: str | int | None, extra: Extra) -> Tensor:
    channels = check_model(model).image_channels
    image = x[:, :channels] if is_encoding(x, channels) else x
    found: Tensor = pick_output(model(image.clone(), **extra), output, "the model")
    return found


def _logits(model: nn.Module, x: Tensor, output: str | int | None, position: Tensor | None, extra: Extra) -> Tensor:
    """(N, K) outputs, of maps at the positions (N, 2)."""
    found = _outputs(model, x, output, extra)
    if position is None:
        return found
    part = converted_part(model)
    maps = found.movedim(channel_axis(model, found, part), 1)
    maps = maps[:, :, None] if maps.ndim == 3 else maps
    return maps[torch.arange(len(maps), device=maps.device), :, position[:, 0], position[:, 1]]


def _distance(logits: Tensor, reference: Tensor) -> float:
    change = (logits - reference).abs().max()
    return 0.0 if change == 0 else (change / reference.abs().max()).item()


def _with_other_last_digits(x: Tensor) -> Tensor:
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) < 0.5
    return x * (1 + torch.finfo(x.dtype).eps * (2 * up.to(x.dtype) - 1))


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Give an untrained model the running statistics of x, and logits that differ from their bias by about 1.

    Untrained B-cos models answer so faintly that beside the logit bias nothing is left to compare. Not for a model
    whose weights mean something.

    Args:
        model: Any model, plain ones included. Its temperatures and running statistics change; it ends in evaluation
            mode.
        x: Images that it takes.
    """
    momenta = {m: m.momentum for m in model.modules() if isinstance(getattr(m, "momentum", None), float)}
    with torch.no_grad():
        try:
            for module in momenta:
                module.momentum = 1.0  # type: ignore[assignment]
            model.train()(torch.cat([x, x.flip(-1)]))
        finally:
            for module, momentum in momenta.items():
                module.momentum = momentum
            model.eval()
        heads = [m for m in model.modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
        if heads:
            strength = (first_output(model(x)) - heads[-1].logit_bias).abs().max().item()
            for head in heads:
                head.temperature *= strength or 1.0
    return model


def random_image(channels: int, size: Sequence[int]) -> Tensor:
    """(1, channels, *size) smooth noise, which models answer as they answer photos, unlike white noise."""
    coarse = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, tuple(size), mode="bilinear").clamp(0, 1)
