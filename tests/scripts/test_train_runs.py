"""The script that trains what a TOML file lists, with a training script that takes no time."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import load_script, script_status
from timm_bcos import InputError

script = load_script("train_runs")

TRAIN = """
import pathlib, sys  # as timm's with a LogitDistillationTask
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(given["--output"]) / given["--experiment"]
with (folder.parent / "calls").open("a") as calls:
    calls.write(" ".join([folder.name, *sys.argv[1:]]) + "\\n")
(folder / "last.pth.tar").touch()
if folder.name == pathlib.Path(given["--fail"]).read_text():
    sys.exit(3)
"""
PLAN = """
seeds = 2
options = "--fail {failing}"
[plain]
options = "--lr 1e-4"
[bcos]
options = "--kd-model-name local-dir:{out}/plain-{seed}"
[once]
seeds = 1
options = "--lr 2e-4"
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "plan.toml").write_text(PLAN)
    (tmp_path / "fail").write_text("bcos-0")
    return [str(tmp_path / "plan.toml"), str(tmp_path / "out"), "--train-script",
            str(tmp_path / "train.py"), f"failing={tmp_path / 'fail'}"]  # fmt: skip


@pytest.fixture
def started_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python train.py` instead of `timm-bcos run train.py`, which imports torch for seconds."""

    def run(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        assert command[1:4] == ["-m", "timm_bcos", "run"]
        return subprocess.run([command[0], *command[4:]], **options)

    monkeypatch.setattr("timm_training.subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.mark.usefixtures("started_directly")
def test_trains_each_with_its_seeds_and_goes_on_where_it_failed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script_status(monkeypatch, script, *arguments) == 2
    assert "training bcos-0 failed" in capsys.readouterr().err
    (tmp_path / "fail").write_text("none")
    assert script_status(monkeypatch, script, *arguments) == 0
    calls = [line.split() for line in (tmp_path / "out" / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["plain-0", "bcos-0", "bcos-0", "once-0", "plain-1", "bcos-1"]
    assert "--resume" in calls[2]
    assert "--resume" not in calls[1] + calls[3]
    assert calls[-1][-4:] == ["--kd-model-name", f"local-dir:{tmp_path / 'out'}/plain-1", "--seed", "1"]


def test_options_of_the_runner_stand_before_the_script(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which refuses --explanation-weight without a teacher."""
    (tmp_path / "plan.toml").write_text(PLAN.replace("[bcos]", '[bcos]\ntask = "--explanation-weight 1"'))
    assert script_status(monkeypatch, script, *arguments, "--only", "bcos-1") == 0
    (tmp_path / "plan.toml").write_text(PLAN.replace("[once]", '[once]\ntask = "--explanation-weight 1"'))
    assert script_status(monkeypatch, script, *arguments, "--only", "once") == 2
    assert "give train.py a teacher" in (tmp_path / "out" / "once-0" / "log.txt").read_text()


def test_a_run_like_another_has_its_options_first() -> None:
    plan = dict(
        options="-a {x}", one=dict(options="-b 1"), two=dict(like="one", options="-b 2"), three=dict(like="two")
    )
    found = {one.name: " ".join(one.options) for one in script.trainings(plan, dict(x="0"))}
    assert found["two-0"] == "-a 0 -b 1 -b 2 --seed 0" == found["three-0"]
    with pytest.raises(InputError, match="like = 'one'"):
        script.trainings(dict(two=plan["two"]), {})


@pytest.mark.usefixtures("started_directly")
def test_only_some(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script_status(monkeypatch, script, *arguments, "--only", "plain", "once-0") == 0
    assert (tmp_path / "out" / "calls").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("only", "left_out", "message"),
    [(["--only", "nobody"], 0, "--only nobody: choose of plain-0, bcos-0"), ([], 1, "give failing=VALUE")],
)
def test_refuses(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    only: list[str],
    left_out: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script_status(monkeypatch, script, *arguments[: len(arguments) - left_out], *only) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("started_directly")
def test_refuses_a_folder_of_other_options(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script_status(monkeypatch, script, *arguments, "--only", "plain") == 0
    (tmp_path / "plan.toml").write_text(PLAN.replace("1e-4", "3e-4"))
    assert script_status(monkeypatch, script, *arguments, "--only", "plain") == 2
    assert "has results for options=" in capsys.readouterr().err
