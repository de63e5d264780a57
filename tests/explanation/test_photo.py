"""Explanations on the original photo, beside loops over areas in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.random_explanation import random_explanation
from timm_bcos import InputError
from timm_bcos.explanation.photo import Photo
from timm_bcos.explanation.scale import cell_means
from timm_bcos.explanation.visualization import overlay

BOXES = [
    (0, 0, 9, 7),  # the whole photo
    (1, 2, 7, 5),  # a crop
    (1.3, 0.4, 7.9, 6.2),  # with edges inside pixels
    (-2, 0.5, 11.5, 6.5),  # padding on both sides
    (-3.5, -4, 3.5, 2.2),  # padding above and on the left
    (4.2, 3.1, 4.4, 3.3),  # within a pixel
    (20, 20, 30, 30),  # none of the photo
]


def length(a: float, b: float, c: float, d: float) -> float:
    """Length of what the intervals from a to b and from c to d have in common."""
    return max(min(b, d) - max(a, c), 0.0)


def literal_spread(values: Tensor, box: tuple[float, ...], width: int, height: int) -> Tensor:
    left, top, right, bottom = box
    rows, columns = values.shape
    tall, wide = (bottom - top) / rows, (right - left) / columns
    found = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for i in range(rows):
                for j in range(columns):
                    down = length(y, y + 1, top + i * tall, top + (i + 1) * tall) / tall
                    across = length(x, x + 1, left + j * wide, left + (j + 1) * wide) / wide
                    found[y, x] += float(values[i, j]) * down * across
    return found


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (12, 15)])
def test_contributions_are_spread_by_area(box: tuple[float, ...], shape: tuple[int, int]) -> None:
    values = torch.randn(shape)
    photo = Photo(Image.new("RGB", (9, 7)), box)
    torch.testing.assert_close(photo.spread(values), literal_spread(values, box, 9, 7), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_coverage_is_the_share_inside_the_photo(box: tuple[float, ...]) -> None:
    photo = Photo(Image.new("RGB", (9, 7)), box)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            single = torch.zeros(3, 4)
            single[i, j] = 1
            expected[i, j] = literal_spread(single, box, 9, 7).sum()
    torch.testing.assert_close(photo.coverage(3, 4), expected, rtol=1e-10, atol=1e-12)
    assert photo.padding == pytest.approx(1 - expected.mean().item(), abs=1e-12)


def test_a_photo_without_padding_has_none() -> None:
    assert Photo(Image.new("RGB", (9, 7)), (0.3, 0.1, 8.7, 6.3)).padding == 0


@pytest.mark.parametrize("scale", [1, 3])
def test_photo_map_keeps_the_total(scale: int) -> None:
    photo = Photo(Image.new("RGB", (13, 9)), (1.5, 1, 12.5, 8.2))
    explanation = random_explanation(photos=(photo,))
    found = explanation.photo_map(scale)
    expected = literal_spread(cell_means(explanation.contribution_map[0], scale), photo.box, 13, 9)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    total = explanation.contribution_map.double().sum()
    torch.testing.assert_close(found.sum(), total, rtol=1e-10, atol=1e-10)
    assert random_explanation().photo_map().shape == (12, 16)
    torch.testing.assert_close(random_explanation().photo_map(), explanation.contribution_map[0].double())


@pytest.mark.parametrize("scale", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("box", [(-2, 0.5, 11.5, 6.5), (-3.5, -4, 3.5, 2.2), (20, 20, 30, 30)], ids=str)
def test_padding_does_not_leak_out_of_cells(box: tuple[float, ...], scale: int) -> None:
    """Each cell spreads what its pixels contribute on the photo over its part on the photo."""
    photo = Photo(Image.new("RGB", (9, 7)), box)
    explanation = random_explanation(photos=(photo,))
    maps = explanation.contribution_map[0].double()
    coverage = photo.coverage(12, 16)
    means = torch.zeros(12, 16, dtype=torch.float64)
    for i in range(0, 12, scale):
        for j in range(0, 16, scale):
            cell = (slice(i, i + scale), slice(j, j + scale))
            if coverage[cell].sum() > 0:
                means[cell] = (maps[cell] * coverage[cell]).sum() / coverage[cell].sum()
    found = explanation.photo_map(scale)
    torch.testing.assert_close(found, literal_spread(means, box, 9, 7), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.sum(), (maps * coverage).sum(), rtol=1e-9, atol=1e-10)


def test_overlays_of_coarse_cells_leave_padding_out() -> None:
    """What padding contributes to a cell on the photo's edge does not color the photo."""
    photo = Photo(Image.new("RGB", (8, 12)), (-8, 0, 8, 12))  # the left half of the image is padding
    explanation = random_explanation(photos=(photo,))
    weights = explanation.weights.clone()
    weights[..., :8] *= -5
    shown = pixels(explanation.overlay(3))
    of_cell = explanation.contribution_map[0, :3, 8].sum()  # of columns 6 to 8, only 8 shows the photo
    assert bool(shown[0, 0, 0] > shown[0, 0, 2]) is bool(of_cell > 0)
    other = pixels(replace(explanation, weights=weights).overlay(3))
    assert bool(other[0, 0, 0] > other[0, 0, 2]) is bool(of_cell > 0)


