"""The ablation script with a training script that takes no time."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_bcos
from tests.helpers import PHOTOS, load_script, real_image

script = load_script("ablation")

TRAIN = """
import argparse, pathlib, sys
import timm, torch
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(given["--output"]) / given["--experiment"]
with (folder.parent / "calls").open("a") as calls:
    calls.write(folder.name + (" resumed" if "--resume" in given else "") + "\\n")
model = timm.create_model(given["--model"], num_classes=2)
args = argparse.Namespace(model=given["--model"], num_classes=2, model_kwargs={})
torch.save(dict(state_dict=model.state_dict(), args=args), folder / "last.pth.tar")
(folder / "summary.csv").write_text("epoch,eval_top1\\n0,40.0\\nepoch,eval_top1\\n1,70.0\\n2,60.5\\n")
if pathlib.Path(given["--fail"]).read_text() == folder.name:
    sys.exit(3)
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "train.py").write_text(TRAIN)
    for c in "ab":
        folder = tmp_path / "data" / "test" / c
        folder.mkdir(parents=True)
        Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((32, 32)).save(folder / "x.png")
    return ["ablation.py", "b", "--train-script", str(tmp_path / "train.py"), "--data-dir", str(tmp_path / "data"),
            "--val-split", "test", "--out", str(tmp_path / "out"), "--only", "B=1", "B=2"]  # fmt: skip


def status() -> int:
    """The script's exit status."""
    with pytest.raises(SystemExit) as end:
        script.main()
    return end.value.code


def test_trains_tabulates_and_resumes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fail").write_text("B=2")
    monkeypatch.setattr(sys, "argv", [*arguments, "--", "--fail", str(tmp_path / "fail")])
    assert status() == 2
    assert re.search(r"training B=2 failed: see .*log\.txt", capsys.readouterr().err)
    assert "| B = 1 | 3.8 | 60.50 |" in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "fail").write_text("none")
    assert status() == 0
    assert (tmp_path / "out" / "calls").read_text().split("\n")[:3] == ["B=1", "B=2", "B=2 resumed"]
    assert "| B = 2 | 3.8 | 60.50 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "figure.png").width > 100


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--only", "B=3"], "--only B=3: choose of B=1 B=1.25"), (["--", "--lr", "1"], "has results for options=")],
)
def test_refuses(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "fail").write_text("B=1")
    for options, expected in ((["--", "--fail", str(tmp_path / "fail")], "training B=1 failed"), (more, message)):
        monkeypatch.setattr(sys, "argv", [*arguments, *options])
        assert status() == 2
        assert expected in capsys.readouterr().err


def test_alignment_is_one_where_the_network_looks_for_the_image_itself() -> None:
    x = real_image(8)
    encoded = timm_bcos.encode_image(x, 3)
    model = timm_bcos.bcosify(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(1)),
                              timm_bcos.BcosConfig.paper(gamma_scale=1.0, max_out=1)).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([encoded, -encoded]))
    assert script.alignment(model, x) == pytest.approx(1, abs=1e-5)


def test_families_are_those_of_the_paper() -> None:
    assert [v.x for v in script.FAMILIES["b"]] == [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5]
    counts = {}
    for variant in script.FAMILIES["growth"]:
        model = timm.create_model(variant.model, device="meta", **dict(variant.kwargs))
        counts[variant.name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert [counts[f"g = {g}, MaxOut 2"] for g in (20, 22, 24, 26, 28, 30, 32)] == [
        6.8,
        8.0,
        9.4,
        10.8,
        12.4,
        14.0,
        15.8,
    ]
    assert counts["g = 32, MaxOut 1"] == 7.9
