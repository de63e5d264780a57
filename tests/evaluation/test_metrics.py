"""Metrics on networks whose right answers are known."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from tests.helpers import LOADING, PHOTOS, command, real_image
from timm_bcos import InputError, MethodError, TargetError
from timm_bcos.attribution.registry import METHODS, register
from timm_bcos.evaluation import metrics
from timm_bcos.evaluation.metrics import METRICS, evaluate
from timm_bcos.nn.module_utils import first_output

pytest.importorskip("captum")


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


@pytest.fixture
def given() -> Any:
    """Register maps, or functions to maps, as methods of the names given."""
    names: list[str] = []

    def add(name: str, maps: Any) -> str:
        register(name)(maps if callable(maps) else lambda subject, x, targets: maps.expand(len(x), -1, -1))
        names.append(name)
        return name

    yield add
    for name in names:
        METHODS.pop(name)


@pytest.mark.parametrize("metric", ["deletion", "insertion"])
def test_deletion_and_insertion_by_hand(metric: str, given: Any) -> None:
    """Four rows of equal weight, which come first or last: the logit falls, or rises, in equal steps."""

    class Rows(UpperHalf):
        def forward(self, x: Tensor) -> Tensor:
            present = (x[:, 0, :, 0] > 0.9).sum(1).float()
            return torch.stack([present, torch.zeros_like(present)], 1)

    x = torch.zeros(1, 3, 4, 4)
    x[:, :, :, 0] = 1.0
    x[:, :, :, 1:] = 0.5  # the mean of every channel is 0.625
    given("first_column", (x[:, 0] > 0.9).float() - torch.arange(16).reshape(4, 4) * 1e-3)
    area = evaluate(Rows().eval(), x, [0], metric, "first_column").item()
    deleted = torch.tensor([3.0, 2, 1] + [0] * 13).sigmoid()  # after 1, 2, ... 16 pixels
    inserted = torch.tensor([0.0, 1, 2, 3] + [4] * 12).sigmoid()  # with 0, 1, ... 15 pixels
    curve = deleted if metric == "deletion" else inserted
    assert area == pytest.approx(torch.trapezoid(curve).item() / 15, abs=1e-6)


class Linear(nn.Module):
    """Logits w · x and 0, so small that probabilities are linear too."""

    num_classes = 2
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(mean=(0.0,), std=(1.0,))

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1e-4 * torch.randn(3, 12, 12, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        logit = (self.weight * x).sum((1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], 1)


@pytest.fixture
def middling() -> Tensor:
    """Images that no noise takes out of [0, 1]."""
    return 0.3 + 0.4 * torch.rand(2, 3, 12, 12, dtype=torch.double)


def test_faithfulness_correlation_of_a_linear_network(middling: Tensor, given: Any) -> None:
    """What a pixel adds in place of the mean is exactly what the logit loses with it."""
    model = Linear().eval()
    effect = (model.weight * (middling - middling.mean((2, 3), keepdim=True))).sum(1).detach()
    for name, maps, expected in (("effect", effect, 1.0), ("shifted", 3 * effect + 5, 1.0), ("against", -effect, -1.0)):
        given(name, lambda subject, x, targets, maps=maps: maps)
        found = evaluate(model, middling, [0, 0], "faithfulness_correlation", name)
        torch.testing.assert_close(found, torch.full((2,), expected, dtype=torch.double), rtol=1e-6, atol=0)


def test_faithfulness_correlation_draws_sets_of_a_sixteenth(given: Any, middling: Tensor) -> None:
    model, x, generator = UpperHalf().eval(), middling, torch.Generator().manual_seed(4)
    maps = given("random", torch.rand(12, 12))
    literal = []
    for _ in range(50):
        for image, chosen in zip(x, torch.rand(2, 144, generator=generator).topk(9).indices, strict=True):
            changed = image.clone()
            for pixel in chosen.tolist():
                changed[:, pixel // 12, pixel % 12] = image.mean((1, 2))
            fall = model(image[None]).softmax(1)[0, 1] - model(changed[None]).softmax(1)[0, 1]
            literal.append((METHODS[maps].function(None, image[None], None)[0].flatten()[chosen].sum(), fall))
    runs = torch.tensor(literal).reshape(50, 2, 2).double()
    expected = [np.corrcoef(runs[:, image].T.numpy())[0, 1] for image in range(2)]
    found = evaluate(model, x, [1, 1], "faithfulness_correlation", maps, seed=4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_max_sensitivity_of_a_linear_network(middling: Tensor) -> None:
    """The map w · x changes by w · noise, the largest of five of which counts; the gradient does not change."""
    model, generator = Linear().eval(), torch.Generator().manual_seed(7)
    noises = [0.02 * (2 * torch.rand(middling.shape, generator=generator) - 1).double() for _ in range(5)]
    changes = [(model.weight * noise).sum(1).flatten(1).norm(dim=1) for noise in noises]
    expected = torch.stack(changes).amax(0) / (model.weight * middling).sum(1).flatten(1).norm(dim=1)
    torch.testing.assert_close(evaluate(model, middling, [0, 0], "max_sensitivity", "ixg", seed=7), expected)
    assert evaluate(model, middling, [0, 0], "max_sensitivity", "gradient").abs().max() < 1e-12


def test_max_sensitivity_is_captums(middling: Tensor) -> None:
    from captum.metrics import sensitivity_max

    model = timm.create_model("test_resnet", num_classes=2).eval().double()
    generator = torch.Generator().manual_seed(0)
    noises = [0.02 * (2 * torch.rand(middling.shape, generator=generator) - 1) for _ in range(5)]
    function = METHODS["input_x_gradient"].function
    subject = metrics.AttributionModel(model)
    expected = sensitivity_max(
        lambda x: (function(subject, first_output(x), torch.tensor([1, 0])),), middling, lambda x: x + noises.pop(0),
        n_perturb_samples=5, max_examples_per_batch=2,
    )  # fmt: skip
    torch.testing.assert_close(evaluate(model, middling, [1, 0], "max_sensitivity", "input_x_gradient"), expected)


def test_ranks_by_hand() -> None:
    ranks = metrics._ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, -1.0]]))
    assert ranks.tolist() == [[3.5, 1, 3.5, 2], [3, 3, 3, 1]]
    low_high = torch.tensor([[1.0, 2.0, 10.0], [1.0, 2.0, 10.0]]), torch.tensor([[0.1, 7.0, 8.0], [9.0, 8.0, -3.0]])
    torch.testing.assert_close(metrics._correlation(*map(metrics._ranks, low_high)), torch.tensor([1.0, -1.0]).double())


def test_randomization_draws_other_weights_from_a_generator_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.LSTM(2, 2), nn.Embedding(2, 2), nn.Linear(2, 2))
    state, weights = torch.random.get_rng_state(), []
    for seed in (1, 1, 2):
        with metrics._DrawingFrom(torch.Generator().manual_seed(seed)):
            for module in model:
                module.reset_parameters()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not any(map(torch.equal, weights[0], weights[2]))
    assert not torch.equal(weights[0][0], weights[0][2])  # alike layers have different weights


def test_faithfulness_correlation_tells_right_from_wrong(oracle: None) -> None:
    x, targets = real_image(40, 2), torch.zeros(2, dtype=torch.int64)
    model = UpperHalf().eval()
    right, wrong = (evaluate(model, x, targets, "faithfulness_correlation", k).mean() for k in ("right", "wrong"))
    assert right > 0.2 > -0.2 > wrong


def test_a_map_that_never_changes_is_stable_and_fails_the_randomization(given: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    x, targets = real_image(32, 2), torch.tensor([0, 1])
    ramp = torch.arange(32.0 * 32).reshape(32, 32)
    given("constant", ramp)
    assert evaluate(model, x, targets, "max_sensitivity", "constant").abs().max() == 0
    assert evaluate(model, x, targets, "randomization", "constant").min() == pytest.approx(1)
    assert evaluate(model, x, targets, "max_sensitivity", "gradient").min() > 0
    assert evaluate(model, x, targets, "randomization", "gradient").abs().max() < 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_repeatable_and_without_traces(metric: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=2, temperature=1e-6).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, targets = real_image(32), torch.tensor([1])
    random, numpy_random = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    masks = torch.eye(32)[None]
    a, b, c = (evaluate(model, x, targets, metric, masks=masks, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and a.isfinite().all() and a.shape == (1,) and a.dtype == torch.float64
    assert torch.equal(a, c) == (metric in ("deletion", "insertion", "single_deletion", "energy"))
    assert torch.equal(torch.random.get_rng_state(), random) and (np.random.get_state()[1] == numpy_random).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_batch_norms_keep_the_signal_of_random_weights_alive() -> None:
    model = timm.create_model("bcos_efficientnet_lite0.clothing", pretrained=True).eval()
    correlation = evaluate(model, real_image(64, 2), torch.tensor([1, 6]), "randomization")
    assert correlation.isfinite().all() and 0 < correlation.abs().max() < 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_maps_without_content(metric: str, given: Any) -> None:
    x = real_image(16, 2)
    nothing, broken = given("nothing", torch.zeros(16, 16)), given("broken", torch.full((16, 16), torch.nan))
    for method, text in ((nothing, "all equal to zero"), (broken, "not finite")):
        with pytest.raises(MethodError, match=f"{metric} of {method}: the maps are {text}"):
            evaluate(UpperHalf().eval(), x, torch.tensor([0, 1]), metric, method)
    half = given("half", lambda subject, x, targets: (x - 0.4).abs().mean(1) * (targets == 0)[:, None, None])
    values = evaluate(UpperHalf().eval(), x, torch.tensor([0, 1]), metric, half, masks=torch.ones(2, 16, 16))
    assert values[0].isfinite() and values[1].isnan()  # where there is nothing to judge


def test_what_cannot_be_evaluated() -> None:
    model, x = UpperHalf().eval(), real_image(32)
    with pytest.raises(TargetError, match="from 0 to 1"):
        evaluate(model, x, [2], "deletion", "input_x_gradient")
    with pytest.raises(TargetError, match="whole numbers"):
        evaluate(model, x, torch.tensor([True]), "deletion", "input_x_gradient")
    with pytest.raises(InputError, match="finite"):
        evaluate(model, x * torch.nan, [0], "deletion", "input_x_gradient")
    with pytest.raises(MethodError, match="no option 'steps'"):
        evaluate(model, x, [0], "deletion", "integrated_gradients", steps=3)


def test_unknown_metric() -> None:
    with pytest.raises(MethodError, match="no metric 'area'"):
        evaluate(UpperHalf().eval(), real_image(32), torch.tensor([0]), "area")


def test_the_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 32, 32))
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=2, pretrained_cfg_overlay=overlay).eval()
    for c in range(2):
        folder = tmp_path / "data" / "test" / f"class{c}"
        folder.mkdir(parents=True)
        Image.open(sorted(PHOTOS.glob("*.jpg"))[c]).convert("RGB").resize((40, 40)).save(folder / f"{c}.png")
    monkeypatch.setattr(LOADING, lambda *_: model)
    arguments = ["evaluate", "metrics", "--data-dir", tmp_path / "data", "--split", "test", "--out", tmp_path / "out"]
    methods = [word for method in ("bcos", "lrp", "input_x_gradient") for word in ("--method", method)]
    options = ["--metric", "max_sensitivity", "--images", 2, *methods]
    assert command(*arguments, *options) == 0
    text = (tmp_path / "out" / "metrics.csv").read_text()
    assert len(text.splitlines()) == 1 + 2 * 2
    assert command(*arguments, *options) == 0
    assert (tmp_path / "out" / "metrics.csv").read_text() == text
    assert "left out: lrp has rules" in capsys.readouterr().out
    earlier = text.replace("input_x_gradient", "ixg")  # as earlier versions wrote it
    (tmp_path / "out" / "metrics.csv").write_text(earlier)
    assert command(*arguments, *options) == 0
    assert (tmp_path / "out" / "metrics.csv").read_text() == earlier  # nothing is computed again
    assert "| input_x_gradient |" in (tmp_path / "out" / "metrics.md").read_text()
    assert command(*arguments, "--metric", "area") == 2
    assert "no metric 'area': choose one of deletion" in capsys.readouterr().err
