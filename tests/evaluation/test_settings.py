"""What the scripts remember, and what they refuse to go on with."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import PHOTOS
from timm_bcos import InputError
from timm_bcos.cli.options import DataOptions, ModelOptions
from timm_bcos.evaluation.results import append_rows, read_rows, remember_settings
from timm_bcos.explanation.visualization import Bars, Row, draw_rows, save_figure
from timm_bcos.files import atomic_path


def test_new_weights_in_the_directory_of_a_model_are_noticed(tmp_path: Path) -> None:
    weights, out = tmp_path / "mine" / "model.safetensors", tmp_path / "out"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    given = vars(ModelOptions(model=f"local-dir:{weights.parent}"))
    remember_settings(out, given)
    (out / "values.csv").touch()
    remember_settings(out, given)
    weights.write_bytes(b"new")
    with pytest.raises(InputError, match="contents of model"):
        remember_settings(out, given)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes, in the splits train and test."""
    for split in ("train", "test"):
        for c in "ab":
            folder = tmp_path / "data" / split / c
            folder.mkdir(parents=True)
            Image.open(PHOTOS / "coffee.jpg").resize((32, 32)).save(folder / "x.png")
    return tmp_path / "data"


def settings(data: Path, checkpoint: Path | None = None) -> dict[str, object]:
    return vars(ModelOptions(checkpoint=checkpoint)) | vars(DataOptions(str(data)))


def test_splits_that_do_not_exist(data: Path) -> None:
    for given, text in ((dict(split="tset"), "'tset'"), ({}, "'validation'")):
        with pytest.raises(
            InputError, match=f"has no folder for split {text}, only test, train: choose one with --split"
        ):
            DataOptions(str(data), **given).load(2)
    for split, count in (("test", 2), ("train", 2), ("training", 2)):
        assert len(DataOptions(str(data), split=split).load(2)) == count
    assert len(DataOptions(str(data / "test")).load(2)) == 2  # folders of classes
    with pytest.raises(InputError, match="no device 'cdua'"):
        ModelOptions().load("cdua")


def test_results_of_another_checkpoint_or_other_data(data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(3)}, checkpoint)
    given, out = settings(data, checkpoint), data / "results"
    remember_settings(out, given)
    (out / "values.csv").write_text("a\n1\n")
    remember_settings(out, given)
    stamp, content = checkpoint.stat(), checkpoint.read_bytes()
    checkpoint.touch()  # copied, or downloaded again
    remember_settings(out, given)
    torch.save({"a": torch.ones(3)}, checkpoint)
    assert checkpoint.stat().st_size == stamp.st_size
    with pytest.raises(InputError, match=r"has results for contents of checkpoint=.*choose another folder"):
        remember_settings(out, given)
    checkpoint.write_bytes(content)
    remember_settings(out, given)
    (data / "test" / "a" / "y.png").write_bytes(b"one more")
    with pytest.raises(InputError, match="has results for contents of data_dir="):
        remember_settings(out, given)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_damaged_settings(content: bytes, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    remember_settings(out, settings(data))
    (out / "values.csv").touch()
    (out / "settings.json").write_bytes(content)
    with pytest.raises(InputError, match=r"settings\.json is damaged"):
        remember_settings(out, settings(data))


def test_rows(tmp_path: Path) -> None:
    path, types = tmp_path / "x.csv", dict(n=int, name=str, value=float)
    assert read_rows(path, types) == []
    append_rows(path, list(types), [(1, "a,b", 0.5), (2, "c", 1.5)])
    assert read_rows(path, types) == [dict(n=1, name="a,b", value=0.5), dict(n=2, name="c", value=1.5)]
    whole = path.read_text()
    path.write_text(whole + "3,d")
    assert len(read_rows(path, types)) == 2
    for damaged, text in {
        "n,value\n1,2\n": "first line should be n,name,value",
        "": "first line should be",
        whole.replace("1,", "one,", 1): "line 2 is damaged: invalid literal",
        whole.replace(",0.5", ""): "line 2 is damaged",
        "\udcff": "is damaged",
    }.items():
        path.write_bytes(damaged.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=text):
            read_rows(path, types)


def test_files_without_a_suffix_leave_nothing(tmp_path: Path) -> None:
    figure = draw_rows([Row([("title", torch.rand(4, 4, 3))], Bars("bars", ["a"], [1.0]))])
    with pytest.raises(InputError, match=r"nothing was written to .*why: give it a suffix"):
        save_figure(figure, tmp_path / "why")
    assert list(tmp_path.iterdir()) == []


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".png", "n" * 255, "a." + "s" * 253):
        with atomic_path(tmp_path / name) as path:
            path.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 3


def test_directories_and_devices_are_not_replaced(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/full")):
        with pytest.raises(InputError, match="name a file"), atomic_path(path):
            pass
