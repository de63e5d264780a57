"""Predictions and summaries: names and numbers, ready for JSON."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.random_explanation import random_explanation
from timm_bcos import InputError, Violation
from timm_bcos.explanation.photo import Photo
from timm_bcos.explanation.summary import region_sums

NAMES = ("hat", "dress", "shoes", "skirt")


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_predictions_are_the_best_classes(kind: str) -> None:
    explanation = random_explanation(class_names=NAMES, probability_kind=kind)
    logits = explanation.logits[0].double()
    expected = logits.sigmoid() if kind == "sigmoid" else logits.exp() / logits.exp().sum()
    order = sorted(range(4), key=lambda c: -expected[c])
    found = explanation.predictions()
    assert [name for name, _ in found] == [NAMES[c] for c in order]
    assert [p for _, p in found] == pytest.approx([expected[c].item() for c in order], rel=1e-5)
    assert explanation.predictions(top=2) == found[:2] and explanation.predictions(99) == found
    unnamed = random_explanation(class_names=NAMES[:1]).predictions()
    assert {name for name, _ in unnamed} == {"hat", "class 1", "class 2", "class 3"}


def test_what_has_no_predictions() -> None:
    with pytest.raises(InputError, match=r"this explains a unit of 'blocks\.1': explain the image without layer="):
        random_explanation(layer="blocks.1").predictions()
    for top in (0, -1, 1.5, True, "3", None):
        with pytest.raises(InputError, match="give the number of classes, a whole number from 1"):
            random_explanation().predictions(top)


@pytest.mark.parametrize("size", [(12, 16), (3, 3), (7, 5), (1, 1), (2, 9)])
def test_regions_are_thirds(size: tuple[int, int]) -> None:
    values = torch.randn(size)
    names = [f"{v} {h}".strip() for v in ("top", "", "bottom") for h in ("left", "", "right")]
    names[4] = "center"
    expected = dict.fromkeys(names, 0.0)
    for i in range(size[0]):
        for j in range(size[1]):
            place = int((i + 0.5) / size[0] * 3) * 3 + int((j + 0.5) / size[1] * 3)
            expected[names[place]] += float(values[i, j])
    assert region_sums(values) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_summary_in_numbers() -> None:
    photo = Photo(Image.new("RGB", (40, 30)), (-8, 0, 32, 30), "hat.jpg")
    explanation = random_explanation(class_names=NAMES, photos=(photo,), violations=(Violation("a", "tanh", "added"),))
    found = explanation.summary(top=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    maps: Tensor = explanation.contribution_map[0].double()
    assert found["title"] == "for hat" and found["target"]["name"] == "hat" and found["target"]["index"] == 0
    assert found["versus"] is None
    assert [(one["name"], one["probability"]) for one in found["classes"]] == explanation.predictions(2)
    assert found["logit"] == pytest.approx(explanation.logit.item())
    assert found["positive"] == pytest.approx(maps[maps > 0].sum().item())
    assert found["negative"] == pytest.approx(maps[maps < 0].sum().item())
    total = found["positive"] + found["negative"] + found["bias"]
    assert total == pytest.approx(found["logit"], rel=1e-4)
    assert sum(found["regions"].values()) == pytest.approx(maps.sum().item())
    assert found["completeness_error"] == explanation.completeness_error.item()
    assert found["exact"] is False and found["violations"][0].startswith("a: tanh adds a value")
    assert found["image"] == {"width": 16, "height": 12}
    expected = maps[:, :3].sum().item() + maps[:, 3].sum().item() * (8 / 2.5 - 3)
    assert found["photo"].pop("padding_contribution") == pytest.approx(expected, rel=1e-6)
    assert found["photo"].pop("padding") == pytest.approx(0.2)
    assert found["photo"] == {"name": "hat.jpg", "width": 40, "height": 30, "box": [-8.0, 0.0, 32.0, 30.0]}


def test_summaries_of_other_kinds() -> None:
    pair = random_explanation(class_names=NAMES, versus=torch.tensor([2])).summary()
    assert pair["title"] == "for hat, not shoes" and pair["versus"]["name"] == "shoes" and pair["photo"] is None
    unit = random_explanation(layer="blocks.1", class_names=NAMES, position=torch.tensor([[1, 2]])).summary()
    assert unit["title"] == "blocks.1, unit 0 at (1, 2)" and "classes" not in unit
    assert unit["units"][0].keys() == {"index", "name", "activation"} and unit["target"]["name"] == "unit 0"
    direction = random_explanation(class_names=NAMES, direction=torch.tensor([[1.0, 0, 0, -1]])).summary()
    assert direction["title"] == "for hat, not skirt"


def test_numbers_that_json_lacks_are_none() -> None:
    explanation = random_explanation()
    found = replace(explanation, bias=torch.tensor([torch.nan]), logits=torch.full((1, 4), torch.inf)).summary()
    assert found["bias"] is None and found["logit"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_summaries_in_any_dtype(dtype: torch.dtype) -> None:
    low, full = (random_explanation().to(kind).summary() for kind in (dtype, torch.float32))
    assert low["logit"] == pytest.approx(full["logit"], rel=2e-2)
    assert low["positive"] == pytest.approx(full["positive"], rel=2e-2)
