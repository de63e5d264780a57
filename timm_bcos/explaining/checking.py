"""Is a network's explanation exact? And if it is not, where does it break?"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..dynamic.account import Account, Defect
from ..dynamic.mode import DynamicLinearMode, active
from ..errors import InexactWarning, InputError
from ..nn.channels import channel_axis
from ..nn.functional import encode_image
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.modules import first_output, frozen_copy, hooked, pick_output
from .forward import explain, extra_of_images
from .inputs import check_model
from .linearised import linear_part

__all__ = ["Check", "check", "random_image", "settle"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Check:
    """The verdict on a network.

    Attributes:
        completeness_error: Largest |Σ contributions + bias - logit| / |logit - logit bias| over the images.
        logit_shift: Largest change of a logit in explanation mode, relative to the largest logit.
        image_share: Smallest share of (logit - logit bias) that the image explains; the rest comes from constants.
        tolerance: What both errors are held against.
        rounding: What a change of the image in its last digit does to the logits, relative to the largest. A deep
            untrained network may amplify rounding a million times; a logit shift of that size is none.
        randomness: Largest change of a logit from one run to the next, relative to the largest logit.
        defects: Functions that are not known to be linear, and values that depend on the image and are added.
        breaks_at: Path of the first module whose output is not W(x) · x + constants; None if exact.
    """

    completeness_error: float
    logit_shift: float
    image_share: float
    tolerance: float
    rounding: float = 0.0
    randomness: float = 0.0
    defects: tuple[Defect, ...] = ()
    breaks_at: str | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing is left unexplained: no defect, no randomness, a completeness error within the tolerance, and
        a logit shift within it or mere rounding."""
        return (
            not self.defects
            and self.randomness == 0
            and self.completeness_error <= self.tolerance
            and self.logit_shift <= max(self.tolerance, 10 * self.rounding)
        )


def check(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    tolerance: float | None = None,
    output: str | int | None = None,
    extra: Mapping[str, object] | None = None,
) -> Check:
    """Measure whether a network's explanations sum up to its logits, and look for what they cannot hold.

    Measured in float64, on a private copy, wherever the device has it: the faint signal of an untrained network may
    drown in float32's rounding.

    Args:
        model: A B-cos network in evaluation mode. Let running statistics have a scale first (train it, or run it once
            in training mode): a network whose signal vanishes proves nothing.
        x: Images (N, C, H, W) in [0, 1]; None makes a random one of the model's input size.
        tolerance: None is 1e-10 for a network in float64, 1e-4 for one in float32 and 1e-2 for others.
        output: Which of several outputs, as in `explain`. Of a map, the position with the strongest class is measured.
        extra: Other arguments of the network, by name, as in `explain`.

    Returns:
        The verdict; where it is not exact, with the first module, in the order of execution, that breaks it.

    Raises:
        InputError: For what are no images.
        ModelStateError: For a model in training mode, or one that is no B-cos network.
    """
    stem = check_model(model)
    if x is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
        x = random_image(stem.image_channels, size).to(stem.weight.device)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(f"expected a tensor of pixels in [0, 1], got {getattr(x, 'dtype', type(x).__name__)}")
    if tolerance is None:
        tolerance = TOLERANCE.get(stem.weight.dtype, 1e-2)
    network = frozen_copy(getattr(model, "_orig_mod", model))
    wide = stem.weight.dtype if stem.weight.device.type == "mps" else torch.float64
    network, x = network.to(wide), x.detach().to(wide)
    given = {name: _widened(value, wide) for name, value in (extra or {}).items()}
    verdict = _measure(network, x, stem.image_channels, tolerance, output, given)
    if verdict.exact:
        return verdict
    first = next((defect.module for defect in verdict.defects), None)
    broken = _first_break(network, x, stem.image_channels, tolerance, given) if first is None else first or "(root)"
    return replace(verdict, breaks_at=broken)


Extra = Mapping[str, object]


