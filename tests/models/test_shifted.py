"""Means over small shifts: the mean of logits, exactly explained, with less of a checkerboard."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers import enliven, real_image
from timm_bcos import BcosConfig, InputError, bcosify, check, explain
from timm_bcos.models.shift_averaged import ShiftAveraged


def shifted(x: Tensor, rows: int, columns: int) -> Tensor:
    """What is at (i + rows, j + columns), pixels at the border repeated."""
    i, j = (torch.arange(n) for n in x.shape[-2:])
    return x[:, :, (i + rows).clamp(0, len(i) - 1)][..., (j + columns).clamp(0, len(j) - 1)]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(64, 2, torch.float64)


@pytest.fixture(scope="module")
def network(x: Tensor) -> nn.Module:
    plain = timm.create_model("test_resnet").double()
    return bcosify(enliven(plain, x), BcosConfig.finetune(b=1.5, bias=True)).eval()


def test_is_the_mean_over_shifts(network: nn.Module, x: Tensor) -> None:
    model = ShiftAveraged(network, 3).eval()
    images = [shifted(x, row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    torch.testing.assert_close(model(x), torch.stack([network(image) for image in images]).mean(0))
    found = explain(model, x, 3)
    assert found.completeness_error.max() <= 1e-10 and not found.violations
    total = torch.zeros_like(found.weights)
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            leaf = torch.zeros_like(total, requires_grad=True)
            weights = explain(network, shifted(x, row, column), 3).weights
            total += torch.autograd.grad(shifted(leaf, row, column), leaf, weights)[0]
    torch.testing.assert_close(found.weights, total / 9, rtol=1e-8, atol=1e-12)
    assert check(model, x).exact


def test_one_shift_is_the_network(network: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(ShiftAveraged(network, 1)(x), network(x))


def test_logit_bias_and_names_are_the_networks() -> None:
    image = real_image(32, 1)
    network = enliven(timm.create_model("bcos_cnn9"), image)
    model = ShiftAveraged(network, 2).eval()
    found = explain(model, image)
    assert found.logit_bias == explain(network, image).logit_bias != 0
    assert found.completeness_error.max() <= 1e-4 and model.num_classes == 10


def test_the_checkerboard_vanishes() -> None:
    """Strides multiply to 4: far from the border, W(x) of an even image repeats with period 4, its mean is the same."""
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    network = bcosify(plain, BcosConfig.finetune(mean=(0.0,), std=(1.0,))).double().eval()
    image = torch.full((1, 3, 40, 40), 0.3, dtype=torch.float64)
    own, mean = (
        explain(m, image, 0).weights[0, :, 12:-12, 12:-12] for m in (network, ShiftAveraged(network, 4).eval())
    )
    torch.testing.assert_close(own[:, 4:, 4:], own[:, :-4, :-4])
    assert own.std((1, 2)).max() > 0.1 * own.abs().max()
    torch.testing.assert_close(mean, mean[:, :1, :1].expand_as(mean))
    torch.testing.assert_close(mean[:, 0, 0], own[:, :4, :4].mean((1, 2)))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "two"])
def test_wrong_sizes(network: nn.Module, size: object) -> None:
    with pytest.raises(InputError, match=re.escape(f"size={size!r}: give the number of pixels to shift by")):
        ShiftAveraged(network, size)  # type: ignore[arg-type]


def test_other_networks() -> None:
    with pytest.raises(InputError, match=r"ResNet is no B-cos model: convert it with timm_bcos\.bcosify"):
        ShiftAveraged(timm.create_model("test_resnet"))
