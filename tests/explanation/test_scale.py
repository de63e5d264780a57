"""Contributions of cells and superpixels, beside loops in float64."""

import sys

import pytest
import torch
from torch import Tensor

from tests.helpers import real_image
from tests.helpers.random_explanation import random_explanation
from timm_bcos import InputError
from timm_bcos.errors import MissingError
from timm_bcos.explanation.scale import cell_means, cell_sums, default_scale
from timm_bcos.explanation.superpixels import slic_segments


def literal_sums(maps: Tensor, scale: int) -> Tensor:
    height, width = maps.shape[1:]
    sums = torch.zeros(len(maps), -(-height // scale), -(-width // scale), dtype=torch.float64)
    for n in range(len(maps)):
        for i in range(height):
            for j in range(width):
                sums[n, i // scale, j // scale] += float(maps[n, i, j])
    return sums


@pytest.mark.parametrize("scale", [1, 2, 3, 5, 7, 12, 15, 16, 1000, 10**12])
def test_cells_are_sums(scale: int) -> None:
    explanation = random_explanation(2, size=(15, 12))
    found = explanation.at_scale(scale)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, literal_sums(explanation.contribution_map, scale), rtol=1e-13, atol=1e-13)
    total = explanation.contribution_map.double().sum((1, 2))
    torch.testing.assert_close(found.sum((1, 2)), total, rtol=1e-12, atol=1e-12)


def test_scale_1_is_the_map() -> None:
    explanation = random_explanation(2)
    assert torch.equal(explanation.at_scale(1), explanation.contribution_map.double())
    low = random_explanation().to(torch.bfloat16)
    assert torch.equal(low.at_scale(1), low.contribution_map.double())


def test_sums_are_as_exact_as_the_pixels() -> None:
    explanation = random_explanation(2).to(torch.float64)
    for scale in (1, 4, 5):
        logit = explanation.at_scale(scale).sum((1, 2)) + explanation.bias
        torch.testing.assert_close(logit, explanation.logit, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 3, 4, 100])
def test_cells_spread_over_their_pixels(scale: int) -> None:
    maps = torch.randn(2, 10, 7)
    sums, found = literal_sums(maps, scale), cell_means(maps, scale)
    for i in range(10):
        for j in range(7):
            rows, columns = (min(scale, side - place // scale * scale) for side, place in ((10, i), (7, j)))
            expected = sums[:, i // scale, j // scale] / (rows * columns)
            torch.testing.assert_close(found[:, i, j], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cell_sums(found, scale), sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0, -1, 1.5, 2.0, True, "8", [8], torch.nan])
def test_what_is_no_scale(scale: object) -> None:
    explanation = random_explanation()
    for method in (explanation.at_scale, explanation.photo_map, explanation.overlay, explanation.to_rgb):
        with pytest.raises(InputError, match=r"scale=.*: give the side of a cell in pixels, a whole number from 1"):
            method(scale=scale) if method != explanation.to_rgb else method("map", scale)
    with pytest.raises(InputError, match="scale="):
        explanation.plot(scale=scale)


def test_default_scale_suits_the_image() -> None:
    sizes = {(224, 224): 16, (160, 160): 16, (448, 300): 32, (32, 32): 4, (384, 512): 32, (9, 9): 1, (1, 9): 1}
    assert {size: default_scale(*size) for size in sizes} == sizes


def test_superpixels_are_sums() -> None:
    pytest.importorskip("skimage")
    explanation = random_explanation(3, size=(24, 30))
    found = explanation.superpixels(9)
    labels, sums = found
    assert labels.shape == (3, 24, 30) and sums.dtype is torch.float64
    expected = torch.zeros_like(sums)
    for n in range(3):
        assert labels[n].unique().tolist() == list(range(int(labels[n].max()) + 1))
        for i in range(24):
            for j in range(30):
                expected[n, labels[n, i, j]] += float(explanation.contribution_map[n, i, j])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    assert found.map[1, 3, 4] == sums[1, labels[1, 3, 4]]


def test_superpixels_are_slic() -> None:
    segmentation = pytest.importorskip("skimage.segmentation")
    image = real_image(48)[0]
    pixels = image.permute(1, 2, 0).double().numpy()
    expected = segmentation.slic(pixels, n_segments=20, start_label=0)
    found = slic_segments(image, 20)
    assert (found.numpy() == expected).all() and 10 < found.max() < 30


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_superpixels_of_other_channels(channels: int) -> None:
    pytest.importorskip("skimage")
    explanation = random_explanation(channels=channels, size=(20, 20))
    total = explanation.superpixels(6).sums.sum()
    torch.testing.assert_close(total, explanation.contribution_map.double().sum(), rtol=1e-12, atol=1e-12)


def test_superpixels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = random_explanation()
    for count in (0, -3, 2.5, True, "9"):
        with pytest.raises(InputError, match="give the number of superpixels per image, a whole number from 1"):
            explanation.superpixels(count)
    with pytest.raises(InputError, match="no images"):
        explanation[:0].superpixels()
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(MissingError, match=r"superpixels need scikit-image: pip install 'timm_bcos\[attribution\]'"):
        explanation.superpixels()
