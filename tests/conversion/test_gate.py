"""Biases that only gate: `BcosConfig(bias="reference")`."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, SelectAdaptivePool2d
from torch import Tensor, nn

import timm_bcos
from tests.helpers import assert_exact, command, enliven, normalized, real_image
from timm_bcos import BcosConfig, InputError, bcosify
from timm_bcos.dynamic_linear.mode import DynamicLinearMode, active
from timm_bcos.nn.layers import ShiftedActivation

Double = torch.float64
ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


def lively(arch: str = "test_efficientnet") -> nn.Module:
    """A plain model whose norms add and subtract."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
    return model.eval()


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_is_the_activation_s_change(act: type[nn.Module]) -> None:
    shifts = torch.tensor([-1.5, 0.0, 0.7], dtype=Double)
    x = torch.randn(2, 3, 4, 4, dtype=Double)
    found, plain = ShiftedActivation(act(), shifts)(x), act()
    for n, c, i, j in [(0, 0, 1, 2), (1, 1, 3, 0), (1, 2, 2, 2)]:
        wanted = plain(x[n, c, i, j] + shifts[c]) - plain(shifts[c].clone())
        assert found[n, c, i, j].item() == pytest.approx(wanted.item(), abs=1e-12)
    assert not ShiftedActivation(act(), shifts)(torch.zeros_like(x)).any()


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_gates_lie_between_0_and_1(act: type[nn.Module]) -> None:
    x = 5 * torch.randn(1, 64, 20, 20, dtype=Double)
    gate = ShiftedActivation(act(inplace=True), 3 * torch.randn(64, dtype=Double))(x) / x
    assert gate.min() >= -1e-12 and gate.max() <= 1 + 1e-12
    assert gate.min() < 0.01 and gate.max() > 0.99


def test_explanation_mode_computes_the_same_beside_kinks() -> None:
    """However near x is to 0, and the shift to where the activation bends."""
    shifts = torch.tensor([0.0, -1e-9, 1e-9, 6.0, 6 - 1e-9, -0.5], dtype=Double)
    values = torch.tensor([0.0, 1e-12, -1e-12, 3e-9, -3e-9, 2e-8, -2e-8, 0.5], dtype=Double)
    layer, x = ShiftedActivation(nn.ReLU6(), shifts), values.reshape(-1, 1, 1, 1).expand(-1, 6, 1, 1).clone()
    leaf = x.requires_grad_()
    with active(DynamicLinearMode(leaf)):
        found = layer(leaf.clone())
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-20)
    (slopes,) = torch.autograd.grad(found.sum(), leaf)
    assert slopes.min() >= 0 and slopes.max() <= 1 + 1e-3  # of 1e-12 beside 1 rounding leaves three digits


def test_gradients_are_those_of_finite_differences() -> None:
    layer = ShiftedActivation(nn.SiLU(), torch.randn(3, dtype=Double))
    x = torch.randn(2, 3, 2, 2, dtype=Double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, shift: torch.func.functional_call(layer, dict(shift=shift), x),
                                    (x, layer.shift))  # fmt: skip


