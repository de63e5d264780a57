"""B, γ, T and their like travel with the weights, and weights of another function are refused."""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from torch import Tensor, nn

import timm_bcos
from tests.helpers import real_image
from timm_bcos import BcosConfig, CheckpointError, NotFineTunedWarning, bcosify
from timm_bcos.conversion.settings import SETTINGS
from timm_bcos.models.loading import load_model
from timm_bcos.weights.catalog import EMBEDDED
from timm_bcos.weights.readers import load_weights

CLOTHES = str(EMBEDDED["bcos_efficientnet_lite0.clothing"]["file"])


def small(**changes: object) -> nn.Module:
    return timm.create_model("bcosify", arch="test_resnet", num_classes=4, **{"b": 1.5, **changes}).eval()


def settings(weights: dict[str, Tensor]) -> dict:
    return json.loads(bytes(weights[SETTINGS].tolist()))


def test_weights_say_what_they_are_of() -> None:
    model = timm.create_model("bcos_resnet18", num_classes=3, temperature=5.0)
    weights = model.state_dict()
    found = settings(weights)
    assert list(weights)[-1] == SETTINGS
    assert (found["b"], found["max_out"], found["gamma_scale"], found["temperature"]) == (2.0, 2, 100, 5.0)
    assert not found["antialias"] and found["images"] == {"conv1": dict(mean=None, std=None)}


# What is other in the network than in the weights, and both values as the error names them.
OTHERS = {
    "b": (dict(b=2.0), "b=1.5", "b=2.0"),
    "gamma": (dict(gamma=3.0), "gamma=1.0", "gamma=3.0"),
    "temperature": (dict(temperature=7.0), "temperature=1.0", "temperature=7.0"),
    "logit_bias": (dict(logit_bias=-2.0), "logit_bias=None", "logit_bias=-2.0"),
    "antialias": (dict(antialias=True), "antialias=False", "antialias=True"),
    "stem": (dict(stem="encoded"), r"mean=\[0.5, 0.5, 0.5\]", "mean=None"),
    "mean": (dict(mean=(0.4,), std=(0.5,)), r"mean=\[0.5, 0.5, 0.5\]", r"mean=\[0.4, 0.4, 0.4\]"),
    "max_pool": (dict(max_pool="average"), "max_pool='keep'", "max_pool='average'"),
    "activation": (dict(activation="remove"), "activation='keep'", "activation='remove'"),
    "normalize_weight": (dict(normalize_weight=True), "normalize_weight=False", "normalize_weight=True"),
    "linear": (dict(linear=("layer1*",)), r"linear=\[.*qkv.*\]", r"linear=\['layer1\*'\]"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_function_are_refused(name: str, tmp_path: Path) -> None:
    changes, theirs, own = OTHERS[name]
    weights, other = small().state_dict(), small(**changes)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save(dict(state_dict={f"module.{key}": value for key, value in weights.items()}), tmp_path / "last.pth.tar")
    wrapped = nn.Sequential(other)
    loading = {
        "torch": lambda: other.load_state_dict(weights),
        "a part of them": lambda: other.load_state_dict(weights, strict=False),
        "within another network": lambda: wrapped.load_state_dict({f"0.{key}": t for key, t in weights.items()}),
        "timm": lambda: load_checkpoint(other, str(tmp_path / "last.pth.tar")),
        "this package": lambda: load_weights(other, tmp_path / "weights.safetensors"),
    }
    for load in loading.values():
        with pytest.raises(CheckpointError, match=rf"weights are of .*{theirs}.* this model has .*{own}"):
            load()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_the_clothes_weights_are_refused_by_the_network_for_everyday_photos() -> None:
    model = timm.create_model("bcos_efficientnet_lite0", num_classes=10)
    with pytest.raises(CheckpointError, match=r"b=2.0, antialias=True.*b=1.25, antialias=False"):
        model.load_state_dict(load_file(CLOTHES))
    same = timm.create_model(
        "bcosify", arch="tf_efficientnet_lite0", num_classes=10, b=2.0, bias="reference", stem="encoded",
        antialias=True, logit_bias=-2.2,
    ).eval()  # fmt: skip
    same.load_state_dict(load_file(CLOTHES))
    x = real_image(64)
    expected = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()(x)
    torch.testing.assert_close(same(x), expected)


def test_another_function_may_start_from_weights_when_that_is_said(tmp_path: Path) -> None:
    model, other = small(), small(b=2.0)
    weights = model.state_dict()
    other.load_state_dict({key: value for key, value in weights.items() if key != SETTINGS}, strict=True)
    save_file(weights, tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=4)
    with pytest.warns(NotFineTunedWarning, match=r"trained with b=1.5: with b=2.0 it is another function"):
        started = small(b=2.0, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(started.conv1[0].weight, model.conv1[0].weight)
    assert settings(started.state_dict())["b"] == 2.0
    with pytest.raises(CheckpointError, match=r"antialias=True.*antialias=False"):
        timm.create_model(
            "bcosify", arch="test_resnet", num_classes=4, b=1.5, pretrained=True,
            pretrained_cfg_overlay=dict(state_dict=small(antialias=True).state_dict(), num_classes=4),
        )  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDED)
def test_older_files_of_the_embedded_weights_load(name: str, tmp_path: Path) -> None:
    weights = load_file(str(EMBEDDED[name]["file"]))
    expected = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(weights[SETTINGS], expected.state_dict()[SETTINGS])
    del weights[SETTINGS]
    save_file(weights, tmp_path / "old.safetensors")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / "old.safetensors"))
    again = timm.create_model(name)
    again.load_state_dict(weights)
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) and torch.equal(value, again.state_dict()[key])


