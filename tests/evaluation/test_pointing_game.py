"""The grid pointing game, also with disconnected cells, on cases worked by hand, and its command on few photos."""

import csv
import itertools
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers import LOADING, PHOTOS, command, four_photos, normalized
from timm_bcos import BcosConfig, InputError, MethodError, bcosify, explain
from timm_bcos.attribution import methods
from timm_bcos.attribution.registry import attribute
from timm_bcos.data.datasets import image_loader, load_dataset
from timm_bcos.data.regions import cell_masks, cut_cells, join_cells
from timm_bcos.evaluation.pointing_game import (
    Confidence,
    Disconnected,
    Grid,
    cell_shares,
    compose,
    confidences,
    grid_shares,
    localization,
    sample_grids,
)
from timm_bcos.evaluation.pointing_results import play_all, read_values, summarize

CONFIDENCES = "timm_bcos.evaluation.pointing_results.confidences"
PLAY = ("evaluate", "pointing-game")


def test_a_map_in_one_cell_scores_one_there() -> None:
    maps = torch.zeros(1, 6, 6)
    maps[0, 2:4, 4:6] = 3.0
    expected = torch.zeros(3, 3)
    expected[1, 2] = 1
    assert torch.equal(cell_shares(maps, 3)[0], expected)


def test_a_uniform_map_scores_alike_everywhere() -> None:
    torch.testing.assert_close(cell_shares(torch.full((2, 12, 12), 0.7), 3), torch.full((2, 3, 3), 1 / 9))


def test_pixels_are_of_the_cell_that_their_centers_lie_in() -> None:
    literal = [int((i + 0.5) / (224 / 3)) for i in range(224)]
    for row in (0, 74, 75, 149, 223):
        single = torch.zeros(1, 224, 224)
        single[0, row, 149] = 1
        expected = torch.zeros(1, 3, 3)
        expected[0, literal[row], literal[149]] = 1
        torch.testing.assert_close(cell_shares(single, 3), expected)
    torch.testing.assert_close(cell_shares(torch.ones(1, 224, 224), 3).sum(), torch.tensor(1.0))


def test_only_positive_attribution_counts() -> None:
    maps = torch.tensor([[[1.0, -5.0], [2.0, 1.0]]])
    assert torch.equal(cell_shares(maps, 2)[0], torch.tensor([[0.25, 0.0], [0.5, 0.25]]))
    assert torch.equal(cell_shares(-maps.abs(), 2)[0], torch.zeros(2, 2))


def test_smoothing_comes_before_the_sign() -> None:
    """Neighbors of opposite signs cancel: what is left is the cell that is positive on average."""
    maps = torch.ones(1, 12, 12)
    maps[0, ::2, ::2] = maps[0, 1::2, 1::2] = -1.0
    maps[0, :6, :6] += 1
    raw, smooth = (cell_shares(maps, 2, window)[0, 0, 0].item() for window in (1, 5))
    assert raw == pytest.approx(0.4)  # 18 pixels of 2 against three times 18 of 1
    assert smooth > 0.75
    with pytest.raises(InputError, match="smooth=4: give an odd window"):
        cell_shares(maps, 2, 4)