@pytest.mark.parametrize("b", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("arch", ["test_efficientnet", "test_byobnet", "test_resnet"])
def test_the_image_explains_all(arch: str, b: float) -> None:
    x = real_image(64, 2, Double)
    plain = timm.create_model(arch, num_classes=6).double()
    enliven(plain, normalized(x, plain.pretrained_cfg))
    model = timm_bcos.calibrate(bcosify(plain, BcosConfig.finetune(b=b, bias="reference", stem="encoded")), x).eval()
    for module in model.modules():
        if isinstance(module, ShiftedActivation):
            nn.init.normal_(module.shift)
    explanation = assert_exact(model, x, 1e-10)
    assert explanation.bias.abs().max() < 1e-12
    assert timm_bcos.check(model).exact


def test_without_borders_it_is_the_original_less_its_answer_to_gray() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 12, 3, stride=2, bias=False),
              BatchNormAct2d(12, act_layer=nn.SiLU), SelectAdaptivePool2d(flatten=True), nn.Linear(12, 4)]  # fmt: skip
    plain = nn.Sequential(*layers).double().eval()
    for norm in (layers[1], layers[3]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
    plain.pretrained_cfg = dict(input_size=(3, 15, 15), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    x = torch.rand(4, 3, 15, 15, dtype=Double)
    wanted = plain(normalized(x, plain.pretrained_cfg)) - plain(torch.zeros(1, 3, 15, 15, dtype=Double))
    model = bcosify(plain, BcosConfig.finetune(b=1, bias="reference")).eval()
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_pretrained_weights_begin_at_their_answers_to_gray(tmp_path: Path) -> None:
    plain = lively().float()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    overlay = dict(file=str(tmp_path / "plain.safetensors"))
    loaded = timm.create_model(
        "bcosify", True, arch="test_efficientnet", bias="reference", pretrained_cfg_overlay=overlay, num_classes=5
    )
    wanted = bcosify(plain, BcosConfig.finetune(bias="reference")).state_dict()
    found = loaded.state_dict()
    assert found.keys() == wanted.keys() and any(key.endswith("act.shift") for key in found)
    assert any(value.any() for key, value in found.items() if key.endswith("act.shift"))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_its_own_weights_pass_unchanged(tmp_path: Path) -> None:
    model = bcosify(lively().float(), BcosConfig.finetune(bias="reference"))
    for module in model.modules():
        if isinstance(module, ShiftedActivation):
            nn.init.normal_(module.shift)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    overlay = dict(file=str(tmp_path / "own.safetensors"))
    loaded = timm.create_model(
        "bcosify", True, arch="test_efficientnet", bias="reference", pretrained_cfg_overlay=overlay, num_classes=5
    )
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_untrained_models_and_those_without_storage_begin_at_0() -> None:
    model = timm.create_model("bcosify", arch="test_efficientnet", bias="reference", device="meta")
    assert model.bn1.act.shift.is_meta
    model = timm.create_model("bcosify", arch="test_efficientnet", bias="reference")
    assert not model.bn1.act.shift.any()


@pytest.mark.parametrize("kwargs", [dict(in_chans=1), dict(global_pool=""), dict(num_classes=0)], ids=str)
def test_models_of_other_shapes_begin_at_their_answers_too(kwargs: dict[str, object]) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet", **kwargs).eval()
    nn.init.normal_(plain.bn1.bias)
    wanted = plain.bn1.bias.detach().clone()
    model = bcosify(plain, BcosConfig.finetune(bias="reference", mean=(0.5,), std=(0.5,)))
    torch.testing.assert_close(model.bn1.act.shift.data, wanted)


def test_other_biases_are_dropped() -> None:
    model = bcosify(timm.create_model("test_resnet"), BcosConfig.finetune(bias="reference"))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias") and ".se." not in name]  # gates
    model = bcosify(timm.create_model("test_efficientnet"), BcosConfig.finetune(bias="reference"))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias") and ".se." not in name]  # gates


@pytest.fixture(scope="module")
def gated() -> tuple[nn.Module, Tensor]:
    return bcosify(lively().float(), BcosConfig.finetune(b=1.25, bias="reference")).eval(), real_image(64, 2)


def test_fuses(gated: tuple[nn.Module, Tensor]) -> None:
    model, x = gated
    torch.testing.assert_close(timm_bcos.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_is_scripted(gated: tuple[nn.Module, Tensor]) -> None:
    model, x = gated
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_is_exported_with_its_explanation(gated: tuple[nn.Module, Tensor]) -> None:
    model, x = gated
    logits, weights, _ = timm_bcos.export_explainer(model, x).module()(x, torch.tensor([1, 3]))
    explanation = timm_bcos.explain(model, x, [1, 3])
    torch.testing.assert_close(logits, explanation.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, explanation.weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["gradcam", "deeplift", "input_x_gradient", "integrated_gradients"])
def test_post_hoc_methods_see_each_image(gated: tuple[nn.Module, Tensor], method: str) -> None:
    model, x = gated
    together = timm_bcos.attribute(model, x, [1, 3], method)
    alone = torch.cat([timm_bcos.attribute(model, x[i : i + 1], [target], method) for i, target in enumerate((1, 3))])
    assert together.shape == (2, 64, 64)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"bias='gates'.*give True or False or 'reference'"):
        BcosConfig(bias="gates")
    assert not BcosConfig(bias="reference").adds_bias and BcosConfig(bias=True).adds_bias


def test_converts_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("convert", "--model", "test_efficientnet", "--bias", "--reference", "--out", tmp_path / "out") == 2
    assert "choose one" in capsys.readouterr().err
    torch.save(lively().float().state_dict(), tmp_path / "plain.pth")
    given = ("--model", "test_efficientnet", "--checkpoint", tmp_path / "plain.pth", "--reference", "--b", "1.5")
    assert command("convert", *given, "--out", tmp_path / "out") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.bcos_config.bias == "reference" and model.bn1.act.shift.any()
