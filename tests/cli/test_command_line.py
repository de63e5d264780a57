"""The command line as a whole: its help, its start, and the commands that no other file is about."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import PHOTOS, ROOT, command, real_image
from tests.helpers.slow import slow_but_for
from timm_bcos.cli.app import COMMANDS, GROUPS, Command, app
from timm_bcos.cli.commands import evaluate
from timm_bcos.cli.outputs import is_own

ALL = [*COMMANDS, *(entry for entries in GROUPS.values() for entry in entries)]


def paths(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All commands, by the words that call them."""
    for name, entry in group.commands.items():
        yield from paths(entry, (*path, name)) if hasattr(entry, "commands") else [(*path, name)]


@pytest.mark.parametrize("words", list(paths(typer.main.get_command(app))), ids=" ".join)
def test_help_gives_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0
    assert f"Example: timm-bcos {' '.join(words)}" in result.output


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("pointing-game", "all that support the model"),
        ("metrics", f"all fast ones that support the model: {', '.join(evaluate.QUICK)}"),
        ("aggatt", "bcos, input_x_gradient, gradcam"),
    ],
)
def test_help_states_the_default_methods(name: str, default: str) -> None:
    group: Any = typer.main.get_command(app)
    [method] = [p for p in group.commands["evaluate"].commands[name].params if p.name == "method"]
    assert method.help.endswith(f"(default: {default})")


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.example.partition(" -")[0])
def test_examples_are_parsed(entry: Command) -> None:
    parsed: Any = typer.main.get_command(app)

    def silence(group: Any) -> None:
        for sub in getattr(group, "commands", {}).values():
            silence(sub)
            sub.callback = (lambda **_: None) if not hasattr(sub, "commands") else sub.callback

    silence(parsed)
    assert not parsed.main(shlex.split(entry.example), "timm-bcos", standalone_mode=False)


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom timm_bcos.cli.exceptions import exit_status\nfrom timm_bcos.cli.app import app\n"
        "assert exit_status(lambda: app(['--help'])) == 0\n"
        "assert not {'torch', 'timm', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out


TELLING = """
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["TELL"]:
            os.write(1, b"importing\\n")
sys.meta_path.insert(0, Finder)
"""


IMPORTED = ["torch", "torch.nn", "torchvision", "timm", "timm_bcos.explanation"]


@pytest.mark.parametrize("module", slow_but_for(["torch.nn", "timm_bcos.explanation"], IMPORTED))
def test_interrupted_while_it_starts(module: str, tmp_path: Path) -> None:
    """Imports take seconds, and some swallow what a signal raises in them."""
    (tmp_path / "sitecustomize.py").write_text(TELLING)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", "timm_bcos", "explain", *[str(PHOTOS / "coffee.jpg")] * 200, "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TELL": module},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "timm-bcos: stopped by SIGINT\n")


def test_an_import_ends_before_a_signal_stops_the_command(tmp_path: Path) -> None:
    """An exception in the midst of torch's imports aborts the process."""
    (tmp_path / "foreign.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nprint('imported')\n")
    code = (
        "import time\nfrom timm_bcos.cli.exceptions import exit_status\n"
        "def command():\n    import foreign\n    time.sleep(60)\n    print('never')\n"
        "raise SystemExit(exit_status(command))"
    )
    given: Any = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "capture_output": True, "text": True}
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, **given)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "imported\n", "timm-bcos: stopped by SIGTERM\n")
    at_once = subprocess.run(
        [sys.executable, "-c", code.replace("    time.sleep(60)\n    print('never')\n", "")], **given
    )
    assert (at_once.returncode, at_once.stdout, at_once.stderr) == (ended.returncode, ended.stdout, ended.stderr)


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("models", "*resnet20*") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "name"
    model = timm.create_model("bcos_cifar_resnet20")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert row.split()[:3] == ["bcos_cifar_resnet20.cifar10", f"{parameters:.1f}", "32"]
    assert "comes with the package; top-1 on JPEG copies of CIFAR-10's test split: 86.6 %" in row
    assert command("models", "bcosv2_resnet50", "--pretrained") == 0
    tags = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert set(tags) == {f"bcosv2_resnet50.{tag}" for tag in ("mpi_in1k", "mpi_long_in1k")}
    assert all(timm.models.is_model_pretrained(tag) for tag in tags)
    assert command("models", "bcos_densenet161", "--pretrained") == 2  # it has none
    assert "no model is called 'bcos_densenet161'" in capsys.readouterr().err


def test_convert_writes_what_timm_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    given = ("--model", "test_resnet", "--checkpoint", tmp_path / "plain.pth")
    same, two = tmp_path / "same", tmp_path / "two"
    assert command("convert", *given, "--b", 1, "--bias", "--out", same) == 0
    assert command("convert", *given, "--out", two) == 0
    assert sorted(path.name for path in two.iterdir()) == ["config.json", "model.safetensors"]
    x = real_image(64)
    models = {folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in (same, two)}
    mean, std = (torch.tensor(plain.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(models[same](x), plain((x - mean) / std), rtol=1e-4, atol=1e-5)
    assert (models[two].bcos_config.b, models[two].bcos_config.bias) == (2, False)
    assert command("explain", PHOTOS / "coffee.jpg", "--model", f"local-dir:{two}", "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert command("convert", "--out", tmp_path / "none") == 2
    assert "no model given" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = timm.create_model("bcos_cifar_resnet20", pretrained=True).eval(), real_image(32, 3)
    explanation = timm_bcos.explain(model, x)
    for name in ("net.pt2", "net.onnx"):
        assert command("export", "--model", "bcos_cifar_resnet20", "--out", tmp_path / name) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.pt2"]
    program = torch.export.load(tmp_path / "net.pt2").module()
    logits, weights, _ = program(x, torch.full((3,), -1))
    torch.testing.assert_close(logits, explanation.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights, explanation.weights, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), explanation.logits, rtol=1e-4, atol=1e-4)
    assert command("export", "--out", tmp_path / "net.pth") == 2
    assert "choose a format by its suffix, .pt2 or .onnx" in capsys.readouterr().err


def test_explain_writes_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page of the user's is kept, a page of ours is renewed, and neither is explained."""
    photo, page = tmp_path / "cup.jpg", tmp_path / "cup.html"
    Image.open(PHOTOS / "coffee.jpg").save(photo)
    page.write_text("<p>mine</p>")
    given = ("--model", "bcos_cifar_resnet20", "--top", 2, "--html", "--out", tmp_path)
    for _ in range(2):
        assert command("explain", tmp_path, *given) == 0
    assert capsys.readouterr().out.count("completeness error") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"cup.jpg", "cup.html", "cup_2.html"}
    assert (page.read_text(), is_own(page), is_own(tmp_path / "cup_2.html")) == ("<p>mine</p>", False, True)
    assert len(re.findall(r'"index": \d+', (tmp_path / "cup_2.html").read_text())) == 2
    assert '"scale": 4,' in (tmp_path / "cup_2.html").read_text()
    assert command("explain", tmp_path, *given, "--scale", 8) == 0
    assert '"scale": 8,' in (tmp_path / "cup_2.html").read_text()
    assert command("explain", tmp_path, *given, "--scale", 6) == 1
    assert "cells have a side of 1, 2, 4, 8, 16 pixels" in capsys.readouterr().out
