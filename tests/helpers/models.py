"""Untrained models that answer, and what is asserted of every explanation."""

import contextlib
import functools

import timm
import torch
from torch import Tensor, nn

import timm_bcos

LOADING = "timm_bcos.models.loading.load_model"  # what commands load models by


def enliven(model: nn.Module, x: Tensor) -> nn.Module:
    """Give an untrained model running statistics, and logits that differ from their bias by about 1.

    Untrained B-cos models hardly answer; sums that vanish beside the logit bias would prove nothing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and "gamma" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return timm_bcos.calibrate(model, x)


def assert_exact(model: nn.Module, x: Tensor, tolerance: float) -> timm_bcos.Explanation:
    """Completeness, on a signal that is there, with logits that explanation mode leaves alone."""
    explanation = timm_bcos.explain(model, x)
    with torch.no_grad():
        plain = model(x)
    plain = plain[0] if isinstance(plain, tuple) else plain
    assert (explanation.logit - explanation.logit_bias).abs().min() > 1e-3
    assert explanation.completeness_error.max() <= tolerance
    torch.testing.assert_close(explanation.logits, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
    return explanation


@functools.cache
def timm_vits_trace() -> bool:
    """Whether torch.fx traces timm's own vision transformers: torch 2.6 takes no proxy for `is_causal`."""
    with contextlib.suppress(TypeError):
        torch.fx.symbolic_trace(timm.create_model("vit_tiny_patch16_224"))
        return True
    return False
