"""Explanations that are trained: W(x) as a function of the parameters, beside formulas and finite differences."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.func import functional_call

import timm_bcos
from tests.helpers import SCRIPTS, enliven, normalized, real_image
from tests.training.test_stock_timm import COMMON, TRAIN_SCRIPT, data, needs_train_script  # noqa: F401  (a fixture)
from timm_bcos import (
    BcosConfig,
    BcosConv2d,
    BcosLinear,
    ExplanationDistillationTask,
    GuidedClassificationTask,
    InputError,
    ModelStateError,
    TargetError,
    UncenteredBatchNorm2d,
    bcosify,
    cosine_loss,
    dynamic_weights,
    energy_loss,
    explain,
)
from timm_bcos.dynamic_linear.dual_graph import DualGraph
from timm_bcos.dynamic_linear.mode import DynamicLinearMode, active
from timm_bcos.nn.layers import ShiftedActivation

Double = torch.float64
ARCHITECTURES = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "test_mambaout"]


def network(arch: str, x: Tensor, **config: object) -> nn.Module:
    plain = timm.create_model(arch, num_classes=6).to(x.dtype)
    enliven(plain, normalized(x, plain.pretrained_cfg))
    return timm_bcos.calibrate(bcosify(plain, BcosConfig.finetune(b=1.5, **config)), x).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return real_image(64, 2, Double)


@pytest.mark.parametrize("bias", [False, True, "reference"], ids=["no bias", "bias", "reference"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_and_logits_are_the_network_s(arch: str, bias: bool | str, x: Tensor) -> None:
    model = network(arch, x, bias=bias)
    found, explanation = dynamic_weights(model, x, [1, 4]), explain(model, x, [1, 4])
    torch.testing.assert_close(found.weights, explanation.weights, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.contribution_map, explanation.contribution_map, rtol=1e-10, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    torch.testing.assert_close(found.logits, expected, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(found.logits.square().sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()))


def test_beside_the_formula() -> None:
    """W(x) = diag(f₂) V diag(f₁) U with f the |cos| of each unit: values and gradients, by autograd of the formula."""
    plain = nn.Sequential(nn.Conv2d(3, 5, 4), nn.Flatten(), nn.Linear(5, 3)).double()
    config = BcosConfig.finetune(b=2.0, mean=(0.0,) * 3, std=(1.0,) * 3, classify_positions="never")
    model, x = bcosify(plain, config).eval(), torch.rand(2, 3, 4, 4, dtype=Double)
    stem, head = model[0], model[2]

    def row(u: Tensor, v: Tensor, pixels: Tensor) -> Tensor:
        def factor(w: Tensor, a: Tensor, eps: float) -> Tensor:
            return (w @ a).abs() / w.square().sum(1).sqrt() / (a.square().sum() + eps).sqrt()

        first = torch.diag(factor(u, pixels, stem.eps)) @ u
        second = torch.diag(factor(v, first @ pixels, 0.0)) @ v
        return (second @ first)[1]

    u, v = (w.detach().flatten(1).clone().requires_grad_() for w in (stem.weight, head.weight))
    seen = torch.cat([x, -x], 1)  # the encoding (x, 1 - x), normalized by the mean 0
    expected = torch.stack([row(u, v, pixels.flatten()) for pixels in seen]).reshape(seen.shape)
    found = dynamic_weights(model, x, 1).weights
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(found)
    ours = torch.autograd.grad((found * direction).sum(), [stem.weight, head.weight])
    theirs = torch.autograd.grad((expected * direction).sum(), [u, v])
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one.flatten(1), other, rtol=1e-9, atol=1e-12)


class Attending(nn.Module):
    """B-cos attention over the positions of a map, its queries and keys being a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BcosConv2d(4, 3, 2, dtype=Double)
        self.query, self.value = BcosLinear(3, 3, dtype=Double), BcosLinear(3, 3, dtype=Double)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inner(x).flatten(2).transpose(1, 2)
        query = self.query(tokens)
        return nn.functional.scaled_dot_product_attention(query, query, self.value(tokens)).flatten(1)


