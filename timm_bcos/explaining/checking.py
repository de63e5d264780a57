"""Is a network's explanation exact? And if it is not, where does it break?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..dynamic.mode import explanation_mode
from ..nn.functional import encode_image
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from .forward import _check_model, explain

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
        breaks_at: Path of the first module whose output is not W(x) · x + constants; None if exact.
    """

    completeness_error: float
    logit_shift: float
    image_share: float
    tolerance: float
    rounding: float = 0.0
    breaks_at: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the completeness error is within the tolerance, and the logit shift within it or mere rounding."""
        return self.completeness_error <= self.tolerance and self.logit_shift <= max(self.tolerance, 10 * self.rounding)


def check(model: nn.Module, x: Tensor | None = None, *, tolerance: float | None = None) -> Check:
    """Measure whether a network's explanations sum up to its logits.

    Args:
        model: A B-cos network in evaluation mode. Let running statistics have a scale first (train it, or run it once
            in training mode): a network whose signal vanishes proves nothing.
        x: Images (N, C, H, W) in [0, 1]; None makes a random one of the model's input size.
        tolerance: None is 1e-10 in float64 and 1e-4 in float32.

    Returns:
        The verdict; where it is not exact, with the first module, in the order of execution, that breaks it.
    """
    stem = _check_model(model)
    if x is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
        x = random_image(stem.image_channels, size).to(stem.weight)
    if tolerance is None:
        tolerance = TOLERANCE.get(stem.weight.dtype, 1e-2)
    explanation = explain(model, x)
    plain = _logits(model, x)
    signal = explanation.logit - explanation.logit_bias
    verdict = Check(
        completeness_error=explanation.completeness_error.max().item(),
        logit_shift=_distance(explanation.logits, plain),
        image_share=(explanation.contributions.sum((1, 2, 3)) / signal).min().item(),
        tolerance=tolerance,
        rounding=_distance(_logits(model, _with_other_last_digits(encode_image(x, stem.image_channels))), plain),
    )
    if verdict.exact:
        return verdict
    return Check(**{**verdict.__dict__, "breaks_at": _first_break(model, x, stem.image_channels, tolerance)})


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output[0] if isinstance(output, tuple) else output


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
            strength = (_logits(model, x) - heads[-1].logit_bias).abs().max().item()
            for head in heads:
                head.temperature *= strength or 1.0
    return model


def random_image(channels: int, size: Sequence[int]) -> Tensor:
    """(1, channels, *size) smooth noise, which networks answer as they answer photos, unlike white noise."""
    coarse = torch.rand(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, tuple(size), mode="bilinear").clamp(0, 1)


def _first_break(model: nn.Module, x: Tensor, channels: int, tolerance: float) -> str | None:
    """Every module's output must be W(x) · x + constants: test a random projection of each, in execution order."""
    outputs: list[tuple[str, Tensor]] = []
    handles = [m.register_forward_hook(_record(outputs, name)) for name, m in model.named_modules()]
    try:
        with torch.enable_grad(), explanation_mode(model), forward_ad.dual_level():
            leaf = encode_image(x.detach(), channels).clone().requires_grad_()
            model(leaf)
            for name, output in outputs:
                if output.requires_grad and not _adds_up(output, leaf, tolerance):
                    return name or "(root)"
    finally:
        for handle in handles:
            handle.remove()
    return None


def _record(outputs: list[tuple[str, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            outputs.append((name, output))

    return hook


def _adds_up(output: Tensor, leaf: Tensor, tolerance: float) -> bool:
    value, tangent = forward_ad.unpack_dual(output)
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    (weights,) = torch.autograd.grad((value * direction).sum(), leaf, retain_graph=True, materialize_grads=True)
    total = (weights * leaf).sum() + (0 if tangent is None else (tangent * direction).sum())
    expected = (value * direction).sum()
    return bool((total - expected).abs() <= tolerance * expected.abs().clamp_min((value * direction).norm()))