def _widened(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _measure(
    model: nn.Module, x: Tensor, channels: int, tolerance: float, output: str | int | None, extra: Extra
) -> Check:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactWarning)  # the verdict says it
        explanation = explain(model, x, output=output, extra=extra)
    logits = partial(_logits, model, output=output, position=explanation.position, extra=extra)
    plain, again = logits(x), logits(x)
    signal, encoded = explanation.logit - explanation.logit_bias, encode_image(x, channels)
    return Check(
        completeness_error=explanation.completeness_error.max().item(),
        logit_shift=_distance(explanation.logits, plain),
        image_share=(explanation.contributions.sum((1, 2, 3)) / signal).min().item(),
        tolerance=tolerance,
        rounding=_distance(logits(_with_other_last_digits(encoded)), logits(encoded)),
        randomness=_distance(again, plain),
        defects=explanation.defects,
    )


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, output: str | int | None, position: Tensor | None, extra: Extra) -> Tensor:
    """(N, K) outputs, of maps at the positions (N, 2)."""
    found: Tensor = pick_output(model(x, **extra), output, "the model")
    if position is None:
        return found
    maps = found.movedim(channel_axis(model, found, model), 1)
    maps = maps[:, :, None] if maps.ndim == 3 else maps
    return maps[torch.arange(len(maps), device=maps.device), :, position[:, 0], position[:, 1]]


def _distance(logits: Tensor, reference: Tensor) -> float:
    return ((logits - reference).abs().max() / reference.abs().max()).item()


def _with_other_last_digits(x: Tensor) -> Tensor:
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) < 0.5
    return x * (1 + torch.finfo(x.dtype).eps * (2 * up.to(x.dtype) - 1))


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Give an untrained network the running statistics of x, and logits that differ from their bias by about 1.

    Untrained B-cos networks answer so faintly that beside the logit bias nothing is left to compare. Not for a network
    whose weights mean something.

    Args:
        model: Any network, plain ones included. Its temperatures and running statistics change; it ends in evaluation
            mode.
        x: Images that it takes.
    """
    momenta = {m: m.momentum for m in model.modules() if isinstance(getattr(m, "momentum", None), float)}
    with torch.no_grad():
        for module in momenta:
            module.momentum = 1.0  # type: ignore[assignment]
        model.train()(torch.cat([x, x.flip(-1)]))
        for module, momentum in momenta.items():
            module.momentum = momentum
        heads = [m for m in model.eval().modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
        if heads:
            strength = (first_output(model(x)) - heads[-1].logit_bias).abs().max().item()
            for head in heads:
                head.temperature *= strength or 1.0
    return model


def random_image(channels: int, size: Sequence[int]) -> Tensor:
    """(1, channels, *size) smooth noise, which networks answer as they answer photos, unlike white noise."""
    coarse = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, tuple(size), mode="bilinear").clamp(0, 1)


def _first_break(model: nn.Module, x: Tensor, channels: int, tolerance: float, extra: Extra) -> str | None:
    """Every module's output must be W(x) · x + constants: test a random projection of each, in execution order."""
    outputs: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: object, output: object) -> None:
        output = first_output(output)
        if isinstance(output, Tensor) and output.requires_grad:
            outputs.append((names[module], output))

    leaf = encode_image(x.detach(), channels)[:1].clone().requires_grad_()
    account = Account(model, 1, leaf)
    with torch.enable_grad(), hooked(names, record), active(DynamicLinearMode(leaf, account)):
        model(leaf, **extra_of_images(extra, slice(0, 1), len(x)))
    for name, output in outputs:
        if not _adds_up(output, leaf, account, tolerance):
            return name or "(root)"
    return None


def _adds_up(output: Tensor, leaf: Tensor, account: Account, tolerance: float) -> bool:
    with torch.enable_grad():
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        expected = (output * direction).sum()
        part = linear_part(expected, leaf, account)
    total = (part.weights * leaf).sum() + part.constant_bias.sum() + part.gate_bias.sum()
    return bool((total - expected).abs() <= tolerance * expected.abs().clamp_min((output * direction).norm()))