def test_a_classifier_for_other_classes_is_no_contradiction() -> None:
    weights = timm.create_model("bcosv2_resnet18", num_classes=5).state_dict()
    overlay = dict(state_dict=weights, num_classes=5)
    model = timm.create_model("bcosv2_resnet18", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])
    model.reset_classifier(5)
    model.load_state_dict(weights)
    model.reset_classifier(0)
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})


def test_color_weights_for_grey_images_are_no_contradiction() -> None:
    weights = small().state_dict()
    overlay = dict(state_dict=weights, num_classes=4)
    gray = small(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    expected = weights["conv1.0.weight"].unflatten(1, (2, 3)).sum(2)
    torch.testing.assert_close(gray.conv1[0].weight.data, expected)


def test_weights_of_a_fused_network_are_refused_by_the_network_itself() -> None:
    model = timm.create_model("bcos_cnn9").eval()
    with pytest.raises(CheckpointError, match=r"fused=True.*fused=False"):
        model.load_state_dict(timm_bcos.fuse(model).state_dict())


@pytest.mark.parametrize("kind", ["a stem", "a reader", "a reader before a sequence"])
def test_settings_survive_averages_half_precision_and_copies(kind: str, tmp_path: Path) -> None:
    def create(b: float) -> nn.Module:
        if kind == "a reader before a sequence":
            layers = [nn.Unfold(2, stride=2), nn.Flatten(), nn.Linear(12 * 16, 4)]
            return bcosify(nn.Sequential(*layers), BcosConfig(b=b, mean=(0.5,), std=(0.5,)))
        arch = "test_resnet" if kind == "a stem" else "test_mambaout"
        return timm.create_model("bcosify", arch=arch, b=b, num_classes=4)

    model = create(1.5)
    weights = model.half().state_dict()
    averaged = {key: value.double().float() for key, value in weights.items()}  # as avg_checkpoints.py does
    create(1.5).load_state_dict(averaged)
    with pytest.raises(CheckpointError, match=r"b=1.5.*b=2.0"):
        create(2.0).load_state_dict(averaged)


def test_checkpoints_of_compiled_networks_load(tmp_path: Path) -> None:
    model = small()
    weights = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / "compiled.pth")
    part = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in model.state_dict().items()}
    torch.save(part, tmp_path / "part.pth")
    x = torch.rand(1, 3, 64, 64)
    for name in ("compiled", "part"):
        fresh = small()
        load_weights(fresh, tmp_path / f"{name}.pth")
        torch.testing.assert_close(fresh(x), model(x))
    compiled = small()
    compiled.layer1 = torch.compile(compiled.layer1, backend="eager")
    load_weights(compiled, tmp_path / "compiled.pth")
    assert all(map(torch.equal, compiled.layer1.parameters(), model.layer1.parameters()))
    arguments = {"model": "bcosify", "num_classes": 4, "model_kwargs": dict(arch="test_resnet", b=1.5)}
    torch.save(dict(state_dict=weights, args=argparse.Namespace(**arguments)), tmp_path / "last.pth.tar")
    torch.testing.assert_close(load_model(checkpoint=tmp_path / "last.pth.tar").eval()(x), model(x))


def test_a_classifier_keeps_the_logit_bias_of_its_weights(tmp_path: Path) -> None:
    trained = timm.create_model("bcos_cnn9", num_classes=4, logit_bias=-1.5).eval()
    save_file(trained.state_dict(), tmp_path / "own.safetensors")
    create = partial(
        timm.create_model,
        "bcos_cnn9",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "own.safetensors")),
    )
    loaded = create(num_classes=4).eval()
    assert loaded.fc.logit_bias == loaded.bcos_config.logit_bias == -1.5
    torch.testing.assert_close(loaded(real_image(32)), trained(real_image(32)), rtol=0, atol=0)
    assert torch.equal(loaded.state_dict()["bcos_settings"], trained.state_dict()["bcos_settings"])
    from_file = load_model("bcos_cnn9", tmp_path / "own.safetensors")
    assert from_file.fc.logit_bias == -1.5
    with pytest.warns(NotFineTunedWarning, match="logit_bias=-1.5"):
        assert create(num_classes=4, logit_bias=0.0).fc.logit_bias == 0
    assert create(num_classes=7).fc.logit_bias == pytest.approx(-math.log(6))
