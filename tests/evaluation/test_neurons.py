"""Units' strongest images, against all activations at once; entropies worked by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_bcos
from tests.helpers import LOADING, PHOTOS, command, normalized
from timm_bcos import InputError, MethodError, TargetError
from timm_bcos.data.datasets import image_loader
from timm_bcos.evaluation.neurons import Strongest, _crop, find_strongest, label_entropy, plot_label_counts, plot_wall
from timm_bcos.nn.module_utils import hooked


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for c in range(3):
        folder = tmp_path / "data" / "test" / f"class{c}"
        folder.mkdir(parents=True)
        for k, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))):
            Image.open(photo).convert("RGB").resize((64, 64)).rotate(50 * c).save(folder / f"{c}_{k}.png")
    return tmp_path / "data"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 64, 64), crop_pct=1.0)
    return timm.create_model("bcosify", arch="test_resnet", num_classes=3, pretrained_cfg_overlay=overlay).eval()


def test_one_pass_finds_what_all_activations_at_once_say(model: nn.Module, photos: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    found = find_strongest(model, dataset, "layer2", 4, batch_size=2, progress=False)
    images, labels = zip(*map(image_loader(model, dataset), range(9)), strict=True)
    activations: list[torch.Tensor] = []
    model.layer2.register_forward_hook(lambda module, args, output: activations.append(output))
    with torch.no_grad():
        model(torch.stack(images))
    peaks = activations[0].amax((2, 3)).T
    values, indices = peaks.topk(4, dim=1)
    torch.testing.assert_close(found.values, values)
    alive = (values > 0).all(1)  # images to which a unit does not answer come in any order
    assert alive.sum() > len(alive) / 2
    assert torch.equal(found.indices[alive], indices[alive])
    assert torch.equal(found.labels, torch.tensor(labels)[found.indices])
    assert found.most_active(2, best=4) == values.mean(1).topk(2).indices.tolist()
    unit = found.most_active(1)[0]
    explanation = timm_bcos.explain(model, torch.stack(images)[indices[unit, :1]], unit, layer="layer2")
    torch.testing.assert_close(explanation.logit[0], values[unit, 0])


def test_units_of_networks_whose_channels_come_last(photos: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("bcosify", arch="swin_tiny_patch4_window7_224", num_classes=3, depths=(1, 1),
                              embed_dim=24, num_heads=(2, 2), img_size=56).eval()  # fmt: skip
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 56, 56)}
    found = find_strongest(model, dataset, "layers.0", 2, progress=False)
    assert len(found.values) == 24
    x = image_loader(model, dataset)(int(found.indices[5, 0]))[0][None]
    torch.testing.assert_close(timm_bcos.explain(model, x, 5, layer="layers.0").logit[0], found.values[5, 0])


@pytest.mark.parametrize(
    ("arch", "options", "layer", "units", "axis"),
    [
        ("convnext_tiny", dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), "stages.0.blocks.0.mlp.fc1", 32, 3),
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1), embed_dim=24, num_heads=(2, 2), img_size=56),
         "patch_embed.proj", 24, 1),
        ("test_vit", dict(img_size=64), "blocks.1.mlp.fc1", 192, 2),
    ],
)  # fmt: skip
def test_units_are_where_the_layer_has_them(
    arch: str, options: dict[str, Any], layer: str, units: int, axis: int, photos: Path
) -> None:
    """Whatever format the network's own maps have; tokens have one position each."""
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    size = options.get("img_size", 64)
    model = timm.create_model(arch, num_classes=3, **options).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    found = find_strongest(model, dataset, layer, 2, progress=False)
    images = torch.stack([image_loader(model, dataset)(i)[0] for i in range(9)])
    outputs: list[torch.Tensor] = []
    with torch.no_grad(), hooked([model.get_submodule(layer)], lambda module, args, output: outputs.append(output)):
        model(normalized(images, model.pretrained_cfg))
    assert outputs[0].shape[axis] == units
    peaks = outputs[0].movedim(axis, 0).flatten(2).amax(2)
    torch.testing.assert_close(found.values, peaks.topk(2, dim=1).values)


def test_the_model_is_left_alone(model: nn.Module, photos: Path) -> None:
    """Nobody sees a hook, while a network runs or if the images cannot be read."""
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    hooks: list[int] = []
    model.layer3.register_forward_hook(lambda *_: hooks.append(len(model.layer2._forward_hooks)))

    class Watched(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 8:
                raise KeyboardInterrupt
            return dataset[index]

    with pytest.raises(KeyboardInterrupt):
        find_strongest(model, Watched(range(9)), "layer2", batch_size=2, progress=False)
    # four batches, and two passes that tell whether the encoding reaches the first layer
    assert hooks == [0] * 6 and not model.layer2._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_counts_below_one_and_nothing_to_look_at(model: nn.Module) -> None:
    for counts in (dict(k=0), dict(batch_size=0)):
        with pytest.raises(MethodError, match="=0: give a whole number from 1"):
            find_strongest(model, [], "layer2", progress=False, **counts)
    with pytest.raises(InputError, match="has no images"):
        find_strongest(model, [], "layer2", progress=False)


def test_one_sided_units_are_no_dead_ones() -> None:
    values = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    labels = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 0], [2, 2, 2]])
    assert Strongest("layer", values, labels, labels).most_one_sided(4, 3) == [3, 0]


def test_entropy_by_hand() -> None:
    labels = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
    expected = torch.tensor([0, 1, math.log(2) / math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(label_entropy(labels, 4), expected)


def test_units_and_labels_out_of_range() -> None:
    assert label_entropy(torch.zeros(2, 3, dtype=torch.int64), 1).tolist() == [0, 0]
    for label in (3, -1):
        with pytest.raises(TargetError, match=f"label {label}: there are 3 classes"):
            label_entropy(torch.tensor([[0, label]]), 3)
    strongest = Strongest("layer2", torch.rand(4, 2), torch.zeros(4, 2).long(), torch.zeros(4, 2).long())
    for draw in (lambda units: plot_wall(nn.Identity(), [], strongest, units),
                 lambda units: plot_label_counts(strongest, units, ["a", "b"])):  # fmt: skip
        with pytest.raises(TargetError, match="unit 4: layer 'layer2' has 4"):
            draw([1, 4])
        with pytest.raises(MethodError, match="units=0: give"):
            draw([])
    with pytest.raises(MethodError, match="images=0: give"):
        plot_wall(nn.Identity(), [], strongest, [1], images=0)


def test_crops_stay_inside() -> None:
    picture = torch.arange(90.0 * 90).reshape(90, 90, 1)
    assert torch.equal(_crop(picture, (0, 89)), picture[:30, 60:])
    assert torch.equal(_crop(picture, (45, 45)), picture[30:60, 30:60])


def test_layers_that_cannot_be_searched(model: nn.Module, photos: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    with pytest.raises(TargetError, match=r"'fc' has no spatial positions: it returns \(9, 3\)"):
        find_strongest(model, dataset, "fc", progress=False)
    with pytest.raises(TargetError, match="no layer 'layer9'"):
        find_strongest(model, dataset, "layer9", progress=False)


def test_command(model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOADING, lambda *_: model)
    arguments = ["--layer", "layer3", "--data-dir", photos, "--split", "test", "--units", 2, "--images", 3]
    assert command("neurons", *arguments, "--out", tmp_path / "out") == 0
    assert len((tmp_path / "out" / "units.csv").read_text().splitlines()) == 1 + 192
    for name in ("wall.png", "classes.png"):
        assert Image.open(tmp_path / "out" / name).width > 100
