"""The page about one photo: the document and its numbers."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm

from tests.helpers import enliven, real_image
from tests.helpers.explained_photos import HOSTILE, NAMES, explained_hat, small
from timm_bcos import BcosConfig, BcosConv2d, Explanation, InputError, bcosify, contrast, explain, explain_targets
from timm_bcos.viewer.document import save_viewer, viewer_html


@pytest.fixture
def explanation() -> Explanation:
    return explained_hat()


def data_of(document: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_numbers_in_the_page_add_up(explanation: Explanation) -> None:
    data = data_of(viewer_html(explanation, NAMES))
    assert [one["index"] for one in data["classes"]] == explanation.target.tolist()
    assert data["classes"][0]["name"] == "hat"
    for one, expected in zip(data["classes"], explanation.contribution_map, strict=True):
        numbers = np.frombuffer(base64.b64decode(one["contributions"]), "<f4").astype(float)
        np.testing.assert_allclose(numbers, expected.flatten(), rtol=1e-5, atol=1e-8)
        error = abs(numbers.sum() + one["bias"] - one["logit"]) / abs(one["logit"] - data["logitBias"])
        assert error < 1e-5
        assert one["constantBias"] == one["bias"]


def test_the_document_needs_no_network(explanation: Explanation) -> None:
    document = viewer_html(explanation, NAMES, "hat.jpg")
    assert "default-src 'none'" in document
    assert not re.findall(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", document)
    assert set(re.findall(r'\b(?:src|href)="([^"]*)"', document)) == {"data:,"}


def test_hostile_names_and_titles_end_no_element() -> None:
    document = viewer_html(small(), [HOSTILE] * 10, HOSTILE)
    assert "<img" not in document and document.count("</script>") == 2
    assert document.count('id="data"') == 1
    data = data_of(document)
    assert data["classes"][0]["name"] == data["title"] == HOSTILE


def test_five_classes_of_224_pixels_fit_a_mail() -> None:
    x = real_image(224)
    model = bcosify(timm.create_model("test_resnet"), BcosConfig.finetune(b=2)).eval()
    document = viewer_html(Explanation.stack(explain_targets(enliven(model, x), x, top=5)))
    assert len(document.encode()) <= 2.5e6


def test_a_class_asked_twice_is_shown_once() -> None:
    one = small(classes=2)
    data = data_of(viewer_html(Explanation.stack([one, one[1]])))
    assert [c["index"] for c in data["classes"]] == one.target.tolist()


def test_a_difference_to_open_with() -> None:
    one = small(classes=3)
    first, second, third = one.target.tolist()
    assert data_of(viewer_html(one))["against"] is None
    assert data_of(viewer_html(one, versus=third))["against"] == 2
    for wrong in (first, 10):
        text = f"versus={wrong}: choose one of the explained classes [{first}, {second}"
        with pytest.raises(InputError, match=re.escape(text)):
            viewer_html(one, versus=wrong)


def test_the_scale_that_the_page_opens_with(tmp_path: Path) -> None:
    one = small()  # of 32 × 32 pixels
    assert [data_of(viewer_html(one, scale=scale))["scale"] for scale in (None, 1, 8, 16)] == [4, 1, 8, 16]
    assert data_of(viewer_html(one))["scales"] == [1, 2, 4, 8, 16]
    save_viewer(one, tmp_path / "page.html", scale=2)
    assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["scale"] == 2
    for wrong in (3, 32, 6):
        text = f"scale={wrong}: for images of 32 × 32 pixels, the viewer's cells have a side of 1, 2, 4, 8, 16 pixels"
        with pytest.raises(InputError, match=text):
            viewer_html(one, scale=wrong)
    for wrong in (0, 2.0, "4", True):
        with pytest.raises(InputError, match=r"scale=.* a whole number from 1"):
            viewer_html(one, scale=wrong)


def test_what_the_page_cannot_show() -> None:
    x = real_image(32, 2)
    model = enliven(timm.create_model("bcos_cnn9"), x)
    one = explain(model, x[:1])
    infinite = replace(one, logits=one.logits / 0)
    layer = next(name for name, module in model.named_modules() if isinstance(module, BcosConv2d))
    wrong = {
        "the viewer shows one image": explain(model, x),
        "units of layer": explain(model, x[:1], layer=layer),
        "subtracts classes itself": contrast(model, x[:1], 0, 1),
        "not directions or parts of an output map": explain(model, x[:1], {0, 1}),
        "numbers that are not finite": infinite,
    }
    for text, explanation in wrong.items():
        with pytest.raises(InputError, match=text):
            viewer_html(explanation)


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    one = small()
    save_viewer(one, tmp_path / "new" / "page.html", title="Größe")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == viewer_html(one, title="Größe")
    with pytest.raises(InputError, match="1 or 3 image channels"):
        save_viewer(replace(one, weights=one.weights[:, :4], inputs=one.inputs[:, :4]), tmp_path / "other.html")
    with pytest.raises(InputError, match="a directory: name a file"):
        save_viewer(one, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
