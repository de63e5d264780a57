import stat
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_bcos
from tests.helpers import enliven, real_image
from tests.helpers.literal import rgba_pixel
from timm_bcos.explanation.visualization import map_to_rgba, on_white, overlay, save_image, weights_to_rgba
from timm_bcos.files import atomic_path


@pytest.fixture
def explanation() -> timm_bcos.Explanation:
    x = real_image(32, 2)
    return timm_bcos.explain(enliven(timm.create_model("bcos_cnn9"), x), x)


def test_colors_are_the_formula() -> None:
    weights = torch.randn(1, 6, 5, 4, dtype=torch.float64)
    contribution = torch.randn(1, 5, 4, dtype=torch.float64)
    rgba = weights_to_rgba(weights, contribution, smooth=0, percentile=100)[0]
    expected = torch.tensor(
        [[rgba_pixel(weights[0, :, i, j], contribution[0, i, j].item()) for j in range(4)] for i in range(5)],
        dtype=torch.float64,
    )
    expected[..., 3] /= expected[..., 3].max()
    torch.testing.assert_close(rgba, expected)


def test_pictures_agree_with_the_official_package() -> None:
    common = pytest.importorskip("bcos.common")
    weights, inputs = torch.randn(2, 6, 40, 30), torch.rand(2, 6, 40, 30)
    ours = weights_to_rgba(weights, (weights * inputs).sum(1))
    for i in range(2):
        theirs = torch.from_numpy(common.gradient_to_image(inputs[i], weights[i]))
        torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-5)


def test_shapes_and_ranges(explanation: timm_bcos.Explanation) -> None:
    rgba = explanation.to_rgba()
    assert rgba.shape == (2, 32, 32, 4)
    assert rgba.min() >= 0
    assert rgba.max() <= 1
    maps = map_to_rgba(explanation.contribution_map)
    assert maps.shape == (2, 32, 32, 4)
    assert overlay(explanation.image, explanation.contribution_map).shape == (2, 32, 32, 3)


def test_contribution_colors_are_symmetric() -> None:
    values = torch.tensor([[[-2.0, -1.0, 0.0, 1.0, 2.0]]])
    colors = map_to_rgba(values, percentile=100)[0, 0, :, :3]
    torch.testing.assert_close(colors, colors.flip(0).flip(-1), atol=1e-2, rtol=0)  # blue and red swap
    assert colors[0].tolist() == [0, 0, 1]
    assert colors[2].min() > 0.99


def test_transparent_is_white() -> None:
    assert on_white(torch.tensor([0.2, 0.4, 0.6, 0.0])).tolist() == [1, 1, 1]
    torch.testing.assert_close(on_white(torch.tensor([0.2, 0.4, 0.6, 1.0])), torch.tensor([0.2, 0.4, 0.6]))


def test_grey_images_and_others() -> None:
    assert weights_to_rgba(torch.randn(1, 2, 8, 8), torch.randn(1, 8, 8)).shape == (1, 8, 8, 4)
    with pytest.raises(timm_bcos.InputError, match="1 or 3 image channels, these weights have 4"):
        weights_to_rgba(torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8))


def test_figure_and_files(explanation: timm_bcos.Explanation, tmp_path: Path) -> None:
    figure = explanation.plot([f"name {i}" for i in range(10)])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:6] == [
        "image",
        f"for name {explanation.target[0]}",
        "contributions of pixels",
        "contributions of cells of 4 × 4 pixels",
        "overlay",
        "probability (sigmoid)",
    ]
    assert len(figure.axes) == 12
    explanation.save(tmp_path / "new" / "figure.png")
    save_image(explanation.to_rgba()[0], tmp_path / "picture.png")
    assert Image.open(tmp_path / "new" / "figure.png").size == (2040, 680)
    assert Image.open(tmp_path / "picture.png").mode == "RGBA"
    assert stat.S_IMODE((tmp_path / "picture.png").stat().st_mode) & 0o444 == 0o444


def test_figure_of_a_neuron() -> None:
    x = real_image(32)
    neuron = timm_bcos.explain(enliven(timm.create_model("bcos_cnn9"), x), x, 7, layer="features.4")
    titles = [axes.get_title() for axes in neuron.plot().axes]
    assert titles[1].startswith("features.4, unit 7 at (")
    assert titles[5] == "activation"


def test_failed_writes_leave_the_old_file(tmp_path: Path, explanation: timm_bcos.Explanation) -> None:
    path = tmp_path / "out.png"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match="not supported"):
        explanation.save(tmp_path / "out.nonsense")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
