"""The networks that come with the package: they load offline, are exact, and are as accurate as they say."""

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import PHOTOS, assert_exact, real_image
from typer.testing import CliRunner

import timm_bcos
from timm_bcos.cli.app import app
from timm_bcos.judging.pointing_game import confidences
from timm_bcos.models.classes import class_names
from timm_bcos.models.loading import load_model
from timm_bcos.weights.embedded import DEFAULT_NETWORK, EMBEDDED

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
TEST_SPLITS = {"clothing": "clothing/test.tar", "cifar10": "cifar10/test.tar"}


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_load_without_a_download_and_are_exact(name: str) -> None:
    path = Path(EMBEDDED[name]["file"])
    assert path.stat().st_size < 10_000_000
    model = timm.create_model(name, pretrained=True).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    size = model.pretrained_cfg["input_size"][-1]
    assert_exact(model, real_image(size, 2), 1e-5)
    assert_exact(model.double(), real_image(size, 2, torch.float64), 1e-12)
    assert len(class_names(model)) == model.num_classes == 10


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_are_as_accurate_as_they_say(name: str) -> None:
    split = SHARED / TEST_SPLITS[name.partition(".")[2]]
    if not split.exists():
        pytest.skip(f"{split.name} is in ../shared, which is not here")
    model, dataset = load_model(name).eval(), timm.data.create_dataset("", root=str(split))
    items = list(confidences(model, dataset, progress=False))
    accuracy = 100 * sum(item.predicted == item.label for item in items) / len(items)
    (said,) = re.findall(r"([\d.]+) %", EMBEDDED[name]["description"])
    assert accuracy == pytest.approx(float(said), abs=0.06)


def test_they_can_be_fine_tuned_for_other_classes() -> None:
    model = timm.create_model(DEFAULT_NETWORK, pretrained=True, num_classes=3).eval()
    trained = load_model().state_dict()
    own = model.state_dict()
    fresh = [name for name in own if own[name].shape != trained[name].shape]
    assert fresh == ["classifier.weight"]
    assert all(torch.equal(own[name], trained[name]) for name in own if name not in fresh)


def test_explain_needs_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(PHOTOS / "coffee.jpg"), "--out", str(tmp_path), "--top", "2"])
    assert result.exit_code == 0, result.output
    names = [line.split()[0] for line in result.output.splitlines() if "probability" in line]
    assert len(names) == 2 and set(names) <= set(class_names(load_model()))
    assert (tmp_path / "coffee.png").exists()


def test_a_published_copy_does_not_name_this_machine(tmp_path: Path) -> None:
    timm_bcos.save_repository(load_model(), tmp_path, "org/clothes")
    config = (tmp_path / "config.json").read_text()
    assert str(Path(timm_bcos.__file__).parent) not in config
    assert '"bcos_efficientnet_lite0"' in config and '"t-shirt"' in config