@pytest.mark.parametrize("scale", [1, 2, 3, 5, 12])
def test_sums_come_before_the_sign(scale: int) -> None:
    """Positive sums over squares within each of the four images."""
    maps = torch.randn(2, 12, 12, dtype=torch.float64)
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    for image, row, column in itertools.product(range(2), range(2), range(2)):
        quarter = maps[image, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
        for top, left in itertools.product(range(0, 6, scale), range(0, 6, scale)):
            square = quarter[top : top + scale, left : left + scale]
            expected[image, row, column] += max(square.sum().item(), 0)
    expected /= expected.sum((1, 2), keepdim=True).where(expected.sum((1, 2), keepdim=True) > 0, 1)
    torch.testing.assert_close(cell_shares(maps, 2, scale=scale), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(InputError, match="scale=0: give the side of a cell"):
        cell_shares(maps, 2, scale=0)
    with pytest.raises(InputError, match="scale=2: 5×5 cells do not divide maps of 12 × 12 pixels"):
        cell_shares(maps, 5, scale=2)


def test_smoothing_spreads_over_the_border_of_cells() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 3, 0:4] = 1.0
    assert cell_shares(maps, 2)[0, 0, 0] == 1
    smooth = cell_shares(maps, 2, smooth=3)[0]
    assert smooth[0, 0] < 1 and smooth[1, 0] > 0
    assert smooth.sum().item() == pytest.approx(1)


def found(counts: dict[int, int]) -> list[Confidence]:
    items = [(c, k) for c, count in counts.items() for k in range(count)]
    return [Confidence(i, c, c, 0.9 - 0.01 * k) for i, (c, k) in enumerate(items)]


def test_grids_have_different_classes_and_the_most_confident_unused_images() -> None:
    everything = found(dict.fromkeys(range(6), 10))
    grids = sample_grids(everything, 2, 10)
    assert grids == sample_grids(list(reversed(everything)), 2, 10) != sample_grids(everything, 2, 10, seed=1)
    used: dict[int, list[int]] = {}
    for grid in grids:
        assert len(set(grid.classes)) == 4
        for c, i in zip(grid.classes, grid.indices, strict=True):
            used.setdefault(c, []).append(i)
    for c, indices in used.items():
        assert indices == list(range(10 * c, 10 * c + len(indices)))  # in the order of confidence, none twice


def test_images_that_the_model_gets_wrong_are_left_out() -> None:
    wrong = [Confidence(i, c, (c + 1) % 4, 0.4) for i, c in enumerate(range(4))]
    with pytest.raises(InputError, match="need 4 classes"):
        sample_grids(wrong, 2, 1)


def test_too_few_images_are_counted() -> None:
    with pytest.raises(InputError, match=r"after 3 grids only 0 classes have unused ones; 2 grids \(8 images\)"):
        sample_grids(found(dict.fromkeys(range(4), 3)), 2, 5)
    assert len(sample_grids(found(dict.fromkeys(range(4), 3)), 2, 5, reuse=True)) == 5


@pytest.mark.parametrize("counts", [dict(n=0, count=1), dict(n=2, count=0), dict(n=True, count=1)])
def test_grids_of_nothing(counts: dict[str, int]) -> None:
    with pytest.raises(MethodError, match="give a whole number from 1"):
        sample_grids(found(dict.fromkeys(range(4), 3)), **counts)
    with pytest.raises(MethodError, match="n=0: give a whole number from 1"):
        cell_shares(torch.ones(1, 4, 4), 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine classes of two crops each."""
    for c in range(9):
        folder = tmp_path / "data" / "test" / f"class{c}"
        folder.mkdir(parents=True)
        for k, photo in enumerate(sorted(PHOTOS.glob("*.jpg"))[:2]):
            Image.open(photo).convert("RGB").resize((64, 64)).rotate(40 * c).save(folder / f"{c}_{k}.png")
    return tmp_path / "data"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("bcosify", arch="test_resnet", num_classes=9,
                             pretrained_cfg_overlay=dict(input_size=(3, 32, 32), crop_pct=1.0)).eval()  # fmt: skip


def test_grid_pictures_are_made_of_their_images(model: nn.Module, photos: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    grid = Grid(2, (0, 3, 5, 8), (0, 1, 2, 4))
    picture = compose(model, dataset, grid)
    assert picture.shape == (1, 3, 64, 64)
    alone = [compose(model, dataset, Grid(1, (i,), (0,))) for i in grid.indices]
    assert torch.equal(picture[..., :32, 32:], alone[1])
    assert torch.equal(picture[..., 32:, :32], alone[2])
    model.pretrained_cfg["fixed_input_size"] = True
    assert compose(model, dataset, grid).shape == (1, 3, 32, 32)


def test_localization_asks_for_the_class_of_each_cell(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    grid = Grid(2, (0, 3, 5, 8), (7, 5, 3, 1))

    def perfect(model: nn.Module, x: Tensor, classes: Tensor, method: str) -> Tensor:
        maps = torch.zeros(4, 64, 64)
        for k, c in enumerate(classes.tolist()):
            cell = grid.classes.index(c)
            maps[k, 32 * (cell // 2) : 32 * (cell // 2) + 32, 32 * (cell % 2) : 32 * (cell % 2) + 32] = 1
        return maps

    monkeypatch.setattr("timm_bcos.evaluation.pointing_game.attribute", perfect)
    assert localization(model, dataset, grid, smooth=[1]).tolist() == [[1, 1, 1, 1]]
    assert localization(model, dataset, grid, smooth=[1, 3]).shape == (2, 4)
    both = localization(model, dataset, grid, smooth=[1, 3], scale=[1, 4])
    single = [localization(model, dataset, grid, smooth=[w], scale=[s])[0] for w in (1, 3) for s in (1, 4)]
    assert torch.equal(both, torch.stack(single))


def test_it_is_said_why_no_method_suits_a_model(model: nn.Module, photos: Path, tmp_path: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    samples = [[Grid(2, (0, 3, 5, 8), (7, 5, 3, 1))]]
    with pytest.raises(InputError, match=r"no method supports this model: lrp has rules .*; chefer is for"):
        play_all(model, dataset, samples, ["lrp", "chefer"], tmp_path)
    assert play_all(model, dataset, samples, ["gradient", "chefer"], tmp_path)[0].startswith("chefer is for")


def test_confidences(model: nn.Module, photos: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    items = list(confidences(model, dataset, batch_size=5, progress=False))
    assert [item.index for item in items] == list(range(18))
    assert [item.label for item in items] == [c for c in range(9) for _ in range(2)]
    assert all(0 <= item.confidence <= 1 for item in items)
    small = timm.create_model("bcosify", arch="test_resnet", num_classes=4).eval()
    with pytest.raises(InputError, match="the data set has class 4"):
        list(confidences(small, dataset, progress=False))


def test_a_plain_network_has_to_be_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*PLAY, "--plain", "--data-dir", photos, "--out", tmp_path / "out") == 2
    assert "no model given: name one with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "text"),
    [("nowhere", "no data set at .*nowhere, split 'test': no images found"), ("flat", "has images of 1 classes")],
)
def test_data_without_labels(
    place: str,
    text: str,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "flat").mkdir()
    Image.open(PHOTOS / "coffee.jpg").save(tmp_path / "flat" / "photo.jpg")
    monkeypatch.setattr(LOADING, lambda *_: model)
    assert command(*PLAY, "--data-dir", tmp_path / place, "--split", "test", "--out", tmp_path) == 2
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "settings.json").exists()  # so that a corrected command may write there


def test_images_without_a_label(model: nn.Module) -> None:
    load = image_loader(model, [(Image.open(PHOTOS / "coffee.jpg"), -1)])
    with pytest.raises(InputError, match="image 0 of the data set has no label"):
        load(0)


def test_grey_networks_see_grey_photos(photos: Path) -> None:
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    overlay = dict(input_size=(3, 32, 32), crop_pct=1.0)
    gray, color, other = (
        timm.create_model("bcosify", arch="test_resnet", in_chans=channels, pretrained_cfg_overlay=overlay).eval()
        for channels in (1, 3, 4)
    )
    (seen, label), (colored, _) = image_loader(gray, dataset)(2), image_loader(color, dataset)(2)
    assert seen.shape == (1, 32, 32) and label == 1
    brightness = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * colored).sum(0, keepdim=True)
    torch.testing.assert_close(seen, brightness, rtol=0, atol=1.5 / 255)
    with pytest.raises(InputError, match=r"takes 4 channels, photos have 1 or 3"):
        image_loader(other, dataset)


def test_networks_of_ones_own_play_too(photos: Path) -> None:
    """Without a cfg and a number of classes."""
    dataset = timm.data.create_dataset("", root=str(photos), split="test")
    layers = nn.Conv2d(3, 8, 3, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 9)
    own = bcosify(nn.Sequential(*layers), BcosConfig(stem="encoded")).eval()
    assert len(list(confidences(own, dataset, progress=False))) == 18
    assert localization(own, dataset, Grid(2, (0, 3, 5, 8), (7, 5, 3, 1)), smooth=[1]).shape == (1, 4)
    with pytest.raises(MethodError, match="batch_size=0"):
        list(confidences(own, dataset, batch_size=0, progress=False))


@pytest.mark.parametrize("kind", ["torch/image_folder", "tar"])
def test_other_kinds_of_data_sets_tell_their_classes_too(kind: str, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for folder in sorted((photos / "test").iterdir()):
            file.add(folder, folder.name)
    place = dict(root=str(tmp_path / "photos.tar"))
    if kind != "tar":
        place = dict(root=str(photos / "test"), kind=kind)
    assert len(load_dataset(num_classes=9, **place)) == 18
    with pytest.raises(InputError, match="images of 9 classes, the model has 8"):
        load_dataset(num_classes=8, **place)


def test_the_command_refuses_before_it_plays(
    model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LOADING, lambda *_: model)
    right = [Confidence(i, i // 2, i // 2, 0.5) for i in range(16)]
    right += [Confidence(i, 8, 0, 0.5) for i in (16, 17)]
    monkeypatch.setattr(CONFIDENCES, lambda *_, start: iter(right[start:]))
    arguments = [*PLAY, "--data-dir", photos, "--split", "test", "--out", tmp_path / "out", "--grids", 1]
    for method, text in (
        ("input_x_gradient", "8 classes have some, 1 more are missing"),
        ("grdcam", "no attribution method"),
    ):
        assert command(*arguments, "--method", method) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "values.csv").exists()


def test_a_game_that_failed_may_be_played_with_other_settings(
    model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option that an error advises works in the same folder; predictions are not computed again."""
    monkeypatch.setattr(LOADING, lambda *_: model)
    right, calls = [Confidence(i, i // 2, i // 2, 0.5) for i in range(18)], []
    monkeypatch.setattr(CONFIDENCES, lambda *_, start: calls.append(start) or iter(right[start:]))
    out = tmp_path / "out"
    play = [*PLAY, "--data-dir", photos, "--split", "test", "--out", out, "--n", 2, "--method", "bcos"]
    assert command(*play, "--grids", 5) == 2
    assert "ask for fewer (--grids), or let grids share images (reuse=True, on the command line --reuse)" in (
        capsys.readouterr().err
    )
    assert command(*play, "--grids", 5, "--threshold", 0.9) == 2
    assert "confidence of at least 0.9" in capsys.readouterr().err
    assert command(*play, "--grids", 1, "--method", "attention_rollout", "--method", "chefer", "--seed", 3) == 0
    with (out / "settings.json").open() as file:
        assert json.load(file)["seed"] == "3"
    assert command(*play, "--grids", 5, "--reuse", "--seed", 3) == 2
    assert "has results for reuse=False, not True" in capsys.readouterr().err
    (out / "values.csv").unlink()
    assert command(*play, "--grids", 5, "--reuse") == 0
    assert calls == [0] and len(read_values(out)) == 2 * 5
    (photos / "more.txt").write_text("other data")
    assert command(*play, "--grids", 5, "--reuse") == 2
    assert "has results for contents of data_dir=" in capsys.readouterr().err


def test_a_missing_extra(
    model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error for methods by name, before anything is computed; a warning for the default ones."""
    monkeypatch.setattr(LOADING, lambda *_: model)
    monkeypatch.setattr(
        CONFIDENCES, lambda *_, start: iter([Confidence(i, i // 2, i // 2, 0.5) for i in range(18)][start:])
    )
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.delitem(sys.modules, "timm_bcos.attribution.lime", raising=False)
    methods._library.cache_clear()
    data = ["--data-dir", photos, "--split", "test"]
    extra = "is not installed: pip install 'timm_bcos[attribution]'"
    for words in (
        ["evaluate", "pointing-game", "--out", tmp_path / "game"],
        ["evaluate", "metrics", "--out", tmp_path / "metrics"],
        ["evaluate", "aggatt", "--out", tmp_path / "bins.png"],
        ["gallery", "methods", "--out", tmp_path / "methods.png"],
    ):
        assert command(*words, *data, "--method", "bcos", "--method", "ixg") == 2
        error = capsys.readouterr().err
        assert "input_x_gradient: captum" in error and extra in error
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "game").exists()
    out = tmp_path / "game"
    assert command("evaluate", "pointing-game", *data, "--out", out, "--n", 2, "--grids", 1) == 0
    error = capsys.readouterr().err
    assert "warning: left out gradient, input_x_gradient, integrated_gradients, smoothgrad, guided_backprop" in error
    assert "warning: left out lime: skimage" in error and error.count(extra) == 2
    assert {key[3] for key in read_values(out)} == {"bcos", "deeplift", "rise"}
    methods._library.cache_clear()


def test_the_command_resumes(
    model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LOADING, lambda *_: model)
    right = [Confidence(i, i // 2, i // 2, 0.5) for i in range(18)]
    monkeypatch.setattr(CONFIDENCES, lambda *_, start: iter(right[start:]))
    out = tmp_path / "out"
    options = ["--split", "test", "--out", out, "--grids", 2, "--batch-size", 3, "--n", 2]
    chosen = [word for method in ("bcos", "attention_rollout", "ixg") for word in ("--method", method)]
    assert command(*PLAY, "--data-dir", photos, *options, *chosen) == 0
    whole = (out / "values.csv").read_text()
    assert len(whole.splitlines()) == 1 + 2 * 2 * 2 * 4
    complete = read_values(out)
    monkeypatch.chdir(photos.parent)  # from where the data have another name
    with (out / "confidences.csv").open("rb+") as file:
        file.truncate(100)  # the images behind are looked at again
    for cut in (1, 5, 10, 14, 21, 30, 60, len(whole) - 3):  # as an interruption leaves it
        (out / "values.csv").write_bytes((out / "values.csv").read_bytes()[:-cut])
        assert command(*PLAY, "--data-dir", photos.name, *options, *chosen) == 0
        values = read_values(out)
        assert values == complete
    assert len((out / "confidences.csv").read_text().splitlines()) == 1 + 18
    assert sorted(values) == [
        (2, window, 1, method, k) for window in (1, 15) for method in ("bcos", "input_x_gradient") for k in (0, 1)
    ]
    assert "left out: attention_rollout is for vision transformers" in capsys.readouterr().out
    assert "| method | 2×2, raw | 2×2, smoothed 15×15 |" in (out / "summary.md").read_text()
    assert Image.open(out / "boxes.png").width > 100
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    raw = np.concatenate([values[2, 1, 1, "bcos", k] for k in (0, 1)])
    (out / "values.csv").write_text(whole.replace("input_x_gradient", "ixg"))  # as earlier versions wrote it
    assert read_values(out) == complete
    (row,) = (row for row in rows if (row["method"], row["cells"], row["smooth"]) == ("bcos", "2", "1"))
    assert (row["values"], float(row["median"])) == ("8", pytest.approx(np.median(raw), abs=1e-4))
    with (out / "gains.csv").open(newline="") as file:
        gains = list(csv.DictReader(file))
    assert [(gain["method"], gain["window"], gain["grids"]) for gain in gains] == [
        ("input_x_gradient", "1", "2"),
        ("input_x_gradient", "15", "2"),
    ]
    ahead = np.mean([np.subtract(values[2, 1, 1, "bcos", k], values[2, 1, 1, "input_x_gradient", k]) for k in (0, 1)])
    assert float(gains[0]["mean"]) == pytest.approx(float(ahead))
    assert "| input_x_gradient | 2×2 | smoothed 15×15 | 2 |" in (out / "summary.md").read_text()
    assert summarize(out, ["gradcam"]) == {}  # which has not been played
    assert command(*PLAY, "--data-dir", photos, *options, "--method", "bcos", "--seed", 1) == 2
    assert "has results for seed=0, not 1" in capsys.readouterr().err
    assert read_values(out) == values


@pytest.fixture(scope="module")
def grid() -> Tensor:
    return join_cells(four_photos(64), 2)


@pytest.mark.parametrize(("name", "options"), [("bcos", {}), ("test_resnet", {}), ("test_vit", {"img_size": 64})])
def test_fully_disconnected_cells_are_networks_of_their_own(
    name: str, options: dict[str, Any], network: nn.Module, grid: Tensor
) -> None:
    """DiFull: the logits are those of each image alone, and no gradient leaves the cell."""
    model = network if name == "bcos" else timm.create_model(name, num_classes=5, **options).eval()
    apart = Disconnected(model, 2, "full")
    images = cut_cells(grid, 2)
    torch.testing.assert_close(apart(grid)[0].unflatten(0, (4, 5)), model(images), rtol=1e-4, atol=1e-6)
    targets = apart.targets(torch.tensor([3, 1, 4, 0]))
    assert targets.tolist() == [3, 6, 14, 15]
    maps = attribute(apart, grid, int(targets[2]), "bcos" if name == "bcos" else "input_x_gradient")
    assert maps[0, 64:, :64].abs().max() > 0
    outside = 1 - cell_masks(128, 128, 2)[2]
    assert (maps[0] * outside).abs().max() == 0


def test_partially_disconnected_cells_share_a_backbone(network: nn.Module, grid: Tensor) -> None:
    """DiPart: a head for the features of each cell, whose receptive fields reach across the border."""
    part = Disconnected(network, 2, "part")
    features = network.forward_features(grid)
    expected = network.forward_head(features[:, :, :2, 2:])
    torch.testing.assert_close(part(grid)[:, 5:10], expected)
    torch.testing.assert_close(part(grid).unflatten(1, (4, 5)).mean(1), network(grid), rtol=1e-4, atol=1e-6)
    found = explain(part, grid, 5 + 3)
    assert found.completeness_error.max() <= 1e-4
    map_ = found.contribution_map[0].abs()
    assert 0 < map_[:, :64].sum() < map_[:, 64:].sum()
    with pytest.raises(MethodError, match="DiPart"):
        Disconnected(timm.create_model("test_vit", num_classes=5, img_size=128).eval(), 2, "part")(grid)
    with pytest.raises(MethodError, match="forward_features"):
        Disconnected(nn.Sequential(network), 2, "full")


def test_maps_of_the_whole_grid_are_seen_by_gradcam(grid: Tensor) -> None:
    """Its weights are means over all cells of a gradient that is 0 in all but one; its maps are those of all cells."""
    model = timm.create_model("test_resnet", num_classes=5).eval()
    apart = Disconnected(model, 2, "full")
    found = attribute(apart, grid, 5 + 3, "gradcam")[0]
    maps = model.forward_features(normalized(cut_cells(grid, 2), model.pretrained_cfg))
    row = model.get_classifier().weight[3] / maps[0, 0].numel()  # the gradient in the cell, everywhere alike
    mixed = join_cells((maps * row[:, None, None]).sum(1, keepdim=True), 2) / 4
    expected = nn.functional.interpolate(mixed, (128, 128), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-7)
    shares = grid_shares(apart, grid, Grid(2, (0, 1, 2, 3), (3, 1, 4, 0)), "input_x_gradient")
    torch.testing.assert_close(shares[0], torch.ones(4))


def test_the_command_sums_over_cells(
    model: nn.Module, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale that is asked for later is added to what has been played."""
    monkeypatch.setattr(LOADING, lambda *_: model)
    right = [Confidence(i, i // 2, i // 2, 0.5) for i in range(18)]
    monkeypatch.setattr(CONFIDENCES, lambda *_, start: iter(right[start:]))
    options = ["--data-dir", photos, "--split", "test", "--grids", 1, "--n", 2, "--method", "bcos", "--method", "ixg"]
    scales = ["--smooth", 1, "--scale", 1, "--scale", 8]
    assert command(*PLAY, *options, *scales[:4], "--out", tmp_path / "out") == 0
    assert command(*PLAY, *options, *scales, "--out", tmp_path / "out") == 0
    assert command(*PLAY, *options, *scales, "--out", tmp_path / "whole") == 0
    values = read_values(tmp_path / "whole")
    assert values == read_values(tmp_path / "out")
    assert sorted(values) == [(2, 1, s, method, 0) for s in (1, 8) for method in ("bcos", "input_x_gradient")]
    assert "| method | 2×2, raw | 2×2, cells of 8×8 |" in (tmp_path / "out" / "summary.md").read_text()
    assert "| input_x_gradient | 2×2 | cells of 8×8 | 1 |" in (tmp_path / "out" / "summary.md").read_text()
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = [(row["method"], row["smooth"], row["scale"]) for row in csv.DictReader(file)]
    assert rows == [(m, "1", s) for s in "18" for m in ("bcos", "input_x_gradient")]
    capsys.readouterr()
    assert command(*PLAY, *options, "--scale", 0, "--out", tmp_path / "out") == 2
    assert "--scale" in capsys.readouterr().err
