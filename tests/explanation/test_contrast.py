"""Why a, not b: exact, on real photos, in double precision."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, normalized, real_image
from timm_bcos import BcosConfig, Explanation, InputError, TargetError, bcosify, contrast, explain


@pytest.fixture
def x() -> Tensor:
    return real_image(160, 2, torch.float64)


@pytest.fixture
def model(x: Tensor) -> nn.Module:
    """A converted network with constants of its own for each class."""
    plain = timm.create_model("test_resnet").double()
    enliven(plain, normalized(x, plain.pretrained_cfg))
    return bcosify(plain, BcosConfig.finetune(b=1.5, bias=True)).eval()


def test_is_the_difference_of_two_explanations(model: nn.Module, x: Tensor) -> None:
    found, a, b = contrast(model, x, 3, [5, 7]), explain(model, x, 3), explain(model, x, [5, 7])
    for name in ("weights", "bias", "constant_bias", "logit", "contribution_map"):
        torch.testing.assert_close(getattr(found, name), getattr(a, name) - getattr(b, name), rtol=1e-12, atol=1e-12)
    assert found.target.tolist() == [3, 3] and found.versus is not None and found.versus.tolist() == [5, 7]
    assert (found.logit - (model(x)[:, 3] - model(x)[[0, 1], [5, 7]])).abs().max() < 1e-10


def test_is_complete(model: nn.Module, x: Tensor) -> None:
    found = contrast(model, x, [0, 1], [2, 3])
    assert (found.bias.abs() > 1e-6).all()
    assert (found.logit.abs() > 1e-3).all()
    assert found.completeness_error.max() <= 1e-10


def test_shared_logit_bias_cancels() -> None:
    x = real_image(32, 2)
    model = enliven(timm.create_model("bcos_cnn9"), x)
    found = contrast(model, x, 0, 1)
    assert explain(model, x, 0).bias.abs().min() > 2
    assert found.bias.abs().max() == 0 and found.logit_bias == 0
    assert found.completeness_error.max() <= 1e-4


def test_b_against_a_is_the_opposite(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(contrast(model, x, 1, 2).weights, -contrast(model, x, 2, 1).weights)


def test_title_and_picture_name_both_classes(model: nn.Module, x: Tensor) -> None:
    found = contrast(model, x, 1, 0)
    titles = [axes.get_title() for axes in found.plot(["left", "right"]).axes]
    assert "for right, not left" in titles
    assert found.to_rgba().shape == (2, 160, 160, 4)


def test_one_of_a_batch_and_stacks_keep_the_other_class(model: nn.Module, x: Tensor) -> None:
    found = contrast(model, x, 1, [0, 2])
    assert found[1].versus is not None and found[1].versus.tolist() == [2]
    torch.testing.assert_close(Explanation.stack([found[0], found[1]]).logit, found.logit)
    with pytest.raises(InputError, match="cannot stack explanations of different outputs"):
        Explanation.stack([found, explain(model, x)])


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (2, 2, "a and b are both class 2: give two different classes"),
        ([0, 1], [1, 1], "a and b are both class 1"),
        (None, 1, "a=None: give a class for it"),
        (0, None, "b=None: give a class for it"),
        (0, 1.5, "b=1.5: give an int, or one int for each of the 2 images"),
        ([0, 1, 2], 3, "a=[0, 1, 2]: give an int, or one int for each of the 2 images"),
        (0, 1000, "the model has 1000 classes, counted from 0"),
        (-1, 0, "target=-1: the model has 1000 classes"),
    ],
)
def test_wrong_classes(model: nn.Module, x: Tensor, a: object, b: object, text: str) -> None:
    with pytest.raises(TargetError, match=re.escape(text)):
        contrast(model, x, a, b)  # type: ignore[arg-type]


def test_what_is_no_image(model: nn.Module) -> None:
    with pytest.raises(InputError):
        contrast(model, "photo.jpg", 0, 1)  # type: ignore[arg-type]


class Adding(nn.Module):
    """Adds what is not on the image's linear path, for class 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("bcos_cnn9")

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return torch.cat([logits[:, :1] + x.mean((1, 2, 3)).sigmoid()[:, None], logits[:, 1:]], 1)


def test_defects_of_either_are_told() -> None:
    x = real_image(32)
    model = enliven(Adding().eval(), x)
    with pytest.warns(timm_bcos.InexactWarning) as warned:
        assert contrast(model, x, 1, 0).violations
    assert all(w.filename == __file__ for w in warned if w.category is timm_bcos.InexactWarning)