@pytest.mark.parametrize("scale", [None, 1, 5])
def test_overlay_without_a_photo_is_on_the_image(scale: int | None) -> None:
    explanation = random_explanation()
    found = explanation.overlay(scale)
    assert found.size == (16, 12) and found.mode == "RGB"
    expected = overlay(explanation.image, cell_means(explanation.contribution_map, scale or 1))[0] * 255
    torch.testing.assert_close(pixels(found), expected, rtol=0, atol=2.5)  # rounded thrice


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).double()


@pytest.mark.parametrize("box", [(3, 2, 35, 26), (-16, -12, 48, 36)])
def test_overlay_has_the_photos_size(box: tuple[float, ...]) -> None:
    """Each pixel of the model's image covers 2 × 2 (4 × 4) pixels of the photo."""
    generator = np.random.default_rng(0)
    photo = Photo(Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)), box)
    explanation = random_explanation(photos=(photo,))
    found = pixels(explanation.overlay(1))
    assert found.shape == (30, 40, 3)
    factor, (left, top) = round((box[2] - box[0]) / 16), (int(box[0]), int(box[1]))
    for y, x in [(2, 3), (5, 3), (25, 34), (14, 20), (15, 21), (29, 39), (0, 0)]:
        i, j = (y - top) // factor, (x - left) // factor
        inside = 0 <= i < 12 and 0 <= j < 16
        gray = 127.5 + pixels(photo.image)[y, x].mean() / 2
        expected = (255 - 0.35 * (255 - gray)).expand(3)
        if inside:
            white = torch.zeros(1, 3, 12, 16) + 2 * (gray.item() / 255 - 0.5)
            expected = overlay(white, explanation.contribution_map)[0, i, j] * 255
        torch.testing.assert_close(found[y, x], expected, rtol=0, atol=3)


def test_color_picture_lies_in_the_box() -> None:
    photo = Photo(Image.new("L", (40, 30)), (3, 2, 35, 26))
    explanation = random_explanation(photos=(photo,))
    found = pixels(explanation.color_picture())
    expected = explanation.to_rgba()[0] * 255
    assert found.shape == (30, 40, 4)
    assert not found[:2].any() and not found[26:].any() and not found[:, :3].any() and not found[:, 35:].any()
    inside = found[2:26, 3:35]
    torch.testing.assert_close(inside[::2, ::2, 3], expected[..., 3].double(), rtol=0, atol=1)
    strong = expected[..., 3] > 128
    torch.testing.assert_close(inside[1::2, 1::2, :3][strong], expected[..., :3][strong].double(), rtol=0, atol=3)


@pytest.mark.parametrize("box", [*BOXES, (-1e6, -1e6, 1e6, 1e6), (4.01, 3.01, 4.02, 3.02)], ids=str)
def test_overlay_of_any_box(box: tuple[float, ...]) -> None:
    explanation = random_explanation(photos=(Photo(Image.new("RGB", (9, 7)), box),))
    assert explanation.overlay().size == explanation.color_picture().size == (9, 7)
    assert explanation.photo_map().shape == (7, 9)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_photos_of_any_mode(mode: str) -> None:
    explanation = random_explanation(photos=(Photo(Image.new(mode, (9, 7)), (0, 0, 9, 7)),))
    assert explanation.overlay().mode == "RGB"


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_overlay_of_any_number_of_channels(channels: int) -> None:
    explanation = random_explanation(channels=channels)
    gray = 0.5 + explanation.image.mean(1).double() / 2
    silent = explanation.overlay(1)
    assert silent.size == (16, 12)
    weakest = int(explanation.contribution_map.abs().argmin())
    shown = pixels(silent).view(-1, 3)[weakest]
    torch.testing.assert_close(shown, (gray.flatten()[weakest] * 255).expand(3), rtol=0, atol=8)
    if channels > 1:
        with pytest.raises(InputError, match="1 or 3 image channels"):
            explanation.color_picture()
