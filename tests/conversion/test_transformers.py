"""Models of Hugging Face's transformers, with random weights: converted, the same, and explained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import timm_bcos

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TINY: dict[str, Any] = dict(num_labels=5, image_size=32)
TOKENS: dict[str, Any] = dict(TINY, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
STAGES: dict[str, Any] = dict(num_labels=5, hidden_sizes=[8, 16], depths=[1, 1])

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "ResNet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=8, **STAGES)),
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=32, **TOKENS)),
    "DeiT": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(intermediate_size=32, **TOKENS)),
    "ConvNeXt": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(num_stages=2, image_size=32, **STAGES)
    ),
    "Swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 2], window_size=4, **TINY)
    ),
    "DINOv2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TOKENS)),
}
CONFIG = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_converts_and_explains(name: str, x: Tensor) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().double().eval()
    with torch.no_grad():
        expected = plain((x - 0.5) / 0.5).logits
    model = timm_bcos.bcosify(plain, CONFIG).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-10, atol=1e-12)
    found = timm_bcos.explain(model, x)
    torch.testing.assert_close(found.logits, expected, rtol=1e-10, atol=1e-12)
    assert found.completeness_error.max() < 1e-10 and not found.violations
    assert timm_bcos.check(model, x).exact
