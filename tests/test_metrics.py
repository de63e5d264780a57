"""Metrics on networks whose right answers are known."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from conftest import PHOTOS, load_script, real_image
from PIL import Image
from torch import Tensor, nn

from timm_bcos import MethodError
from timm_bcos.attribution.registry import METHODS, register
from timm_bcos.judging.metrics import METRICS, evaluate

pytest.importorskip("captum")
script = load_script("metrics")


class UpperHalf(nn.Module):
    """Two classes; the first one's logit is the contrast of the upper half."""

    num_classes = 2
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        contrast = 10 * (x[..., : x.shape[-2] // 2, :] - 0.4).abs().mean((1, 2, 3))
        return torch.stack([contrast, torch.zeros_like(contrast)], 1)


@pytest.fixture
def oracle() -> Any:
    """Methods that know, and that claim the contrary."""

    def upper(subject: Any, x: Tensor, targets: Tensor) -> Tensor:
        maps = torch.rand(x.shape[0], *x.shape[-2:], generator=torch.Generator().manual_seed(0)) * 0.01
        maps[:, : x.shape[-2] // 2] += (x[:, :, : x.shape[-2] // 2] - 0.4).abs().mean(1)
        return maps

    register("right")(upper)
    register("wrong")(lambda subject, x, targets: -upper(subject, x, targets))
    yield
    for name in ("right", "wrong"):
        METHODS.pop(name)


def test_deletion_and_insertion_reward_the_right_pixels(oracle: None) -> None:
    x, targets = real_image(40, 2), torch.zeros(2, dtype=torch.int64)
    areas = {(m, k): evaluate(UpperHalf().eval(), x, targets, m, k) for m in ("deletion", "insertion")
             for k in ("right", "wrong")}  # fmt: skip
    assert (areas["deletion", "right"] < areas["deletion", "wrong"] - 0.05).all()
    assert (areas["insertion", "right"] > areas["insertion", "wrong"] + 0.05).all()
    # reading the removal of the least important pixels backwards is the same curve
    torch.testing.assert_close(areas["insertion", "right"], areas["deletion", "wrong"])


def test_deletion_by_hand() -> None:
    """Four rows of equal weight, deleted one by one: the logit falls in equal steps."""

    class Rows(UpperHalf):
        def forward(self, x: Tensor) -> Tensor:
            present = (x[:, 0, :, 0] > 0.9).sum(1).float()
            return torch.stack([present, torch.zeros_like(present)], 1)

    x = torch.zeros(1, 3, 4, 4)
    x[:, :, :, 0] = 1.0
    x[:, :, :, 1:] = 0.5  # the mean of every channel is 0.625
    register("first_column")(
        lambda subject, x, targets: (x[:, 0] > 0.9).float() - torch.arange(16).reshape(4, 4) * 1e-3
    )
    try:
        area = evaluate(Rows().eval(), x, torch.tensor([0]), "deletion", "first_column").item()
    finally:
        METHODS.pop("first_column")
    curve = torch.tensor([3.0, 2, 1] + [0] * 13).sigmoid()  # after 1, 2, ... 16 pixels
    assert area == pytest.approx(torch.trapezoid(curve).item() / 15, abs=1e-4)


def test_faithfulness_correlation_tells_right_from_wrong(oracle: None) -> None:
    x, targets = real_image(40, 2), torch.zeros(2, dtype=torch.int64)
    model = UpperHalf().eval()
    right, wrong = (evaluate(model, x, targets, "faithfulness_correlation", k).mean() for k in ("right", "wrong"))
    assert right > 0.2 > -0.2 > wrong


def test_a_map_that_never_changes_is_stable_and_fails_the_randomisation() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    x, targets = real_image(32, 2), torch.tensor([0, 1])
    ramp = torch.arange(32.0 * 32).reshape(32, 32)
    register("constant")(lambda subject, x, targets: ramp.expand(len(x), -1, -1))
    try:
        assert evaluate(model, x, targets, "max_sensitivity", "constant").abs().max() == 0
        assert evaluate(model, x, targets, "randomisation", "constant").min() == pytest.approx(1)
    finally:
        METHODS.pop("constant")
    assert evaluate(model, x, targets, "max_sensitivity", "gradient").min() > 0
    assert evaluate(model, x, targets, "randomisation", "gradient").abs().max() < 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_repeatable_and_without_traces(metric: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=2, temperature=1e-6).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, targets = real_image(32), torch.tensor([1])
    a, b = (evaluate(model, x, targets, metric) for _ in range(2))
    torch.testing.assert_close(a, b, equal_nan=True)
    assert a.shape == (1,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_batch_norms_keep_the_signal_of_random_weights_alive() -> None:
    model = timm.create_model("bcos_efficientnet_lite0", pretrained=True).eval()
    correlation = evaluate(model, real_image(64, 2), torch.tensor([1, 6]), "randomisation")
    assert correlation.isfinite().all() and 0 < correlation.abs().max() < 0.9


def test_maps_without_content_are_an_error() -> None:
    register("nothing")(lambda subject, x, targets: torch.zeros_like(x[:, 0]))
    try:
        with pytest.raises(MethodError, match=r"randomisation of nothing: .* all equal to zero"):
            evaluate(UpperHalf().eval(), real_image(16, 2), torch.tensor([0, 1]), "randomisation", "nothing")
    finally:
        METHODS.pop("nothing")


def test_unknown_metric() -> None:
    with pytest.raises(MethodError, match="no metric 'area'"):
        evaluate(UpperHalf().eval(), real_image(32), torch.tensor([0]), "area")


def test_script_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 32, 32))
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=2, pretrained_cfg_overlay=overlay).eval()
    for c in range(2):
        folder = tmp_path / "data" / "test" / f"class{c}"
        folder.mkdir(parents=True)
        Image.open(sorted(PHOTOS.glob("*.jpg"))[c]).convert("RGB").resize((40, 40)).save(folder / f"{c}.png")
    monkeypatch.setattr("timm_bcos.cli.arguments.load_model", lambda *_: model)
    arguments = ["metrics.py", "--data-dir", str(tmp_path / "data"), "--split", "test", "--out", str(tmp_path / "out")]
    options = ["--metrics", "max_sensitivity", "--methods", "bcos", "lrp", "ixg", "--images", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, *options])
    script.main()
    text = (tmp_path / "out" / "metrics.csv").read_text()
    assert len(text.splitlines()) == 1 + 2 * 2
    script.main()
    assert (tmp_path / "out" / "metrics.csv").read_text() == text
    assert "left out: lrp has rules" in capsys.readouterr().out
    assert "| ixg |" in (tmp_path / "out" / "metrics.md").read_text()
