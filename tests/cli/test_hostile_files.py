"""The command line against unlucky and hostile use: no traceback, nothing overwritten, nothing left half done."""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import save_file

from tests.helpers import PHOTOS, command
from timm_bcos.cli import exceptions
from timm_bcos.cli.outputs import OutputPaths, slug
from timm_bcos.data.photos import is_own_picture, open_photo
from timm_bcos.errors import InputError
from timm_bcos.explanation.visualization import save_image

CLASSES = ["c", "c++", "c#", "hat", "Hat", r"$\bad$", "++", "x" * 300, "\u732b", "truck"]


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options that name a small network."""
    path = tmp_path / "weights" / "cnn9.safetensors"
    path.parent.mkdir()
    save_file(timm.create_model("bcos_cnn9").state_dict(), path)
    names = path.with_name("names.txt")
    names.write_text("\n".join(CLASSES), encoding="utf-8")
    return ["--model", "bcos_cnn9", "--checkpoint", str(path), "--classes", str(names)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user works."""
    path = tmp_path / "user"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def photo(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize(size).save(path)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Nothing overwritten.


def test_an_output_is_never_an_input(small: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(folder / "mine.png")
    photo(folder / "mine_hat.png")
    photo(folder / "other.png")
    (folder / "mine_c.png").symlink_to("other.png")
    before = snapshot(folder)
    assert command("explain", "mine.png", "--out", ".", "--target", "3", "--target", "0", *small) == 0
    after = snapshot(folder)
    assert before.items() <= after.items()
    new = ["mine_2.png", "mine_c_2.png", "mine_c_overlay.jpg", "mine_hat_2.png", "mine_hat_overlay.jpg"]
    assert sorted(after.keys() - before.keys()) == new
    assert command("explain", ".", "--out", ".", "--target", "3", *small) == 0
    assert before.items() <= snapshot(folder).items()
    output = capsys.readouterr()
    assert "left out 5 files that timm-bcos wrote" in output.err
    assert "mine_2.png\n" not in output.out
    assert not [name for name in snapshot(folder) if name.startswith("mine_2_")]


def test_own_pictures_are_replaced(small: list[str], folder: Path) -> None:
    photo(folder / "mine.jpg")
    for _ in range(2):
        assert command("explain", "mine.jpg", "--out", "out", "--target", "3", *small) == 0
        assert sorted(os.listdir("out")) == ["mine.png", "mine_hat.png", "mine_hat_overlay.jpg"]


def test_no_picture_of_one_run_overwrites_another(small: list[str], folder: Path) -> None:
    photo(folder / "a.jpg")
    photo(folder / "a_hat.jpg")
    everything = [part for k in range(10) for part in ("--target", str(k))]
    assert command("explain", "a.jpg", "a_hat.jpg", "--out", "out", *everything, *small) == 0
    names = os.listdir("out")
    assert len(names) == 2 * (1 + 2 * 10)
    assert len({name.lower() for name in names}) == len(names)
    assert {"a.png", "a_c.png", "a_c_2.png", "a_c_3.png", "a_hat.png", "a_hat_2.png", "a_hat_3.png"} <= set(names)
    assert {slug(name) for name in ("c", "C++", "c#")} == {"c"}


def test_long_names(small: list[str], folder: Path) -> None:
    long = [photo(folder / f"{letter * 251}.png") for letter in "nm"] + [photo(folder / ("ü" * 125 + ".png"))]
    assert command("explain", *long, "--out", "out", "--target", "3", *small) == 0
    assert sum(name.endswith("_hat.png") for name in os.listdir("out")) == 3
    assert max(len(os.fsencode(name)) for name in os.listdir("out")) <= 255


def test_outputs_that_cannot_be_a_folder(small: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(folder / "mine.png")
    before = snapshot(folder)
    for out in ("mine.png", "mine.png/inner", "/dev/null"):
        assert command("explain", "mine.png", "--out", out, *small) == 2
        assert "is not a directory" in capsys.readouterr().err
    assert snapshot(folder) == before
    with pytest.raises(InputError, match="cannot be written"):
        OutputPaths(Path("/proc/1/none"))


# No traceback.


def assert_one_line(text: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert text.startswith("timm-bcos: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["explain", "x.jpg", "--device", "cdua"], "no device 'cdua' here"),
        (["explain", "x.jpg", "--device", "meta"], "no device 'meta' here"),
        (["explain", "x.jpg", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["explain", "x.jpg", "--model", ""], "timm knows no model ''"),
        (["check", "--model", "test_resnet.nope"], "arch='test_resnet.nope': Invalid pretrained tag"),
        (["check", "--model", "local-dir:/nope"], "cannot read the config of local-dir:/nope: Config file not found"),
        (["check", "--model", "hf-hub:"], "'hf-hub:' has no model id"),
        (["check", "--model", "test_resnet", "--b", "inf"], "--b inf"),
        (["check", "--model", "bcos_cnn9", "--b", "1.5"], "bcos_cnn9 has B = 2, not 1.5"),
        (["check", "--model", "vit_tiny_patch16_224", "--size", "5"], "the model fails on an image of 5 × 5 pixels"),
        (["run", "none.py"], "no script none.py"),
    ],
)
def test_errors_are_one_line(arguments: list[str], text: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 2
    error = capfd.readouterr().err
    assert text in error
    assert_one_line(error)


@pytest.mark.parametrize("arguments", [["--b", "0.5"], ["--b", "nan"], ["--size", "0"], ["--size", "-5"]])
def test_numbers_out_of_range(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert command("check", "--model", "test_resnet", *arguments) == 2
    error = capfd.readouterr().err
    assert arguments[0] in error
    assert "Traceback" not in error


def raising(error: BaseException) -> int:
    def run() -> None:
        raise error

    return exceptions.exit_status(run)


def test_whatever_is_raised_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (
            RuntimeError("first\nsecond"),
            1,
            "RuntimeError: first (set TIMM_BCOS_TRACEBACK=1 to see the traceback)",
        ),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (PermissionError(13, "Permission denied", "x.png"), 1, "Permission denied: x.png"),
        (MemoryError(), 1, "MemoryError: MemoryError (set TIMM_BCOS_TRACEBACK=1 to see the traceback)"),
        (InputError("this"), 2, "this"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ]
    for error, status, text in cases:
        assert raising(error) == status
        assert capsys.readouterr().err == f"timm-bcos: {text}\n"
    assert raising(BrokenPipeError(32, "Broken pipe")) == 141
    assert capsys.readouterr().err == ""
    assert raising(SystemExit("text")) == 1 and raising(SystemExit(7)) == 7 and raising(SystemExit()) == 0
    monkeypatch.setenv(exceptions.TRACEBACK, "1")
    raising(RuntimeError("first"))
    assert "in run\n" in capsys.readouterr().err


def test_a_batch_goes_on_past_any_failure(
    small: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        photo(folder / f"{name}.png")
    original = PngImageFile.load

    def load(self: PngImageFile) -> object:
        if Path(self.filename).name == "b.png":
            raise ZeroDivisionError("by chance")
        return original(self)

    monkeypatch.setattr(PngImageFile, "load", load)
    assert command("explain", ".", "--out", "out", "--top", "1", *small) == 1
    output = capsys.readouterr()
    assert "b.png: broken image (by chance)" in output.out
    assert "1 of 3 photos failed: b.png" in output.err
    assert output.out.count("probability") == 2


def test_a_full_disk_stops_no_other_photo(
    small: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(folder / "a.png")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert command("explain", "a.png", "--out", "out", *small) == 1
    assert "a.png: No space left on device" in capsys.readouterr().out
    assert os.listdir("out") == []


def test_channels(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(folder / "a.png")
    for channels, status in ((1, 0), (4, 2)):
        network = timm.create_model("bcos_cnn9", in_chans=channels, num_classes=3)
        args = argparse.Namespace(model="bcos_cnn9", num_classes=3, in_chans=channels, model_kwargs={})
        torch.save({"state_dict": network.state_dict(), "args": args}, folder / "w.pth.tar")
        assert command("explain", "a.png", "--checkpoint", "w.pth.tar", "--out", "out") == status
    assert "the model takes 4 channels, photos have 1 or 3" in capsys.readouterr().err
    assert is_own_picture(folder / "out" / "a.png")


# Processes of their own.


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen(
        [sys.executable, "-m", "timm_bcos", *map(str, arguments)], text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
        **pipes,
    )  # fmt: skip


def test_output_is_clean_where_it_is_no_terminal(small: list[str], folder: Path) -> None:
    """No bars, no warnings of torch's; names that the encoding lacks and that are no text."""
    names = [os.fsdecode(b"bad\xff.png"), "wei\u00df.png", "\u732b.png"]
    for name in names:
        photo(folder / name)
    process = start("explain", ".", *small, "--top", "1", env=dict(LC_ALL="C", PYTHONIOENCODING="ascii"))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("probability") == 3
    assert errors == ""


def test_nothing_can_be_written(small: list[str], folder: Path) -> None:
    photo(folder / "a.png")
    with open("/dev/full", "w") as full:
        process = start("explain", "a.png", *small, stdout=full)
        _, errors = process.communicate()
        assert (process.returncode, errors) == (1, "timm-bcos: No space left on device\n")
        process = start("--help", stdout=full, stderr=full)
        process.communicate()
        assert process.returncode == 1
    process = start("--help")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (1, 141)


def test_nobody_reads_what_a_run_prints(small: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(folder / "a.png")
    read, write = os.pipe()
    os.close(read)
    for output, status in (("/dev/full", 1), (write, 141)):
        monkeypatch.setattr(sys, "stdout", open(output, "w"))  # noqa: SIM115 (closing would write once more)
        assert command("explain", "a.png", "--out", "out", *small) == status


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupted_runs_leave_nothing_half_done(
    number: signal.Signals, status: int, small: list[str], folder: Path
) -> None:
    photos = [photo(folder / f"{k}.png") for k in range(200)]
    process = start("explain", *photos, *small, "--out", "out")
    for _ in range(random.Random(number).randrange(1, 8)):
        process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (status, f"timm-bcos: stopped by {number.name}\n")
    left = [path for path in (folder / "out").iterdir() if not is_own_picture(path)]
    assert not left


SCRIPT = """
import signal, sys
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("caught", flush=True)
raise RuntimeError("of the script")
"""


def test_scripts_see_signals_and_errors_as_without_us(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    process = start("run", "script.py")
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "caught\n"), errors
    assert "RuntimeError: of the script" in errors
    assert 'raise RuntimeError("of the script")' in errors  # whose traceback is wanted


# Fuzz.


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut, overwritten in places, or with bytes moved."""
    data = bytearray(content[: chance.randrange(len(content))] if chance.random() < 0.4 else content)
    for _ in range(chance.choice((0, 1, 3, 30))):
        if data:
            data[chance.randrange(min(len(data), chance.choice((60, len(data)))))] = chance.randrange(256)
    return bytes(data)


def damaged_images(folder: Path, count: int) -> list[Path]:
    """Seeded, so that a failure can be repeated."""
    chance = random.Random(0)
    pictures = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (24, 24, 3), np.uint8)) for k in range(3)]
    paths = []
    for k in range(count):
        kind = ("png", "jpg", "gif", "webp", "tif", "bmp")[k % 6]
        paths.append(folder / f"{k}.{kind}")
        pictures[0].save(paths[-1], **(dict(save_all=True, append_images=pictures[1:]) if kind == "gif" else {}))
        content = paths[-1].read_bytes()
        paths[-1].write_bytes(damaged(content, chance) if chance.random() < 0.9 else chance.randbytes(200))
    return paths


def test_damaged_images_are_opened_or_refused(tmp_path: Path) -> None:
    refused = 0
    for path in damaged_images(tmp_path, 400):
        try:
            assert open_photo(path).mode == "RGB"
        except InputError:
            refused += 1
    assert 100 < refused < 380


def test_damaged_images_never_stop_a_run(small: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is explained or reported."""
    (folder / "in").mkdir()
    paths = damaged_images(folder / "in", 18)
    status = command("explain", *paths, *small, "--top", "1", "--out", "out")
    output = capsys.readouterr()
    assert status == 1
    assert "Traceback" not in output.out + output.err
    said = [line for line in output.out.splitlines() if not line.startswith("  ")]
    assert len(said) == len(paths)
    assert 3 < sum(": " in line for line in said) < 18
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


WORDS = ["explain", "check", "models", "nonsense", "--model", "--checkpoint", "--target", "--top", "--out",
         "--classes", "--device", "--b", "--size", "--help", "test_resnet", "bcos_cnn9", "x.png", ".", "none", "", "-1",
         "0", "nan", "1e999", "\udcff", "--", "cpu", "99999999999999999999", "x.pth", "status"]  # fmt: skip


@pytest.mark.parametrize(("seed", "count"), [(1, 10), pytest.param(2, 60, marks=pytest.mark.slow)])
def test_random_arguments_never_show_a_traceback(
    seed: int, count: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    photo(folder / "x.png")
    torch.save({"a": torch.zeros(2)}, folder / "x.pth")
    shutil.copy(folder / "x.pth", folder / "none.pth")
    for _ in range(count):
        arguments = chance.choices(WORDS[:3], k=1) + chance.choices(WORDS[3:], k=chance.randrange(6))
        assert command(*arguments) in (0, 1, 2), arguments
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err, arguments
        assert exceptions.TRACEBACK not in output.err, (arguments, output.err)


def test_a_picture_of_our_own_says_so(tmp_path: Path) -> None:
    save_image(torch.rand(4, 4, 4), tmp_path / "x.png")
    assert is_own_picture(tmp_path / "x.png")
    assert not is_own_picture(photo(tmp_path / "y.png"))