def conv(channels: int = 4, **options: object) -> BcosConv2d:
    return BcosConv2d(channels, 4, 3, padding=1, dtype=Double, **options)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "two layers": lambda: nn.Sequential(conv(), conv()),
    "max out": lambda: conv(max_out=2),
    "B = 1.5": lambda: conv(b=1.5),
    "free rows": lambda: conv(normalize_weight=False),
    "depthwise": lambda: nn.Sequential(conv(groups=4), conv()),
    "uncentered norm": lambda: nn.Sequential(conv(), UncenteredBatchNorm2d(4, dtype=Double), conv()),
    "batch norm": lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, dtype=Double), conv()),
    "group norm": lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4, dtype=Double), conv()),
    "layer norm": lambda: nn.Sequential(conv(), nn.LayerNorm([4, 2, 3], dtype=Double), conv()),
    "GELU": lambda: nn.Sequential(conv(), nn.GELU(), conv()),
    "SiLU in place": lambda: nn.Sequential(conv(), nn.SiLU(inplace=True), conv()),
    "gated bias": lambda: nn.Sequential(conv(), ShiftedActivation(nn.SiLU(), torch.randn(4, dtype=Double)), conv()),
    "squeeze and excite": lambda: nn.Sequential(conv(), timm.layers.SqueezeExcite(4, rd_channels=2).double()),
    "attention": Attending,
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", PARTS)
def test_gradients_of_rows_by_finite_differences(name: str, training: bool) -> None:
    part = PARTS[name]().train(training)
    x = torch.rand(2, 4, 2, 3, dtype=Double)
    own = {key: p.detach().clone().requires_grad_() for key, p in part.named_parameters()}

    def rows(*parameters: Tensor) -> Tensor:
        leaf, members = x.clone().requires_grad_(), dict(zip(own, parameters, strict=True))
        statistics = {key: buffer.clone() for key, buffer in part.named_buffers()}
        with DualGraph(leaf).active(), active(DynamicLinearMode(leaf)):
            outputs = functional_call(part, members | statistics, leaf.clone())
        (found,) = torch.autograd.grad(outputs.flatten(1)[:, :3].sum(), leaf, create_graph=True)
        return found  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(rows, tuple(own.values()))


@pytest.mark.parametrize("layer", [conv(2), conv(2, normalize_weight=False, b=1.5), BcosLinear(3, 2, dtype=Double)])
def test_second_derivatives_by_weights(layer: nn.Module) -> None:
    x = torch.randn(2, 2, 2, 3, dtype=Double, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w, x: functional_call(layer, dict(weight=w), x), (weight, x))


@pytest.mark.parametrize("bias", [False, True], ids=["uncentered", "centered"])
def test_training_mode_is_one_step(bias: bool, x: Tensor) -> None:
    """Dropout draws the same for both streams, statistics follow once."""
    model = network("test_resnet", x, bias=bias)
    model.drop_rate = 0.5
    other = copy.deepcopy(model)
    for each in (model, other):
        each.train()
    torch.manual_seed(3)
    found = dynamic_weights(model, x, 2)
    torch.manual_seed(3)
    torch.testing.assert_close(found.logits, other(x), rtol=1e-8, atol=1e-10)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    if not bias:
        share = found.weights * found.inputs
        torch.testing.assert_close(share.sum((1, 2, 3)), found.logits[:, 2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh])
