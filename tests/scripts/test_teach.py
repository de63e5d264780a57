"""The script that teaches a converted network by its original, on a tiny one."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from tests.helpers import PHOTOS, load_script, script_status
from timm_bcos.data.photos import open_photo
from timm_bcos.models.loading import load_model

teach = load_script("teach")
unlabeled = load_script("unlabeled")
ARCH = "test_efficientnet"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    teacher = timm.create_model(ARCH, num_classes=2)
    for module in teacher.modules():  # not those of a new network, which hardly have biases
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((90, 70)).save(tmp_path / "data" / name / "1.png")
    data = str(tmp_path / "data")
    return [str(tmp_path / "teacher.pth"), str(tmp_path / "out"), "--arch", ARCH, "--photos", data, "--test", data,
            "--size", "64", "--steps", "4", "--every", "2", "--batch-size", "4"]  # fmt: skip


def lesson(tmp_path: Path, **changes: object) -> "teach.Lesson":
    given = dict(teacher=tmp_path / "teacher.pth", out=tmp_path, arch=ARCH, b=1.0, antialias=False, device="cpu",
                 amp=False, probability="softmax", rate=1e-3, compile=False, start=None, hints=1.0,
                 weight=1.0)  # fmt: skip
    return teach.Lesson(SimpleNamespace(**given | changes), dict.fromkeys(teach.CALIBRATION, torch.rand(2, 3, 64, 64)))


def test_the_student_starts_as_its_original_less_the_answer_to_gray(arguments: list[str], tmp_path: Path) -> None:
    """At B = 1, but at the borders, where zeros stand for gray in the one and for nothing in the other."""
    started = lesson(tmp_path)
    started.student.eval()
    for name, norm in started.norms.items():  # measured with the borders
        norm.running_var.copy_(started.teacher.get_submodule(name).running_var)
    x = torch.rand(2, 3, 160, 160)
    wanted, _ = teach.answers(started.teacher, (x - started.mean) / started.std)
    found, _ = teach.answers(started.student, x)
    for block in (0, 1, 2):
        margin = 2 * (block + 1)
        inner = (..., slice(margin, -margin), slice(margin, -margin))
        torch.testing.assert_close(
            found[block][inner], (wanted[block] - started.gray[block])[inner], rtol=1e-3, atol=1e-4
        )
    assert (
        teach.feature_difference([w - z for w, z in zip(wanted, started.gray, strict=True)], wanted, started.gray) == 0
    )


def test_norms_divide_by_the_originals_deviation_in_the_ratio_of_both(arguments: list[str], tmp_path: Path) -> None:
    started = lesson(tmp_path, b=2.0)
    x = torch.cat([started.batches[number] for number in teach.CALIBRATION])
    own = started.student.conv_stem(x).var((0, 2, 3), unbiased=False)
    other = started.teacher.conv_stem((x - started.mean) / started.std).var((0, 2, 3), unbiased=False)
    wanted = started.teacher.bn1.running_var * own / other
    before = started.student.bn1.running_var.clone()
    torch.testing.assert_close(before, wanted, rtol=1e-3, atol=0.0)
    started.whole_loss(torch.rand(2, 3, 64, 64)).backward()
    assert torch.equal(started.student.bn1.running_var, before)


def test_an_interrupted_lesson_goes_on(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert script_status(monkeypatch, teach, *arguments) == 0
    arguments[1] = str(tmp_path / "again")
    record, calls = teach.Lesson.record, []

    def interrupted(self: "teach.Lesson", loss: float) -> None:
        record(self, loss)
        calls.append(loss)
        if len(calls) == 1:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(teach.Lesson, "record", interrupted)
    assert script_status(monkeypatch, teach, *arguments) != 0
    assert not (tmp_path / "again" / "student.pth.tar").exists()
    assert script_status(monkeypatch, teach, *arguments) == 0
    whole, pieces = (load_model(checkpoint=tmp_path / name / "student.pth.tar") for name in ("out", "again"))
    assert all(torch.equal(value, pieces.state_dict()[key]) for key, value in whole.state_dict().items())
    assert (tmp_path / "out" / "log.csv").read_text() == (tmp_path / "again" / "log.csv").read_text()
    rows = [line.split(",") for line in (tmp_path / "out" / "log.csv").read_text().splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [("2", "1.25"), ("4", "1.25")]
    config = whole.bcos_config
    assert (config.b, config.stem, config.bias, config.probability) == (1.25, "encoded", "reference", "sigmoid")


def test_the_student_takes_images_as_its_teacher_does(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the size and crop that the teacher's checkpoint of train.py says, not of the architecture's."""
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    told = Namespace(model=ARCH, num_classes=2, input_size=[3, 48, 48], crop_pct=0.8)
    torch.save(dict(state_dict=weights, args=told), tmp_path / "teacher.pth.tar")
    given = [str(tmp_path / "teacher.pth.tar"), *(a for a in arguments[1:] if a not in ("--arch", ARCH))]
    assert script_status(monkeypatch, teach, *given) == 0
    data = resolve_model_data_config(load_model(checkpoint=tmp_path / "out" / "student.pth.tar"))
    assert (data["input_size"], data["crop_pct"]) == ((3, 48, 48), 0.8)


