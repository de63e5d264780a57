"""Paired comparisons of accuracies, on cases worked by hand."""

import csv
import io
import re
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.helpers import command, load_script, script_status
from timm_bcos import InputError
from timm_bcos.evaluation import comparison


def test_mcnemar_by_hand() -> None:
    """One network alone is right 1 time, the other 5 times: p = 2 · (1 + 6) / 2⁶."""
    first = np.array([True] * 10 + [True] + [False] * 5)
    second = np.array([True] * 10 + [False] + [True] * 5)
    assert comparison.mcnemar(first, second) == pytest.approx(14 / 64)
    assert comparison.mcnemar(first, first) == 1.0


def test_the_report() -> None:
    right = dict(
        plain=[np.array([True, True, True, False]), np.array([True, True, False, False])],
        bcos=[np.array([True, True, False, False]), np.array([True, False, False, False])],
    )
    text = comparison.report(right, ["x", "x", "x", "y"])
    assert "| x | 3 | 83.3 | 50.0 |" in text and "| y | 1 | 0.0 | 0.0 |" in text and "| all | 4 | 62.5 | 37.5 |" in text
    assert "bcos (seeds 50.0 25.0) − plain: -25.0 points" in text
    assert "-33.3 to +0.0" in text


def test_writes_who_is_right_on_which_photo(tmp_path: Path) -> None:
    right = dict(plain=[np.array([True, False]), np.array([True, True])], bcos=[np.array([False, True])])
    comparison.write_images(tmp_path / "right.csv", ["a/1.jpg", "a/2.jpg"], ["x", "y"], right)
    assert (tmp_path / "right.csv").read_text().splitlines() == [
        "image,cluster,plain-0,plain-1,bcos-0", "a/1.jpg,x,1,1,0", "a/2.jpg,y,0,1,1",
    ]  # fmt: skip


def test_the_table(tmp_path: Path) -> None:
    """Two of four photos gained in one cluster, one lost in the other."""
    right = dict(
        plain=[np.array([False, False, True, True, True, True])],
        bcos=[np.array([True, True, True, True, False, True]), np.array([True, True, True, True, False, True])],
    )
    comparison.write_table(tmp_path / "table.csv", comparison.compare(right, ["x"] * 4 + ["y"] * 2))
    with (tmp_path / "table.csv").open(newline="") as file:
        plain, bcos = csv.DictReader(file)
    assert (plain["model"], plain["top1"], plain["gain"], plain["mcnemar"]) == ("plain", "66.7", "", "")
    assert (bcos["seeds"], bcos["top1"], bcos["by_seed"], bcos["gain"]) == ("2", "83.3", "83.3 83.3", "+16.7")
    assert (bcos["low"], bcos["high"], bcos["mcnemar"]) == ("-50.0", "+50.0", "1")
    assert float(bcos["images_low"]) < 0 < float(bcos["images_high"])


def test_a_series_is_what_a_name_says_without_its_number() -> None:
    assert comparison.series(["apple/Golden-Delicious_001.jpg", "apple/Golden-Delicious_13.jpg", "a_b_1.png"]) == [
        "Golden-Delicious", "Golden-Delicious", "a_b",
    ]  # fmt: skip


def test_lists_the_largest_clusters() -> None:
    right = dict(plain=[np.array([True] * 6)])
    text = comparison.report(right, ["x", "y", "y", "z", "z", "z"], rows=2)
    assert "| z | 3 |" in text and "| y | 2 |" in text and "| x |" not in text and "| all | 6 |" in text


def test_the_table_of_clusters(tmp_path: Path) -> None:
    right = dict(plain=[np.array([True, False, True]), np.array([True, True, True])], bcos=[np.array([False] * 3)])
    comparison.write_clusters(tmp_path / "clusters.csv", right, ["x", "x", "y"])
    assert (tmp_path / "clusters.csv").read_text().splitlines() == [
        "cluster,images,model,top1",
        "x,2,plain,75.0", "x,2,bcos,0.0", "y,1,plain,100.0", "y,1,bcos,0.0", "all,3,plain,83.3", "all,3,bcos,0.0",
    ]  # fmt: skip


def test_nobody_is_in_train_and_validation(tmp_path: Path) -> None:
    split = load_script("split_by_contributor")
    source = tmp_path / "source"
    source.mkdir()
    lines, number = ["file,split,contributor"], 0
    for name in ("train", "validation", "test"):
        with tarfile.open(source / f"{name}.tar", "w") as tar:
            for person in range(20) if name != "test" else range(20, 22):
                for _ in range(3):
                    member = tarfile.TarInfo(f"class{number % 2}/{number}.jpg")
                    tar.addfile(member, io.BytesIO())
                    lines.append(f"{member.name},{name},{person}")
                    number += 1
    (source / "contributors.csv").write_text("\n".join(lines))
    with tarfile.open(source / "extra.tar", "w") as tar:
        for person in range(24):  # of which two are in the test split and two nowhere else
            tar.addfile(tarfile.TarInfo(f"class2/{1000 + person}.jpg"), io.BytesIO())
    extra = ["file,contributor", *(f"class2/{1000 + person}.jpg,{person}" for person in range(24))]
    (source / "extra.csv").write_text("\n".join(extra))
    lines += [line.replace(",", ",extra,") for line in extra[1:]]
    counts = split.lay_out(source, tmp_path / "out", 0.2, seed=1)
    assert counts == dict(train=96, validation=24, test=6, unlabeled=18)  # whole people, of six photos each
    people = {line.split(",")[0]: line.split(",")[2] for line in lines[1:]}
    found = {}
    for name in counts:
        folder = tmp_path / "out" / name
        found[name] = {people[path.relative_to(folder).as_posix()] for path in folder.rglob("*.jpg")}
    assert not found["train"] & found["validation"] and found["test"] == {"20", "21"}
    assert found["unlabeled"] == found["train"] | {"22", "23"}
    assert split.choose_people([dict(contributor=p) for p in "aab"], 0.4, 0) == {"b"}
    (source / "extra.csv").write_text("\n".join(extra[:-1]))
    with pytest.raises(InputError, match=r"who sent class2/1023\.jpg of extra\.tar"):
        split.lay_out(source, tmp_path / "again", 0.2, seed=1)
    assert not (tmp_path / "again").exists()


