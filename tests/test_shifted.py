"""Means over small shifts: the mean of logits, exactly explained, with less of a checkerboard."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import PHOTOS, enliven, real_image
from PIL import Image
from torch import Tensor, nn

from timm_bcos import BcosConfig, InputError, bcosify, check, explain
from timm_bcos.models.shifted import ShiftAveraged


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
    assert found.completeness_error.max() <= 1e-10 and not found.defects
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


def checkerboard(picture: Tensor) -> float:
    """The share of a map's energy in differences that alternate from pixel to pixel."""
    alternating = picture - F.avg_pool2d(picture[None], 2, 1, 1)[0, :, 1:, 1:]
    return float(alternating.square().sum() / picture.square().sum())


def test_the_checkerboard_fades() -> None:
    """On the embedded network and a real photo."""
    network = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    image = transform(Image.open(PHOTOS / "clothes" / "hat.jpg"))[None]
    own, mean = (explain(model, image, 1) for model in (network, ShiftAveraged(network, 4).eval()))
    assert mean.completeness_error.max() <= 1e-4
    assert checkerboard(mean.contribution_map) < 0.75 * checkerboard(own.contribution_map)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "two"])
def test_wrong_sizes(network: nn.Module, size: object) -> None:
    with pytest.raises(InputError, match=re.escape(f"size={size!r}: give the number of pixels to shift by")):
        ShiftAveraged(network, size)  # type: ignore[arg-type]


def test_other_networks() -> None:
    with pytest.raises(InputError, match=r"ResNet is no B-cos network: convert it with timm_bcos\.bcosify"):
        ShiftAveraged(timm.create_model("test_resnet"))
