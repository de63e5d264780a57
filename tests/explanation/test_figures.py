"""Figures of explanations: what they show, with which names, and pictures for loggers and notebooks."""

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_bcos
from tests.helpers import enliven, real_image
from tests.helpers.random_explanation import random_explanation
from timm_bcos import InputError
from timm_bcos.explanation.scale import cell_means
from timm_bcos.explanation.visualization import map_to_rgba, on_white, overlay

NAMES = ("hat", "dress", "shoes", "skirt")


def titles(figure: object) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def labels(figure: object) -> list[str]:
    return [label.get_text() for label in figure.axes[-1].get_yticklabels()]


def test_names_of_the_explanation_are_the_default() -> None:
    explanation = random_explanation(2, size=(32, 32), class_names=NAMES)
    figure = explanation.plot()
    assert titles(figure)[1] == "for hat" and titles(figure)[7] == "for dress"
    assert set(labels(figure)) == set(NAMES)
    other = explanation.plot(["a", "b", "c", "d"])
    assert titles(other)[1] == "for a" and set(labels(other)) == set("abcd")
    assert titles(random_explanation(size=(32, 32)).plot())[1] == "for class 0"


def test_the_models_own_names_are_shown() -> None:
    x = real_image(32)
    model = enliven(timm.create_model("bcos_cnn9", num_classes=4), x)
    assert timm_bcos.explain(model, x).class_names == ()
    model.pretrained_cfg["label_names"] = NAMES
    for wrapped in (model, timm_bcos.ShiftAveraged(model, 2).eval(), nn.DataParallel(model).eval()):
        assert timm_bcos.explain(wrapped, x, 2).class_names == NAMES
    assert titles(timm_bcos.explain(model, x, 2).plot())[1] == "for shoes"
    assert timm_bcos.explain(model, x, 2, layer="features.4").class_names == ()
    model.pretrained_cfg["label_names"] = NAMES[:3]
    assert timm_bcos.explain(model, x).class_names == ()


def test_two_scales_beside_each_other() -> None:
    explanation = random_explanation(size=(64, 64))
    maps = explanation.contribution_map
    for scale, side in ((None, 8), (7, 7)):
        figure = explanation.plot(scale=scale)
        assert titles(figure)[2:5] == [
            "contributions of pixels", f"contributions of cells of {side} × {side} pixels", "overlay"
        ]  # fmt: skip
        shown = [torch.from_numpy(np.asarray(axes.images[0].get_array())).double() for axes in figure.axes[2:5]]
        coarse = cell_means(maps, side)
        for found, expected in zip(shown, (map_to_rgba(maps), map_to_rgba(coarse), overlay(explanation.image, coarse)),
                                   strict=True):  # fmt: skip
            torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)
    assert titles(explanation.plot(scale=1))[2:4] == ["contributions of pixels", "overlay"]


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_images_that_are_no_colors(channels: int) -> None:
    explanation = random_explanation(2, channels=channels, size=(32, 32), class_names=NAMES)
    figure = explanation.plot()
    assert titles(figure)[:3] == [
        f"image (mean of {channels} channels)", "for hat: contributions of pixels",
        "contributions of cells of 4 × 4 pixels",
    ]  # fmt: skip
    shown = torch.from_numpy(np.asarray(figure.axes[0].images[0].get_array())).squeeze()
    torch.testing.assert_close(shown, explanation.image[0].mean(0))
    assert len(figure.axes) == 10
    with pytest.raises(InputError, match=rf"1 or 3 image channels, these weights have {channels}"):
        explanation.to_rgb()
    assert explanation.to_rgb("overlay").shape == (2, 3, 32, 32)


def test_gray_images_have_colors() -> None:
    figure = random_explanation(channels=1, size=(32, 32)).plot()
    assert titles(figure)[:2] == ["image", "for class 0"]


def test_what_cannot_be_plotted() -> None:
    assert random_explanation(2)[:0]._repr_png_() is None
    with pytest.raises(InputError, match="top=0: give the number of classes"):
        random_explanation().plot(top=0)
    for method in ("plot", "to_rgb", "to_rgba"):
        with pytest.raises(InputError, match="no images has nothing to show"):
            getattr(random_explanation(2)[:0], method)()


def test_pictures_for_loggers() -> None:
    explanation = random_explanation(3).to(torch.bfloat16)
    coarse = cell_means(explanation.contribution_map, 5)
    expected = {
        "color": on_white(explanation.to_rgba()),
        "map": map_to_rgba(coarse)[..., :3],
        "overlay": overlay(explanation.image.float(), coarse),
    }
    for kind, pictures in expected.items():
        found = explanation.to_rgb(kind, scale=5)
        assert found.dtype is torch.float32 and found.shape == (3, 3, 12, 16)
        assert found.min() >= 0 and found.max() <= 1
        torch.testing.assert_close(found, pictures.float().movedim(-1, 1), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="kind='rgba': choose one of color, map, overlay"):
        explanation.to_rgb("rgba")


def test_pictures_in_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_images("why", random_explanation(2).to_rgb())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 500


def test_notebooks_show_a_small_figure() -> None:
    for images, height in ((1, 170), (6, 680)):
        data = random_explanation(images, size=(32, 32))._repr_png_()
        assert Image.open(io.BytesIO(data)).size == (1020, height)
