"""Published folders in Hugging Face's transformers: by our import, and by `trust_remote_code=True` without it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import PHOTOS
from PIL import Image
from torch import nn

import timm_bcos
from timm_bcos.hub.repository import save_network
from timm_bcos.models.loading import load_model

transformers = pytest.importorskip("transformers")
NETWORKS: dict[str, dict] = {
    "bcos_efficientnet_lite0.clothing": dict(pretrained=True),
    "bcos_cnn9": dict(num_classes=4, b=1.5),
    "bcosify": dict(arch="test_resnet", num_classes=4, b=1.25, bias="gate", antialias=True),
    "bcosify, read": dict(arch="test_mambaout", num_classes=4),
}


@pytest.fixture(params=NETWORKS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    model = timm.create_model(request.param.partition(",")[0], **NETWORKS[request.param]).eval()
    labels = None if "pretrained" in NETWORKS[request.param] else ["ant", "bee", "cow", "doe"]
    timm_bcos.save_repository(model, tmp_path / "net", "org/net", timm_bcos.Card(licence="mit"), label_names=labels)
    return model, tmp_path / "net"


def expected(model: nn.Module) -> torch.Tensor:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return model(transform(Image.open(PHOTOS / "coffee.jpg").convert("RGB"))[None])[0]


def test_folders_load_as_any_timm_network(published: tuple[nn.Module, Path]) -> None:
    model, folder = published
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.rand(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x).logits, model(x), rtol=0, atol=0)
    assert wrapped.timm_model.bcos_config == model.bcos_config
    assert timm_bcos.explain(wrapped.timm_model, x[:1]).completeness_error.max() < 1e-3
    base = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(base(x).last_hidden_state, model.forward_features(x), rtol=0, atol=0)


def test_pipelines_classify_photos(published: tuple[nn.Module, Path]) -> None:
    model, folder = published
    classify = transformers.pipeline("image-classification", model=str(folder), top_k=2)
    found = classify(Image.open(PHOTOS / "coffee.jpg").convert("RGB"), function_to_apply="none")
    labels = json.loads((folder / "config.json").read_text())["label_names"]
    logits = expected(model)
    assert [one["label"] for one in found] == [labels[i] for i in logits.topk(2).indices]
    assert [one["score"] for one in found] == pytest.approx(logits.topk(2).values.tolist(), abs=2e-3)


@pytest.mark.parametrize("published", ["bcos_cnn9"], indirect=True)
def test_remote_code_needs_no_import_of_ours(
    published: tuple[nn.Module, Path], python: Callable[..., str], tmp_path: Path
) -> None:
    model, folder = published
    code = f"""
import torch
from transformers import AutoModel, AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
print(model.timm_model.bcos_config.b)
torch.save(model(torch.full((1, 3, 32, 32), 0.25)).logits.detach(), "found.pt")
assert AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval() is not None
classify = pipeline("image-classification", model={str(folder)!r}, trust_remote_code=True)
print(classify({str(PHOTOS / "coffee.jpg")!r}, top_k=1)[0]["label"])
model.save_pretrained("saved")
again = AutoModelForImageClassification.from_pretrained("saved", trust_remote_code=True).eval()
print((again(torch.full((1, 3, 32, 32), 0.25)).logits == torch.load("found.pt")).all().item())
"""
    printed = python(code).splitlines()
    label = ["ant", "bee", "cow", "doe"][int(expected(model).argmax())]
    assert [line for line in printed if line in ("1.5", label, "True")] == ["1.5", label, "True"], printed
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), model(torch.full((1, 3, 32, 32), 0.25)).detach())
    without = f"import transformers\ntransformers.AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=False)"
    assert "Unknown model (bcos_cnn9)" in python(without)


def test_the_config_says_each_thing_once(published: tuple[nn.Module, Path]) -> None:
    model, folder = published
    config = json.loads((folder / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["num_classes"] == model.num_classes
    assert config["pretrained_cfg"]["license"] == "mit" and "license: mit" in (folder / "README.md").read_text()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(expected(again), expected(model), rtol=0, atol=0)
    assert again.num_classes == model.num_classes and again.bcos_config == model.bcos_config
    assert load_model(f"local-dir:{folder}").num_classes == model.num_classes


def test_training_goes_on_in_transformers(tmp_path: Path) -> None:
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4, b=1.5)
    save_network(model, tmp_path)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    )
    loss = wrapped(torch.rand(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in wrapped.parameters())
    torch.testing.assert_close(wrapped.timm_model.conv1[0].weight, model.conv1[0].weight)
