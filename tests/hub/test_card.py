"""What a model card says of a network, to readers and to the Hub."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData

import timm_bcos
from tests.helpers import PHOTOS, hub_server
from timm_bcos import Card, Evaluation
from timm_bcos.hub.card import find_base_model, measure_stats

# parameters (M), GMACs, activations (M) at 224 pixels, from timm's results/benchmark-infer-*-pt240-cu124-rtx3090.csv
TIMM_STATS = {
    "resnet50": (25.56, 4.11, 11.11),
    "vit_small_patch16_224": (22.05, 4.61, 11.95),
    "densenet121": (7.98, 2.87, 6.90),
    "convnext_tiny": (28.59, 4.47, 13.44),
    "swin_tiny_patch4_window7_224": (28.29, 4.51, 17.06),
    "efficientnet_lite0": (4.65, 0.40, 6.74),
}


@pytest.mark.parametrize("name", TIMM_STATS)
def test_stats_are_those_of_timm(name: str) -> None:
    """timm also counts norms, some hundredths of a GMAC."""
    parameters, gmacs, activations = TIMM_STATS[name]
    stats = measure_stats(timm.create_model(name).eval())
    assert stats.parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    assert stats.activations / 1e6 == pytest.approx(activations, abs=0.0051)
    assert 0 <= gmacs - stats.macs / 1e9 < 0.045
    assert stats.lines()["Image size"] == "224 x 224"


def test_stats_of_a_layer_counted_by_hand() -> None:
    """At B = 1 there are no norms of patches to compute."""
    model = timm.create_model("bcos_cnn9", b=1, max_out=1, num_classes=4).eval()
    channels = [(6, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 4)]
    sides = (32, 32, 16, 16, 16, 8, 8, 8)
    macs = sum(side**2 * a * b * 9 for (a, b), side in zip(channels, sides, strict=False)) + 8 * 8 * 256 * 4
    stats = measure_stats(model)
    assert stats.parameters == sum(a * b * 9 for a, b in channels[:-1]) + 256 * 4
    assert stats.macs == macs
    assert stats.lines()["Image size"] == "32 x 32"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder = tmp_path_factory.mktemp("card")
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    measured = Evaluation(12.5, "Clothing photos, test split", "a command")
    card = Card("A test.", measured, "cc0-1.0", ["ask first"], datasets=["imagenet-1k", "org/clothes"],
                base_model="timm/test_resnet.r160_in1k")  # fmt: skip
    timm_bcos.save_repository(model, folder, "org/name", card)
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_the_card(card: ModelCard) -> None:
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "cc0-1.0", "image-classification")
    assert data.datasets == ["imagenet-1k", "org/clothes"]
    assert data.base_model == "timm/test_resnet.r160_in1k"
    assert data.tags == ["timm", "image-classification", "b-cos", "explainable-ai"]
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 12.5)
    assert (result.dataset_name, result.dataset_type) == ("Clothing photos, test split", "clothing-photos-test-split")


def test_readers_meet_the_import_first(card: ModelCard) -> None:
    title, _, rest = card.text.lstrip().partition("\n")
    assert title == "# name"
    note, code = rest.partition("```python\n")[::2]
    assert "Unknown model (bcosify)" in note
    assert code.startswith('import timm, timm_bcos\nmodel = timm.create_model("hf-hub:org/name", pretrained=True)\n```')
    for line in ("Params (M): 0.37", "GMACs: 0.11", "Activations (M): 0.64", "Image size: 160 x 160"):
        assert f"\n  - {line}\n" in card.text
    for part in ("bcosify of test_resnet", "12.50 % top-1 on Clothing photos", "ask first.", "bohle2022bcos"):
        assert part in card.text


def test_a_card_with_nothing_to_say(tmp_path: Path) -> None:
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    timm_bcos.save_repository(model, tmp_path, "org/name")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict().keys() == {"library_name", "license", "pipeline_tag", "tags"}
    for part in ("Accuracy", "explanation.png", "Dataset", "Base model"):
        assert part not in card.text


def test_the_code_of_the_card_runs(hub: hub_server.Hub, python: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    timm_bcos.save_repository(timm.create_model("bcos_cnn9", num_classes=4).eval(), folder, "org/name")
    hub.repositories["org/name"] = hub_server.Repository({file.name: file.read_bytes() for file in folder.iterdir()})
    (tmp_path / "photo.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert python(f"{block}\nprint(type(model).__name__)").strip() == "BcosCnn9"
    assert (tmp_path / "why.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(pretrained=True, model_kwargs=dict(arch="resnet50")), "timm/resnet50.a1_in1k"),
        (dict(pretrained=True, model_kwargs=dict(arch="hf-hub:org/plain@main")), "org/plain"),
        (dict(pretrained=True, model_kwargs=dict(arch="local-dir:somewhere")), None),
        (dict(pretrained=False, model_kwargs=dict(arch="resnet50")), None),
        (dict(pretrained=True, pretrained_path="x.pth", model_kwargs=dict(arch="resnet50")), None),
        (dict(pretrained=True, initial_checkpoint="x.pth", model_kwargs=dict(arch="resnet50")), None),
        (dict(pretrained=True, model="bcos_cnn9"), None),
        (dict(pretrained=True, model="from_a_plugin"), None),
    ],
)
def test_training_checkpoints_tell_the_base_model(arguments: dict, expected: str | None, tmp_path: Path) -> None:
    args = argparse.Namespace(**{"model": "bcosify", "num_classes": 4, **arguments})
    torch.save({"state_dict": {}, "args": args}, tmp_path / "last.pth.tar")
    assert find_base_model(checkpoint=tmp_path / "last.pth.tar") == expected


def test_published_weights_are_the_base_model_of_a_conversion() -> None:
    assert find_base_model("resnet50") == "timm/resnet50.a1_in1k"
    assert find_base_model("hf-hub:org/plain") == "org/plain"
    assert find_base_model("bcos_efficientnet_lite0") is None
    assert find_base_model() is None


def test_a_checkpoint_writes_its_base_model_on_the_card(tmp_path: Path) -> None:
    kwargs = dict(arch="test_resnet")
    model = timm.create_model("bcosify", num_classes=4, **kwargs)
    args = argparse.Namespace(model="bcosify", model_kwargs=kwargs, num_classes=4, pretrained=True)
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    timm_bcos.save_repository(tmp_path / "last.pth.tar", tmp_path / "known", "org/name")
    assert ModelCard.load(tmp_path / "known" / "README.md").data.base_model == "timm/test_resnet.r160_in1k"
    timm_bcos.save_repository(tmp_path / "last.pth.tar", tmp_path / "told", "org/name", Card(base_model="org/other"))
    assert ModelCard.load(tmp_path / "told" / "README.md").data.base_model == "org/other"
