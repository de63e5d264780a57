"""Arguments that all explanations share: layers as modules, and classes for all images."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import PHOTOS, enliven, real_image
from timm_bcos import InputError, TargetError, contrast, explain, explain_targets
from timm_bcos.concepts.learning import learn_concepts
from timm_bcos.evaluation.neurons import find_strongest


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(32, 2, torch.float64)


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model("bcos_cnn9").double(), x)


def test_a_layer_may_be_given_as_a_module(model: Any, x: Tensor) -> None:
    layer = model.features[4]
    for compiled in (model, torch.compile(model)):
        found = explain(compiled, x, 7, layer=layer)
        assert found.layer == "features.4"
        assert torch.equal(found.weights, explain(model, x, 7, layer="features.4").weights)
    difference = contrast(model, x, 7, 3, layer=layer)
    assert torch.equal(difference.weights, contrast(model, x, 7, 3, layer="features.4").weights)
    (unit,) = explain_targets(model, x, [7], layer=layer, position=(1, 2))
    torch.testing.assert_close(unit.weights, explain(model, x, 7, layer=layer, position=(1, 2)).weights)


class Shared(nn.Module):
    """One convolution in two places, of which the second is used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.unused = self.used = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.used(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_modules_that_are_no_single_layer(model: Any, x: Tensor) -> None:
    config = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))
    shared: Any = timm_bcos.bcosify(Shared().double(), config).eval()
    cases: list[tuple[nn.Module, Any, str]] = [
        (
            model,
            nn.Conv2d(3, 3, 1),
            "the layer Conv2d is not a module of this model: give one from model.named_modules",
        ),
        (model, shared.stem, "the layer BcosStem is not a module of this model"),
        (model, model, "is the model itself: leave `layer` out"),
        (torch.compile(model), model, "is the model itself"),
        (model, 4, "layer=4: give a module of the model, or its path"),
        (shared, shared.used, "the model uses the layer BcosConv2d as unused, used: give one of the paths"),
        (shared, shared.unused, "as unused, used"),
    ]
    for given, layer, text in cases:
        with pytest.raises(TargetError, match=re.escape(text)):
            explain(given, x, 0, layer=layer)
    assert explain(shared, x, 0, layer="used").layer == "used"
    compiled = torch.compile(model)
    with pytest.raises(TargetError, match="is the model itself"):
        explain(compiled, x, 0, layer=compiled)


def test_neurons_and_concepts_take_modules(x: Tensor, tmp_path: Path) -> None:
    model: Any = enliven(timm.create_model("bcos_cnn9"), x.float())
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / name)
    photos = timm.data.create_dataset("", str(tmp_path))
    found = find_strongest(model, photos, model.features[4], 2, progress=False)
    named = find_strongest(model, photos, "features.4", 2, progress=False)
    assert found.layer == "features.4" and torch.equal(found.values, named.values)
    concepts = learn_concepts(model, photos, model.features[4], 4, "channels", progress=False)
    assert concepts.layer == "features.4" and len(concepts) == 128
    with pytest.raises(TargetError, match="not a module of this model"):
        find_strongest(model, photos, nn.ReLU(), 2, progress=False)


def test_a_flat_sequence_means_the_same_classes_for_all_images(model: nn.Module, x: Tensor) -> None:
    for classes in ([1, 2, 3], (1, 2, 3), torch.tensor([1, 2, 3]), [[1, 2, 3]] * 2):
        found = explain_targets(model, x, classes)
        assert [one.target.tolist() for one in found] == [[1, 1], [2, 2], [3, 3]]
        for one, target in zip(found, (1, 2, 3), strict=True):
            torch.testing.assert_close(one.weights, explain(model, x, target).weights)
    both = explain_targets(model, x, [4, 6])  # as many classes as images: still for all images
    assert [one.target.tolist() for one in both] == [[4, 4], [6, 6]]
    rows = explain_targets(model, x, [[4], [6]])
    assert [one.target.tolist() for one in rows] == [[4, 6]]
    chunks = explain_targets(model, x, [4, 6], chunk=1)
    torch.testing.assert_close(chunks[1].weights, both[1].weights)


@pytest.mark.parametrize(
    "targets", [[], [[], []], [[1], [2], [3]], 3, [1.5, 2.0], {1, 2}, [True, False], [[[1]]], "cat"]
)
def test_targets_of_another_shape(model: nn.Module, x: Tensor, targets: Any) -> None:
    with pytest.raises(TargetError, match=r"give 2 rows \(one per image\) of classes, or classes for all"):
        explain_targets(model, x, targets)


def test_several_classes_of_an_output_or_a_layer(model: nn.Module, x: Tensor) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"first": self.model(x), "second": -self.model(x) + shift}

    several = Several().eval()
    given: dict[str, Any] = dict(output="second", extra=dict(shift=torch.rand(2, 10, dtype=torch.float64)))
    for one, target in zip(explain_targets(several, x, [1, 4], **given), (1, 4), strict=True):
        expected = explain(several, x, target, **given)
        torch.testing.assert_close(one.weights, expected.weights)
        torch.testing.assert_close(one.bias, expected.bias)
    boxes = [(0, 0, 16, 16), (8, 8, 30, 32)]
    best = explain_targets(model, x, layer="features.4", region=boxes, top=2)
    for one in best:
        expected = explain(model, x, one.target, layer="features.4", region=boxes)
        torch.testing.assert_close(one.weights, expected.weights)
    activations = best[0].logits
    assert torch.equal(torch.stack([one.target for one in best], 1), activations.topk(2, dim=1).indices)
    each = explain_targets(model, x, [3], layer="features.4", position=[(0, 1), (2, 3)])
    assert each[0].position.tolist() == [[0, 1], [2, 3]]  # type: ignore[union-attr]
    with pytest.raises(TargetError, match=r"top=129: the model has 128 units in layer 'features\.4'"):
        explain_targets(model, x, top=129, layer="features.4")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (3, "extra=3: give the model's other arguments by name, as dict(name=value)"),
        ([("shift", 1)], "give the model's other arguments by name"),
        (dict(shifts=1), "extra has 'shifts': besides the image, BcosCnn9 takes no other argument"),
        ({4: 5}, "extra has 4: besides the image"),
    ],
)
def test_other_arguments_that_the_model_does_not_take(model: nn.Module, x: Tensor, extra: Any, text: str) -> None:
    calls: list[Any] = [explain, explain_targets, lambda *given, **more: contrast(*given, 1, 2, **more)]
    for call in [*calls, timm_bcos.attribute, timm_bcos.check]:
        with pytest.raises(InputError, match=re.escape(text)):
            call(model, x, extra=extra)
