"""float16 and bfloat16: the networks that come with the package, with their weights, and nearly dead filters."""

from typing import Any

import pytest
import timm
import torch

import timm_bcos
from tests.helpers import real_image
from timm_bcos import BcosConv2d, BcosLinear
from timm_bcos.weights.catalog import EMBEDDED

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", EMBEDDED)
def test_networks_with_their_weights(name: str, dtype: torch.dtype) -> None:
    model = timm.create_model(name, pretrained=True).eval()
    x = real_image(model.pretrained_cfg["input_size"][-1], 3)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    scale = (expected - expected.mean(1, keepdim=True)).abs().max()
    tolerance = 0.02 if dtype is torch.float16 else 0.1
    for found in (half, mixed):
        assert (found.float() - expected).abs().max() < tolerance * scale
        assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("fused", [False, True])
def test_explanations_in_half_precision(fused: bool) -> None:
    model, x = timm.create_model("bcos_cifar_resnet20", pretrained=True).eval(), real_image(32, 2)
    expected = timm_bcos.explain(model, x, 3)
    half = timm_bcos.fuse(model.bfloat16()) if fused else model.bfloat16()
    found = timm_bcos.explain(half, x.bfloat16(), 3)
    assert found.weights.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(found.weights.float().flatten(1), expected.weights.flatten(1))
    assert cosine.min() > 0.9


@pytest.mark.parametrize("unit", [dict(), dict(b=1.5), dict(normalize_weight=False), dict(max_out=2)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nearly_dead_filters(dtype: torch.dtype, unit: dict[str, Any]) -> None:
    """Whose squares are below float16's range, and filters whose squares are above it."""
    for layer, shape in ((BcosConv2d(8, 6, 3, padding=1, **unit), (2, 8, 6, 6)), (BcosLinear(8, 6, **unit), (2, 8))):
        with torch.no_grad():
            layer.weight[:2] *= 1e-4
            layer.weight[2:4] *= 3000
            layer = layer.to(dtype)
            x = torch.randn(shape).to(dtype)
            found = layer(x).float()
            expected = layer.float()(x.float())
        assert found.isfinite().all()
        scale = expected.abs().amax([d for d in range(expected.ndim) if d != 1], keepdim=True)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0.05, atol=0.05)