def test_shares_of_each_class_contain_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, source = load_script("take_share"), tmp_path / "train"
    for name, count in dict(a=8, b=4, c=1).items():
        (source / name).mkdir(parents=True)
        for i in range(count):
            (source / name / f"{i}.jpg").write_text(f"{name}{i}")
    assert script_status(monkeypatch, shares, str(source), "0.25", "0.5") == 0
    quarter, half = ({p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("*.jpg")}
                     for n in ("train_25", "train_50"))  # fmt: skip
    assert quarter < half
    for found, counts in ((quarter, [2, 1, 1]), (half, [4, 2, 1])):
        assert [sum(name.startswith(c) for name in found) for c in "abc"] == counts
    assert all((tmp_path / "train_50" / name).read_text() == name[0] + name[2:-4] for name in half)
    for wrong in ([str(source), "0.5"], [str(source), "2"], [str(tmp_path / "none"), "0.5"]):
        assert script_status(monkeypatch, shares, *wrong) == 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of two classes."""
    for i, label in enumerate("aab"):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint of train.py, of a plain model of two classes."""
    model = timm.create_model("test_efficientnet", num_classes=2)
    arguments = Namespace(model="test_efficientnet", num_classes=2)
    torch.save(dict(arch="test_efficientnet", state_dict=model.state_dict(), args=arguments), tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


def test_compare_command(photos: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same checkpoint twice: no difference, whatever the images are."""
    out, people = tmp_path / "out", tmp_path / "people.csv"
    people.write_text("file,contributor\na/0.png,x\na/1.png,y\nb/2.png,y\n")
    data = ["--data-dir", photos, "--split", "", "--contributors", people, "--out", out]
    assert command("evaluate", "compare", f"first={plain}", f"second={plain}", f"second={plain}", *data) == 0
    assert "+0.0 points" in capsys.readouterr().out
    with (out / "comparison.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["model"], first["seeds"], first["images"]) == ("first", "1", "3")
    assert (second["seeds"], second["gain"], second["low"], second["high"]) == ("2", "+0.0", "+0.0", "+0.0")
    assert (out / "images.csv").read_text().splitlines()[0] == "image,cluster,first-0,second-0,second-1"
    assert "y,2,first," in (out / "clusters.csv").read_text()


@pytest.mark.parametrize(
    ("contributors", "models", "message"),
    [("file,contributor\na/0.png,x\n", ["a={0}", "b={0}"], "lists no contributor for"),
     (None, ["a={0}", "b={0}"], "lists no contributor for"),
     ("", ["{0}"], "one model only"),
     ("", ["={0}", "b={0}"], "give a model as NAME=CHECKPOINT")],
)  # fmt: skip
def test_what_compare_refuses(
    photos: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    contributors: str | None, models: list[str], message: str,
) -> None:  # fmt: skip
    if contributors is not None:
        (tmp_path / "people.csv").write_text(contributors)
    data = ["--data-dir", photos, "--split", "", "--contributors", tmp_path / "people.csv", "--out", tmp_path / "out"]
    assert command("evaluate", "compare", *(model.format(plain) for model in models), *data) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_agreement_by_hand() -> None:
    """Logits that differ by 0.5 in one image, whose prediction changes, relative to a largest one of 2."""

    class Table(nn.Module):
        def __init__(self, rows: list[list[float]]) -> None:
            super().__init__()
            self.rows, self.weight = torch.tensor(rows), nn.Parameter(torch.zeros(()))
            self.pretrained_cfg = dict(mean=(0.0,), std=(1.0,))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows + self.weight

    first, second = Table([[2.0, 1.0], [2.0, 2.25]]).eval(), Table([[2.0, 1.0], [2.0, 1.75]]).eval()
    found = comparison.agreement(first, second, [(torch.rand(2, 3, 4, 4), torch.tensor([0, 0]))])
    assert found == comparison.Agreement(images=2, same=1, difference=0.25, first_right=1, second_right=2)
    with pytest.raises(InputError, match="no images"):
        comparison.agreement(first, second, [])


def test_check_against_the_original(photos: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--checkpoint", plain, "--against", plain]
    assert command(*arguments, "--data-dir", photos, "--split", "") == 0
    said = capsys.readouterr().out
    assert "predictions agree on 3 of 3 images" in said and said.count("top-1") == 2
    assert float(re.findall(r"logits (\S+)", said)[0]) < 1e-4
    assert command(*arguments, "--b", 2) == 0
    said = capsys.readouterr().out
    assert "of 16 images" in said and "top-1" not in said and float(re.findall(r"logits (\S+)", said)[0]) > 1e-3
    assert command("check", "--checkpoint", plain, "--against", "no_such_model") == 2
    assert "no_such_model" in capsys.readouterr().err


def test_no_list_of_contributors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split = load_script("split_by_contributor")
    assert script_status(monkeypatch, split, str(tmp_path), str(tmp_path / "out")) == 2
    assert script_status(monkeypatch, split, str(tmp_path), str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "no contributors.csv" in said and "is there already" in said
