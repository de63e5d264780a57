"""The networks that come with the package: they load offline, are exact, and are as accurate as they say."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import PHOTOS, ROOT, assert_exact, real_image
from tests.helpers.slow import slow_but_for
from timm_bcos.cli.app import app
from timm_bcos.data.datasets import load_dataset
from timm_bcos.evaluation.pointing_game import confidences
from timm_bcos.models.class_names import class_names
from timm_bcos.models.loading import load_model
from timm_bcos.weights.catalog import DEFAULT_MODEL, EMBEDDED

SHARED = ROOT.parent / "shared" / "data"
TEST_SPLITS = {"in1k": "imagenet_photos.tar", "clothing": "clothing/test.tar", "cifar10": "cifar10/test.tar"}


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_load_without_a_download_and_are_exact(name: str) -> None:
    path = Path(EMBEDDED[name]["file"])
    assert path.stat().st_size < 10_000_000
    model = timm.create_model(name, pretrained=True).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    size = model.pretrained_cfg["input_size"][-1]
    assert_exact(model, real_image(size, 2), 1e-5)
    assert timm_bcos.check(model).exact
    assert_exact(model.double(), real_image(size, 2, torch.float64), 1e-12)
    assert len(class_names(model)) == model.num_classes == (1000 if name.endswith("in1k") else 10)


@pytest.mark.parametrize("name", slow_but_for(["bcos_cifar_resnet20.cifar10"], EMBEDDED))
def test_they_are_as_accurate_as_they_say(name: str) -> None:
    split = SHARED / TEST_SPLITS[name.partition(".")[2]]
    if not split.exists():
        pytest.skip(f"{split.name} is in ../shared, which is not here")
    model = load_model(name).eval()
    class_map = str(SHARED / "imagenet_class_map.txt") if model.num_classes == 1000 else ""
    dataset = load_dataset(str(split), model.num_classes, class_map=class_map)
    items = list(confidences(model, dataset, progress=False))
    accuracy = 100 * sum(item.predicted == item.label for item in items) / len(items)
    (said,) = re.findall(r"([\d.]+) %", EMBEDDED[name]["description"])
    assert accuracy == pytest.approx(float(said), abs=0.06)


def test_they_can_be_fine_tuned_for_other_classes() -> None:
    model = timm.create_model(DEFAULT_MODEL, pretrained=True, num_classes=3).eval()
    trained = load_model().state_dict()
    own = model.state_dict()
    fresh = [name for name in own if own[name].shape != trained[name].shape]
    assert fresh == ["classifier.weight"]
    kept = [name for name in own if name not in (*fresh, "bcos_settings")]
    assert all(torch.equal(own[name], trained[name]) for name in kept)
    assert model.classifier.logit_bias == pytest.approx(-math.log(2))


def test_explain_needs_no_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(PHOTOS / "coffee.jpg"), "--out", str(tmp_path), "--top", "2"])
    assert result.exit_code == 0, result.output
    names = [line.split()[0] for line in result.output.splitlines() if "probability" in line]
    assert len(names) == 2 and set(names) <= set(class_names(load_model()))
    assert (tmp_path / "coffee.png").exists()


def test_a_published_copy_does_not_name_this_machine(tmp_path: Path) -> None:
    timm_bcos.save_repository(load_model("bcos_efficientnet_lite0.clothing"), tmp_path, "org/clothes")
    config = (tmp_path / "config.json").read_text()
    assert str(Path(timm_bcos.__file__).parent) not in config
    assert '"bcos_efficientnet_lite0"' in config and '"t-shirt"' in config


def test_a_tag_says_how_its_weights_were_made() -> None:
    default = timm.create_model(DEFAULT_MODEL.partition(".")[0])
    assert default.pretrained_cfg["tag"] == "in1k" and default.num_classes == 1000
    assert (default.bcos_config.b, default.bcos_config.bias) == (1.25, "reference")
    clothing = timm.create_model("bcos_efficientnet_lite0.clothing")
    assert (clothing.bcos_config.b, clothing.bcos_config.bias, clothing.num_classes) == (2.0, "reference", 10)
    assert clothing.bcos_config.antialias and not default.bcos_config.antialias
    assert timm.create_model("bcos_efficientnet_lite0.clothing", b=1.5).bcos_config.b == 1.5


def test_a_published_copy_of_tagged_weights_is_loaded_as_such(tmp_path: Path) -> None:
    """Its config names the architecture; the conversion of its tag must not be lost."""
    x = real_image(64)
    for name in ("bcos_efficientnet_lite0.in1k", "bcos_efficientnet_lite0.clothing"):
        model = load_model(name).eval()
        timm_bcos.save_repository(model, tmp_path / name, "org/copy")
        copy = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert copy.bcos_config == model.bcos_config
        torch.testing.assert_close(copy(x), model(x))
