"""Films of explanations."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import LOADING, PHOTOS
from timm_bcos import InputError
from timm_bcos.cli.app import app
from timm_bcos.explanation.video import VIDEO_SUFFIXES, explain_video, is_own_film
from timm_bcos.explanation.visualization import on_white

av = pytest.importorskip("av")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 48, 48), crop_pct=1.0)
    return timm.create_model("bcosify", arch="test_resnet", num_classes=3, pretrained_cfg_overlay=overlay).eval()


@pytest.fixture(params=[".mp4", ".gif"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Eleven frames of a turning cup, ten a second."""
    path = tmp_path / f"clip{request.param}"
    photo = Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((96, 64))
    with av.open(str(path), "w") as film:
        stream = film.add_stream("gif" if path.suffix == ".gif" else "libx264", Fraction(10))
        stream.pix_fmt, stream.width, stream.height = "rgb8" if path.suffix == ".gif" else "yuv420p", 96, 64
        for k in range(11):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(photo.rotate(5 * k)), format="rgb24")))
        film.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def test_every_frame_is_explained_beside_itself(model: nn.Module, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{clip.suffix}"
    counts = explain_video(model, clip, out, target=1, batch_size=4)
    assert counts == {1: 11}
    found, given = frames(out), frames(clip)
    assert len(found) == len(given) == 11
    assert found[0].shape == (48, 96, 3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = transform(Image.fromarray(given[5]))[None]
    expected = torch.cat([x[0].movedim(0, -1), on_white(timm_bcos.explain(model, x, 1).to_rgba())[0]], 1)
    difference = (to_tensor(Image.fromarray(found[5])).movedim(0, -1) - expected).abs().mean()
    assert difference < (0.03 if clip.suffix == ".gif" else 0.12)  # 256 colors; half the resolution of colors


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_every_suffix_can_be_written(model: nn.Module, clip: Path, tmp_path: Path, suffix: str) -> None:
    explain_video(model, clip, tmp_path / f"out{suffix}", target=1)
    assert len(frames(tmp_path / f"out{suffix}")) == 11


def test_classes_of_the_frames_are_counted(model: nn.Module, clip: Path, tmp_path: Path) -> None:
    assert explain_video(model, clip, tmp_path / f"out{clip.suffix}").total() == 11


def test_command_line(clip: Path, tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOADING, lambda *_: model)
    result = CliRunner().invoke(app, ["explain", str(clip), "--out", str(tmp_path / "out"), "--target", "2"])
    assert result.exit_code == 0, result.output
    assert "class 2" in result.output and "11 frames" in result.output
    assert len(frames(tmp_path / "out" / clip.name)) == 11


def test_files_that_are_no_films(model: nn.Module, tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("no film at all")
    out = tmp_path / "out" / "x.mp4"
    for source, message in ((fake, "is no film"), (tmp_path / "none.mp4", "no film at")):
        with pytest.raises(InputError, match=message):
            explain_video(model, source, out)
    assert not out.exists()


def test_a_film_that_ends_early_leaves_nothing_half_written(
    model: nn.Module, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / f"x{clip.suffix}"
    out.parent.mkdir()
    out.write_text("of before")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_bcos.explanation.video.explain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_video(model, clip, out)
    assert out.read_text() == "of before"
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_film_for_each_target_beside_the_users(
    clip: Path, tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOADING, lambda *_: model)
    before = clip.read_bytes()
    for _ in range(2):  # the second run replaces the films of the first
        arguments = ["explain", str(clip), "--out", str(tmp_path), "--target"]
        assert CliRunner().invoke(app, [*arguments, "2"]).exit_code == 0
        assert CliRunner().invoke(app, [*arguments, "0", "--target", "2"]).exit_code == 0
    assert clip.read_bytes() == before
    names = {f"clip{end}{clip.suffix}" for end in ("", "_2", "_class-0", "_class-2")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert sorted(path.name for path in tmp_path.iterdir() if is_own_film(path)) == sorted(names - {clip.name})


def test_a_gif_without_delays_is_explained_whole(model: nn.Module, tmp_path: Path) -> None:
    pictures = [Image.open(PHOTOS / "coffee.jpg").resize((48, 32)).rotate(20 * k) for k in range(5)]
    pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=100)
    content = (tmp_path / "x.gif").read_bytes()
    without = re.sub(rb"\x21\xf9\x04.{4}\x00", b"", content, flags=re.DOTALL)  # the blocks that hold the delays
    assert len(content) - len(without) == 5 * 8
    (tmp_path / "x.gif").write_bytes(without)
    assert explain_video(model, tmp_path / "x.gif", tmp_path / "out.gif").total() == 5
    assert len(frames(tmp_path / "out.gif")) == 5
    (tmp_path / "x.gif").write_bytes(without[: len(without) // 2])
    with pytest.raises(InputError, match=r"x\.gif is no film"):
        explain_video(model, tmp_path / "x.gif", tmp_path / "cut.gif")


@pytest.mark.parametrize("suffix", [".gif", ".mkv"])
def test_films_of_threads_are_refused(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    path, size = tmp_path / f"thread{suffix}", (16, 2000)
    if suffix == ".gif":
        Image.new("L", size).save(path, save_all=True, append_images=[Image.new("L", size, 9)])
    else:
        with av.open(str(path), "w") as film:
            stream = film.add_stream("ffv1", Fraction(10))
            stream.pix_fmt, (stream.width, stream.height) = "yuv420p", size
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((*size[::-1], 3), np.uint8), format="rgb24")))
            film.mux(stream.encode(None))
    with pytest.raises(InputError, match="too long and thin: 16 × 2000 pixels"):
        explain_video(model, path, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
