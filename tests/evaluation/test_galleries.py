"""Galleries of explanations, and the images that they choose."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.helpers import LOADING, PHOTOS, command, real_image
from timm_bcos import InputError, MethodError
from timm_bcos.evaluation.galleries import most_confident, plot_classes, plot_methods
from timm_bcos.evaluation.pointing_game import Confidence


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("bcosify", arch="test_resnet", num_classes=3).eval()


def test_most_confident_images_that_are_right() -> None:
    found = [
        Confidence(0, 0, 0, 0.4), Confidence(1, 0, 0, 0.9), Confidence(2, 0, 1, 0.3),
        Confidence(3, 1, 1, 0.5), Confidence(4, 1, 1, 0.6), Confidence(5, 0, 0, 0.8),
    ]  # fmt: skip
    assert [item.index for item in most_confident(found, 2, [0, 1])] == [1, 5, 4, 3]
    with pytest.raises(InputError, match="class 1 has 2 correctly classified images, 1 fewer than the 3"):
        most_confident(found, 3, [0, 1])
    with pytest.raises(MethodError, match="per_class=0: give a whole number from 1"):
        most_confident(found, 0, [0, 1])


def test_a_column_for_each_method_that_suits(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="left out: lrp has rules"):
        figure = plot_methods(model, real_image(64, 2), [0, 1], ["bcos", "lrp", "input_x_gradient"], ["a", "b", "c"])
    titles = [ax.get_title() for ax in figure.axes[:4]]
    assert titles == ["image", "B-cos in color", "bcos", "input_x_gradient"]  # lrp does not suit
    assert len(figure.axes) == 8


def test_two_rows_for_each_class(model: nn.Module) -> None:
    x = real_image(64, 2).repeat(2, 1, 1, 1)
    figure = plot_classes(model, x, [2, 2, 0, 0], ["a", "b", "c"])
    assert len(figure.axes) == 8
    assert [ax.get_title(loc="left") for ax in figure.axes[::4]] == ["c", "a"]
    assert all(len(ax.images) == 1 for ax in figure.axes)


@pytest.mark.parametrize("targets", [[], [0, 1, 0], [0, 0, 1], [0, 1, 1, 0]])
def test_classes_that_do_not_fill_the_rows(model: nn.Module, targets: list[int]) -> None:
    x = real_image(64).expand(len(targets), -1, -1, -1)
    with pytest.raises(InputError, match="the same number of images per class, class by class"):
        plot_classes(model, x, targets, ["a", "b", "c"])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels(channels: int) -> None:
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=3, in_chans=channels).eval()
    x = torch.cat([real_image(64), real_image(64)], 1)[:, :channels]
    figure = plot_methods(model, x, [1], ["input_x_gradient", "gradcam"])
    shown = torch.as_tensor(figure.axes[0].images[0].get_array())
    expected = x[0, :3] if channels > 2 else x[0].mean(0, keepdim=True).expand(3, -1, -1)
    torch.testing.assert_close(shown, expected.movedim(0, -1))


@pytest.mark.parametrize("kind", ["classes", "methods"])
def test_command(kind: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for c in range(3):
        folder = tmp_path / "data" / "test" / f"class{c}"
        folder.mkdir(parents=True)
        for k, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))[:2]):
            Image.open(photo).convert("RGB").resize((64, 64)).save(folder / f"{c}_{k}.png")
    monkeypatch.setattr(LOADING, lambda *_: model)
    monkeypatch.setattr(
        "timm_bcos.evaluation.pointing_game.confidences",
        lambda *_: [Confidence(i, i // 2, i // 2, 0.5) for i in range(6)],
    )
    out = tmp_path / "gallery.png"
    options = dict(classes=["--images", 2], methods=["--method", "bcos", "--method", "input_x_gradient"])[kind]
    shown = ["--show", 0, "--show", "class 1"]
    assert (
        command("gallery", kind, "--data-dir", tmp_path / "data", "--split", "test", "--out", out, *shown, *options)
        == 0
    )
    assert Image.open(out).width > 200