def test_activations_near_zero(act: type[nn.Module]) -> None:
    """In float32, slopes f(p) / p of tiny numbers have finite gradients."""
    layer, tiny = act(), torch.tensor([[0.0, 1e-38, -1e-30, 1e-20, -1e-10, 1e-5, 0.5]])
    scale = torch.ones(1, 7, requires_grad=True)
    leaf = tiny.clone().requires_grad_()
    streams = DualGraph(leaf)
    with streams.active(), active(DynamicLinearMode(leaf)):
        outputs = layer(leaf * scale)
    (slopes,) = torch.autograd.grad(outputs.sum(), leaf, create_graph=True)
    found = torch.autograd.grad(slopes.sum() + streams.counterpart(outputs).sum(), scale)[0]

    exact = tiny.double().where(tiny != 0, 1e-12).requires_grad_()
    slope = layer(exact) / exact  # d (slope(s·x)·s) / d s = slope + x·slope', for s = 1
    (derivative,) = torch.autograd.grad(slope.sum(), exact)
    expected = slope + exact * derivative.where(exact.abs() > 1e-7, 0) + torch.autograd.functional.jacobian(
        lambda x: layer(x).sum(), tiny.double()
    ) * tiny.double()  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_an_in_place_gate(x: Tensor) -> None:
    """It leaves the path, and has its gradient all the same."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = (nn.Conv2d(*channels, 3, 2) for channels in ((3, 4), (4, 4), (4, 6)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)[:, :, 1:-1, 1:-1]
            return self.last(y[:, :, 1:-1, 1:-1] * self.gate(self.first(x)[:, :, ::2, ::2]).sigmoid_().mean()).mean(
                (2, 3)
            )

    config = BcosConfig.finetune(b=1.5, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = bcosify(Gated().double(), config).eval()
    found = dynamic_weights(model, x, 0)
    torch.testing.assert_close(found.weights, explain(model, x, 0).weights)
    expected = torch.autograd.grad(model(x).sum(), model.gate.weight)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.autograd.grad(found.logits.sum(), model.gate.weight)[0], expected)


def test_losses_by_hand() -> None:
    maps = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]], [[-1.0, -1.0], [0.0, 0.0]]])
    masks = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert energy_loss(maps[:1], masks[:1]).item() == pytest.approx(1 / 4)
    assert energy_loss(maps, masks).item() == pytest.approx((1 / 4 + 1) / 2)
    a, b = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]), torch.tensor([[[4.0, 3.0]], [[-2.0, 0.0]]])
    assert cosine_loss(a, b).item() == pytest.approx(1 - (24 / 25 - 1) / 2)
    assert cosine_loss(a, 7 * a).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="shapes"):
        cosine_loss(a, b[:1])
    with pytest.raises(InputError, match="inside"):
        energy_loss(maps, torch.zeros_like(masks))
    with pytest.raises(InputError, match="N, H, W"):
        energy_loss(maps, masks[:, :1])


def steps(task: nn.Module, count: int, *batch: object) -> list[dict[str, float]]:
    optimizer, results = torch.optim.Adam(task.trainable_module.parameters(), 2e-3), []
    for _ in range(count):
        losses = task(*batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        results.append({name: loss.item() for name, loss in losses.items() if name != "output"})
    return results


def test_distillation_of_explanations() -> None:
    x, labels = real_image(64, 3), torch.tensor([0, 1, 2])
    teacher, student = network("test_resnet", x).eval(), network("test_resnet", x).train()
    criterion = nn.CrossEntropyLoss()
    task = ExplanationDistillationTask(student, teacher, criterion, explanation_weight=4.0, temperature=2.0)
    plain = LogitDistillationTask(copy.deepcopy(student), teacher, criterion, temperature=2.0)
    expected, results = plain.train()(x, labels), steps(task.train(), 15, x, labels)
    for name in ("task_loss", "kd_loss"):
        assert results[0][name] == pytest.approx(expected[name].item(), rel=1e-4)
    parts = results[0]["task_loss"] + results[0]["kd_loss"] + 4 * results[0]["explanation_loss"]
    assert results[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert results[-1]["explanation_loss"] < results[0]["explanation_loss"] - 0.1
    with torch.autocast("cpu", torch.bfloat16):
        half = task(x, labels)
    assert half["explanation_loss"].item() == pytest.approx(task(x, labels)["explanation_loss"].item(), abs=0.05)
    target = explain(teacher, x).target
    cosines = nn.functional.cosine_similarity(
        explain(student.eval(), x, target).weights.flatten(1), explain(teacher, x, target).weights.flatten(1)
    )
    student.train()
    assert 1 - cosines.mean().item() < results[0]["explanation_loss"]


def test_guidance_by_boxes() -> None:
    """Positive contributions move into the boxes; images without boxes are classified as ever."""
    x, labels = real_image(64, 3), torch.tensor([0, 1, 2])
    boxes = torch.tensor([[0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 64, 64]])
    model = network("test_resnet", x)
    task = GuidedClassificationTask(model, nn.CrossEntropyLoss(), guidance_weight=3.0)
    results = steps(task, 15, x, labels, boxes)
    assert results[-1]["guidance_loss"] < results[0]["guidance_loss"] - 0.1
    masks = torch.zeros(3, 64, 64)
    masks[0, :32, :32] = masks[1, :32, 32:] = masks[2, 32:] = 1
    positive = explain(model, x, labels).contribution_map.clamp_min(0)
    share = (positive * masks).sum((1, 2)) / positive.sum((1, 2))
    assert 1 - share.mean().item() == pytest.approx(task(x, labels, masks)["guidance_loss"].item(), rel=1e-3)
    unguided = task(x, labels)
    assert set(unguided) == {"loss", "output"}
    soft = nn.functional.one_hot(labels, 6).float()
    assert task(x, soft, boxes)["guidance_loss"].item() == pytest.approx(1 - share.mean().item(), rel=1e-3)


def test_bad_input(x: Tensor) -> None:
    model = network("test_resnet", x)
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        dynamic_weights(model, x[0])
    with pytest.raises(TargetError, match="6 classes"):
        dynamic_weights(model, x, 6)
    with pytest.raises(TargetError, match="logits"):
        dynamic_weights(bcosify(timm.create_model("test_resnet", num_classes=0, global_pool="")).double(), x)
    with pytest.raises(ModelStateError, match="B-cos model"):
        dynamic_weights(timm.create_model("test_resnet").double(), x)
    model.set_grad_checkpointing()
    with pytest.raises(ModelStateError, match="checkpointing"):
        dynamic_weights(model, x)
    model.set_grad_checkpointing(False)
    with pytest.raises(ModelStateError, match="B-cos model"):
        ExplanationDistillationTask(model, timm.create_model("test_resnet", num_classes=6))
    with pytest.raises(ModelStateError, match="DistributedDataParallel"):
        dynamic_weights(nn.DataParallel(model), x)
    with pytest.raises(InputError, match="guidance_weight=-1"):
        GuidedClassificationTask(model, guidance_weight=-1)
    with pytest.raises(TargetError, match="empty"):
        GuidedClassificationTask(model)(x, torch.tensor([0, 1]), [0, 0, 0, 0])


def trained(data: Path, teacher: str, *options: str) -> str:  # noqa: F811
    network = "--model bcos_cnn9 --kd-distill-type logit --log-interval 1 --output out --experiment student"
    script = [sys.executable, "-W", "ignore", "-m", "timm_bcos", "run", *options, str(TRAIN_SCRIPT)]
    result = subprocess.run(
        [*script, "--data-dir", str(data), *COMMON.split(), *network.split(), "--kd-model-name", teacher],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parent)},
        cwd=data.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout + result.stderr


@needs_train_script
def test_train_py_distils_explanations(data: Path) -> None:  # noqa: F811
    teacher = timm.create_model("bcos_cnn9", num_classes=2)
    timm.models.save_for_hf(teacher, data.parent / "teacher")
    output = trained(data, "local-dir:teacher", "--explanation-weight", "2")
    assert (data.parent / "out" / "student" / "last.pth.tar").is_file(), output
    plain = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(plain, data.parent / "plain")
    refused = trained(data, "local-dir:plain", "--explanation-weight", "2").splitlines()[-1]
    assert "no B-cos model" in refused