def test_a_lesson_at_another_b_goes_on_from_the_last_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script_status(monkeypatch, teach, *arguments) == 0
    first = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["student"]
    started = lesson(tmp_path, b=1.75, probability="sigmoid", start=tmp_path / "out" / "state.pt")
    found = started.student.state_dict()
    weights = [key for key in found if not key.endswith(("running_var", "bcos_settings"))]
    assert all(torch.equal(found[key], first[key]) for key in weights)
    before = lesson(tmp_path, b=1.25, start=tmp_path / "out" / "state.pt").student
    assert torch.allclose(before.bn1.running_var, first["bn1.running_var"], rtol=1e-4)
    x = torch.cat([started.batches[number] for number in teach.CALIBRATION])
    ratio = started.student.conv_stem(x).var((0, 2, 3)) / before.conv_stem(x).var((0, 2, 3))
    torch.testing.assert_close(found["bn1.running_var"], first["bn1.running_var"] * ratio, rtol=1e-3, atol=0.0)


def test_teaching_brings_the_student_nearer(arguments: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    started = lesson(tmp_path, b=1.25)
    x = torch.rand(4, 3, 64, 64)
    optimizer = torch.optim.Adam(started.student.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = started.whole_loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def test_the_loss_is_the_sum_of_hints_and_answers(arguments: list[str], tmp_path: Path) -> None:
    started, x = lesson(tmp_path, b=1.25), torch.rand(2, 3, 64, 64)
    found = {}
    for hints, weight in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        started.args.hints, started.args.weight = hints, weight
        found[hints, weight] = started.whole_loss(x).item()
    assert min(found.values()) > 0
    assert found[2.0, 3.0] == pytest.approx(2 * found[1.0, 0.0] + 3 * found[0.0, 1.0], rel=1e-4)


def test_divergences_are_the_formulas() -> None:
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    p, q = y.softmax(1), x.softmax(1)
    torch.testing.assert_close(teach.divergence(x, y, "softmax"), (p * (p / q).log()).sum(1).mean())
    p, q = y.sigmoid(), x.sigmoid()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    torch.testing.assert_close(teach.divergence(x, y, "sigmoid"), wanted)


def test_batches_are_the_same_in_every_run() -> None:
    photo = open_photo(PHOTOS / "coffee.jpg")
    images = dict(photos=[photo], scenes=[], icons=[photo.resize((32, 32))])
    batches = unlabeled.Batches(images, 40, batch_size=8)
    assert batches.counts == dict(photos=6, icons=2)
    again = list(unlabeled.Batches(images, 40, batch_size=8).prepared(3, 6))
    assert len(again) == 3
    for number, batch in enumerate(again, 3):
        assert batch.shape == (8, 3, 40, 40) and batch.min() >= 0 and batch.max() <= 1
        assert torch.equal(batch, batches[number])
    assert not torch.equal(again[0], again[1])
    assert not torch.equal(unlabeled.Batches(images, 40, 8, seed=1)[3], again[0])


def test_reads_images_and_leaves_out_the_tiny_ones(tmp_path: Path) -> None:
    for name, size in dict(large=(900, 600), tiny=(40, 30)).items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    assert [image.size for image in unlabeled.load_images([str(tmp_path)], 256)] == [(384, 256)]
    assert len(unlabeled.load_images([str(tmp_path)], 30)) == 2
