"""The script that trains the CIFAR-10 networks, on ten images."""

import csv
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import PHOTOS, load_script, script_status

script = load_script("train_cifar")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    photo = Image.open(PHOTOS / "coffee.jpg").convert("RGB")
    for number in range(10):
        for split in ("train", "test"):
            folder = tmp_path / "data" / split / str(number)
            folder.mkdir(parents=True)
            photo.crop((10 * number, 0, 10 * number + 64, 64)).resize((32, 32)).save(folder / "x.png")
    return tmp_path / "data"


def status(monkeypatch: pytest.MonkeyPatch, out: Path, *given: str) -> int:
    options = ("--b", "1", "2.5", "--epochs", "2", "--batch-size", "5", "--images", "4", "--device", "cpu", *given)
    return script_status(monkeypatch, script, out, *options)


def test_a_training_in_pieces_is_the_training_in_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert status(monkeypatch, whole, "--data-dir", str(data)) == 0
    assert status(monkeypatch, pieces, "--data-dir", str(data), "--minutes", "1e-9") == 0
    assert "B = 1: not done, run the same command again" in capsys.readouterr().out
    data.rename(tmp_path / "gone")  # the packed file is enough
    calls = 1
    while not (pieces / "table.md").exists():
        assert status(monkeypatch, pieces, "--minutes", "1e-9") == 0
        calls += 1
    assert calls == 8 - 1  # the last step of the first network leads to the first of the second
    for name in ("b100", "b250"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (pieces, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert (pieces / name / "log.csv").read_text() == (whole / name / "log.csv").read_text()
    with (whole / "b250" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (whole / "table.md").read_text() == (pieces / "table.md").read_text()
    assert f"| B = 2.5 | 3.8 | {rows[-1]['top1']} |" in (whole / "table.md").read_text()


def test_networks_trained_together_become_what_they_become_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its own time: their steps take turns."""
    assert status(monkeypatch, tmp_path / "alone", "--data-dir", str(data)) == 0
    assert status(monkeypatch, tmp_path / "together", "--data-dir", str(data), "--together", "--minutes", "1e-9") == 0
    assert not list(tmp_path.glob("together/*/model.safetensors"))
    assert status(monkeypatch, tmp_path / "together", "--together") == 0
    for name in ("b100", "b250"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("together", "alone"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert (tmp_path / "together" / name / "log.csv").read_text() == (
            tmp_path / "alone" / name / "log.csv"
        ).read_text()


def test_records_every_so_many_epochs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(monkeypatch, tmp_path / "each", "--data-dir", str(data), "--b", "1", "--epochs", "3") == 0
    assert (
        status(monkeypatch, tmp_path / "some", "--data-dir", str(data), "--b", "1", "--epochs", "3", "--every", "2")
        == 0
    )
    each, some = (list(csv.DictReader((tmp_path / name / "b100" / "log.csv").open())) for name in ("each", "some"))
    assert [row["epoch"] for row in some] == ["2", "3"]
    assert [row["top1"] for row in some] == [row["top1"] for row in each[1:]]
    assert float(some[0]["loss"]) == pytest.approx(sum(float(row["loss"]) for row in each[:2]) / 2, abs=2e-5)


def test_packed_images_are_the_files_images(data: Path, tmp_path: Path) -> None:
    script.pack(str(data), tmp_path / "packed.safetensors")
    images, labels = script.unpack(tmp_path / "packed.safetensors", "train")
    assert labels.tolist() == list(range(10))
    wanted = torch.tensor(bytearray(Image.open(data / "train" / "7" / "x.png").tobytes())).reshape(32, 32, 3)
    assert torch.equal(images[7], wanted.permute(2, 0, 1))


def test_packs_tars_like_folders(data: Path, tmp_path: Path) -> None:
    script.pack(str(data), tmp_path / "folders.safetensors")
    (tmp_path / "tars").mkdir()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            tar.add(data / split, ".")
    script.pack(str(tmp_path / "tars"), tmp_path / "tars.safetensors")
    theirs = load_file(tmp_path / "folders.safetensors")
    assert all(torch.equal(t, theirs[name]) for name, t in load_file(tmp_path / "tars.safetensors").items())


def test_crops_are_windows_of_the_padded_image() -> None:
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    padded = torch.nn.functional.pad(images, [4] * 4)
    found = set()
    for seed in range(20):
        _, *crops = script.draws(seed, len(images))
        for n, crop in enumerate(script.augmented(images, *crops)):
            windows = {
                (top, left, flip): padded[n, :, top : top + 32, left : left + 32].flip([2] if flip else [])
                for top in range(9) for left in range(9) for flip in (False, True)
            }  # fmt: skip
            places = [place for place, window in windows.items() if torch.equal(window, crop)]
            assert len(places) == 1
            found.add(places[0])
    assert len(found) > 20
    assert {flip for _, _, flip in found} == {False, True}


def test_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, tmp_path / "out") == 2
    assert "give --data-dir" in capsys.readouterr().err


def test_refuses_a_folder_of_other_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, tmp_path / "out", "--data-dir", str(data), "--minutes", "1e-9") == 0
    assert status(monkeypatch, tmp_path / "out", "--minutes", "1e-9", "--amp") == 2
    assert "amp" in capsys.readouterr().err


def test_the_learning_rate_falls_by_a_cosine() -> None:
    assert script.learning_rate(0.0) == pytest.approx(1e-3)
    assert script.learning_rate(0.5) == pytest.approx((1e-3 + 1e-5) / 2)
    assert script.learning_rate(1.0) == pytest.approx(1e-5)
