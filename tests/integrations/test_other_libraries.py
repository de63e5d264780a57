"""The examples of docs/other-libraries.md that need libraries which are no dependencies, each if it is installed."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import timm_bcos
from tests.helpers import ROOT, real_image
from tests.helpers.docs_blocks import Block, read_blocks
from timm_bcos import BcosConfig, Explanation, InexactWarning, bcosify

BLOCKS = [block for block in read_blocks(ROOT / "docs" / "other-libraries.md") if block.language == "python"]
NEEDS = re.compile(r"needs (\w+); tests/integrations/test_other_libraries\.py runs it")


def library_of(block: Block) -> str | None:
    found = NEEDS.match(block.reason)
    return found[1] if found else None


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the first example defines."""
    names: dict[str, Any] = {"__name__": "__docs__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(BLOCKS[0].text, names)
    return names


def run(library: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the example of a library in a copy of the names.

    The wheels of some libraries issue warnings of their own when they are imported.
    """
    (block,) = (block for block in BLOCKS if library_of(block) == library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library, reason=f"{library} is not installed")
        copy = dict(names)
        exec(compile(block.text, str(block), "exec"), copy)
    return copy


def test_every_library_has_a_test() -> None:
    assert {library_of(block) for block in BLOCKS if block.mark} - {None} == {
        "pytorch_grad_cam", "quantus", "shap", "tensorboard", "zennit",
    }  # fmt: skip


def test_pytorch_grad_cam_and_our_grad_cam_agree(names: dict[str, Any]) -> None:
    pytest.importorskip("captum")
    maps = run("pytorch_grad_cam", names)["maps"]
    model = names["model"]
    ours = timm_bcos.attribute(model, names["x"], names["targets"], "gradcam", layer=model.bn2).clamp(min=0)
    for found, expected in zip(maps, ours.numpy(), strict=True):
        assert found.shape == (160, 160) and found.min() >= 0 and found.max() == pytest.approx(1, abs=1e-4)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95  # interpolated in another way


def test_quantus_scores_each_image(names: dict[str, Any]) -> None:
    np.random.seed(0)
    scores = run("quantus", names)["scores"]
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)


def test_shap_explains_the_predicted_class(names: dict[str, Any]) -> None:
    found = run("shap", names)
    assert found["values"].shape == (2, 3, 160, 160, 1) and np.isfinite(found["values"]).all() and found["values"].any()
    assert found["classes"][:, 0].tolist() == names["model"](names["x"]).argmax(1).tolist()


def test_tensorboard_takes_pictures(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(Explanation, "to_rgb"):
        pytest.skip("needs Explanation.to_rgb")
    monkeypatch.chdir(tmp_path)
    run("tensorboard", names)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["contributions", "explanation"]
    assert (events.Images("explanation")[0].height, events.Images("explanation")[0].width) == (160, 320)  # two in a row


def test_zennit_in_explanation_mode(names: dict[str, Any]) -> None:
    assert run("zennit", names)["weights"].shape == (2, 6, 160, 160)  # the example compares them


def test_zennits_rules_warn_of_bcos_layers() -> None:
    """What the page warns of: relevance that is far from the logit. Plain models are left alone."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlusFlat

    plain = timm.create_model("test_resnet", num_classes=4).eval()
    x = real_image(64).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        with Gradient(plain, EpsilonPlusFlat()) as attributor:
            attributor(x, torch.eye(4)[:1])
    model = bcosify(plain, BcosConfig.finetune()).eval()
    text = (
        r"zennit's rule Flat takes a BcosStem for a linear layer.*use timm_bcos\.explain, see docs/other-libraries\.md"
    )
    with pytest.warns(InexactWarning, match=text), Gradient(model, EpsilonPlusFlat()) as attributor:
        attributor(x, torch.eye(4)[:1])
