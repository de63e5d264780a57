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

from timm_bcos import CheckpointError, InputError, NotFineTunedWarning
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


def test_plain_models_are_normalized_as_in_training(tmp_path: Path) -> None:
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    half = [0.5, 0.5, 0.5]
    save_checkpoint(tmp_path / "last.pth.tar", plain, "test_resnet", mean=half, std=half)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFineTunedWarning)
        converted = load_model(checkpoint=tmp_path / "last.pth.tar").eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(converted(x), plain((x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
