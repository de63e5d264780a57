"""Loading models for the command line: the Hub without a connection, and checkpoints of train.py."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from timm_bcos import CheckpointError, InputError, NotFineTunedWarning, explain
from timm_bcos.attribution.registry import AttributionModel
from timm_bcos.models import loading
from timm_bcos.models.loading import load_model, load_plain_model


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "hf-hub:org/net"])
def test_a_hub_that_cannot_be_reached_fails_at_once(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub's client, which is called by `timm.create_model`, would retry for a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("no download is tried"))
    repository = "org/net" if ":" in name else "timm/resnet18.a1_in1k"
    message = f"Hugging Face Hub cannot be reached .* and its cache has no files of {repository}"
    with pytest.raises(CheckpointError, match=message + "; give a file with --checkpoint"):
        load_model(name)
    with pytest.raises(InputError, match=message):
        load_plain_model(name)


def test_cached_and_embedded_weights_need_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("bcos_cifar_resnet20", "local-dir:somewhere", "nowhere"):
        loading._check_hub(name)
    cached: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: cached.append(name))
    loading._check_hub("resnet18")
    assert cached == ["timm/resnet18.a1_in1k"]


def save_checkpoint(path: Path, model: nn.Module, name: str, **given: Any) -> None:
    """A checkpoint as train.py writes it."""
    arguments = argparse.Namespace(model=name, num_classes=4, model_kwargs={}, **given)
    torch.save(dict(state_dict=model.state_dict(), args=arguments), path)


@pytest.mark.parametrize(
    ("given", "is_changed"),
    [
        (dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]), True),
        (dict(mean=[0.5, 0.5, 0.5], std=None), True),
        (dict(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]), False),
        (dict(mean=None, std=None), False),
    ],
)
def test_normalized_training_of_bcos_models_warns(given: dict[str, Any], is_changed: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pth.tar", timm.create_model("bcos_cnn9", num_classes=4), "bcos_cnn9", **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(checkpoint=tmp_path / "last.pth.tar")
    found = [str(one.message) for one in caught if one.category is NotFineTunedWarning]
    assert len(found) == is_changed
    assert all("was trained with --mean 0.5 0.5 0.5" in text and "pixels in [0, 1]" in text for text in found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(bce_loss=True), "sigmoid"),
        (dict(bce_loss=True, smoothing=0.1), "sigmoid"),
        (dict(bce_loss=True, smoothing=0.0), "softmax"),  # train.py then ignores --bce-loss
        (dict(bce_loss=True, smoothing=0.0, cutmix=1.0), "sigmoid"),
        (dict(bce_loss=True, jsd_loss=True), "softmax"),
        (dict(bce_loss=False), "softmax"),
        (dict(bce_loss=False, model_kwargs=dict(probability="sigmoid")), "sigmoid"),
        ({}, "sigmoid"),
    ],
    ids=str,
)
def test_probabilities_follow_the_loss_of_the_training(given: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model, path = timm.create_model("bcos_cnn9", num_classes=4), tmp_path / "last.pth.tar"
    args = argparse.Namespace(**{"model": "bcos_cnn9", "num_classes": 4, **given})
    torch.save(dict(state_dict=model.state_dict(), args=args), path)
    loaded = load_model(checkpoint=path).eval()
    x = torch.rand(2, 3, 32, 32)
    logits = loaded(x).detach()
    probability = logits.softmax(1) if expected == "softmax" else logits.sigmoid()
    torch.testing.assert_close(explain(loaded, x).probability, probability)
    torch.testing.assert_close(AttributionModel(loaded).probability(x), probability)  # of the pointing game


def test_a_training_from_a_plain_model_keeps_its_terms(tmp_path: Path) -> None:
    plain = timm.create_model("test_resnet", num_classes=4)
    for pretrained, license in ((True, plain.pretrained_cfg["license"]), (False, None)):
        save_checkpoint(tmp_path / "last.pth.tar", plain, "test_resnet", pretrained=pretrained)
        cfg = load_model(checkpoint=tmp_path / "last.pth.tar").pretrained_cfg
        assert cfg["license"] == license and not cfg["tag"] and not cfg["hf_hub_id"]
        assert list(cfg["notes"]) == ["base model: test_resnet.r160_in1k"] * pretrained


def test_plain_models_are_normalized_as_in_training(tmp_path: Path) -> None:
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    half = [0.5, 0.5, 0.5]
    save_checkpoint(tmp_path / "last.pth.tar", plain, "test_resnet", mean=half, std=half)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFineTunedWarning)
        converted = load_model(checkpoint=tmp_path / "last.pth.tar").eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(converted(x), plain((x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
