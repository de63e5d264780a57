"""Attribution methods: each against what is known of it."""

from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import enliven, normalized, real_image
from timm_bcos import MethodError
from timm_bcos.attribution import methods
from timm_bcos.attribution.registry import attribute
from timm_bcos.nn.module_utils import hooked

pytest.importorskip("captum")


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model("test_resnet", num_classes=4), real_image(64, 2))


def test_gradients_are_those_of_the_normalized_image(plain: nn.Module) -> None:
    x = real_image(64)
    z = normalized(x, plain.pretrained_cfg).requires_grad_()
    (expected,) = torch.autograd.grad(plain(z)[0, 3], z)
    std = torch.tensor(plain.pretrained_cfg["std"])[:, None, None]
    torch.testing.assert_close(attribute(plain, x, 3, "gradient"), (expected / std).sum(1))
    torch.testing.assert_close(attribute(plain, x, 3, "input_x_gradient"), (expected * z).sum(1))


def test_gradients_of_a_pixel_go_through_both_its_encodings() -> None:
    x = real_image(64)
    converted = enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4), x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(converted(x)[0, 1], x)
    found = attribute(converted, x.detach(), 1, "gradient")
    torch.testing.assert_close(found, expected.sum(1))
    assert found.abs().max() > 1e-3  # the two encodings of a color would cancel if they were summed


def test_integrated_gradients_sum_up_to_the_difference(plain: nn.Module) -> None:
    x = real_image(64)
    z = normalized(x, plain.pretrained_cfg)
    with torch.no_grad():
        difference = (plain(z) - plain(torch.zeros_like(z)))[0, 2]
    total = attribute(plain, x, 2, "integrated_gradients", n_steps=300).sum()
    torch.testing.assert_close(total, difference, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("method", "options"), [("integrated_gradients", dict(n_steps=10)), ("lime", dict(samples=10)),
                                                 ("rise", dict(masks=10))])  # fmt: skip
@pytest.mark.parametrize("size", [64, 480])
def test_large_images_pass_few_at_a_time(plain: nn.Module, method: str, options: dict[str, int], size: int) -> None:
    """As many pixels as 32 images of 224 × 224 have, or as 9, where gradients are taken."""
    x, seen = real_image(size), []
    handle = plain.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    attribute(plain, x, 1, method, **options)
    handle.remove()
    assert max(seen) == (10 if size == 64 else (9 if method == "integrated_gradients" else 32) * 224**2 // size**2)


def test_deep_lift_sums_up_to_the_difference() -> None:
    """In a network of linear layers and activations, of a kind that captum's own table lacks."""
    model, x = enliven(timm.create_model("tf_efficientnet_lite0", num_classes=4), real_image(64)), real_image(64)
    z = normalized(x, model.pretrained_cfg)
    with torch.no_grad():
        difference = (model(z) - model(torch.zeros_like(z)))[0, 2]
    torch.testing.assert_close(attribute(model, x, 2, "deeplift").sum(), difference, rtol=1e-3, atol=1e-3)
    assert (attribute(model, x, 2, "input_x_gradient").sum() - difference).abs() > 0.1


def test_grad_cam_literally(plain: nn.Module) -> None:
    x = real_image(64)
    features = plain.forward_features(normalized(x, plain.pretrained_cfg)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(plain.forward_head(features)[0, 1], features)
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
    expected = F.interpolate(cam, (64, 64), mode="bilinear")[:, 0].detach()
    torch.testing.assert_close(attribute(plain, x, 1, "gradcam"), expected)
    other = attribute(plain, x, 1, "gradcam", layer="layer2")
    assert not torch.allclose(other, expected)
    with pytest.raises(MethodError, match="no layer 'layer9'"):
        attribute(plain, x, 1, "gradcam", layer="layer9")


def test_grad_cam_refuses_layers_without_maps(plain: nn.Module) -> None:
    with pytest.raises(MethodError, match=r"layer 'fc' returns \(1, 4\)"):
        attribute(plain, real_image(64), 1, "gradcam", layer="fc")
    plain.register_module("idle", nn.Identity())
    with pytest.raises(MethodError, match="layer 'idle' returns no tensor: name another"):
        attribute(plain, real_image(64), 1, "gradcam", layer="idle")
    del plain.idle
    model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)).eval()
    with pytest.raises(MethodError, match=r"layer 'stages.0.blocks.0.mlp.fc1' returns \(1, 16, 16, 32\)"):
        attribute(model, real_image(64), 1, "gradcam", layer="stages.0.blocks.0.mlp.fc1")
    assert attribute(model, real_image(64), 1, "gradcam", layer="stages.0.blocks.0").any()


class Brightness(nn.Module):
    """Two classes: how bright the upper left and the lower right quarter are."""

    num_classes = 2
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return 20 * torch.stack([x[..., :half, :half].mean((1, 2, 3)), x[..., half:, half:].mean((1, 2, 3))], 1)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients", "occlusion", "rise"])
def test_methods_find_what_the_network_looks_at(method: str) -> None:
    x = 0.5 + 0.1 * real_image(32)
    options: dict[str, Any] = dict(masks=300, p=0.5) if method == "rise" else {}
    maps = attribute(Brightness().eval(), x, 0, method, **options)[0]
    assert maps[:16, :16].mean() > maps[:16, 16:].mean()
    assert maps[:16, :16].mean() > maps[16:, 16:].mean()


class Difference(Brightness):
    """The same with a second quarter that speaks against each class, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        quarters = super().forward(x)
        return self.act(20 + quarters - quarters.flip(1))


@pytest.mark.parametrize(
    "method",
    ["gradient", "input_x_gradient", "integrated_gradients", "deeplift", "smoothgrad", "guided_backprop", "occlusion"],
)
def test_signs_say_what_speaks_for_a_class_and_what_against_it(method: str) -> None:
    maps = attribute(Difference().eval(), 0.5 + 0.1 * real_image(32), [0], method)[0]
    windows = 4 if method == "occlusion" else 0  # which reach over the border of a quarter
    assert (maps[: 16 - windows, : 16 - windows] > 0).all()
    assert (maps[16 + windows :, 16 + windows :] < 0).all()
    torch.testing.assert_close(attribute(Difference().eval(), 0.5 + 0.1 * real_image(32), [1], method)[0], -maps)


class Contrast(Brightness):
    """The same for contrast, which LIME takes away when it fills a segment with its mean color."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return 20 * torch.stack([x[..., :half, :half].std((1, 2, 3)), x[..., half:, half:].std((1, 2, 3))], 1)


def test_lime_finds_what_the_network_looks_at() -> None:
    maps = attribute(Contrast().eval(), real_image(64), 0, "lime", samples=200)[0]
    assert len(maps.unique()) in range(2, 7)  # five segments, and nothing elsewhere
    assert maps[:32, :32].mean() > maps[:32, 32:].mean()
    assert maps[:32, :32].mean() > maps[32:, 32:].mean()


def test_rise_sums_over_all_masks() -> None:
    """40 masks come in two portions; the literal formula over all of them, from the same random numbers."""
    model, x = Brightness().eval(), real_image(32)
    found = attribute(model, x, 1, "rise", masks=40, p=0.3)
    generator = torch.Generator().manual_seed(0)
    masks = torch.cat([methods.rise_masks(count, 8, 0.3, (32, 32), generator) for count in (32, 8)])
    scores = torch.stack([model(x * mask).softmax(1)[0, 1] for mask in masks])
    torch.testing.assert_close(found[0], (scores[:, None, None] * masks).sum(0) / (40 * 0.3))


def test_rise_masks_cover_p_of_the_image() -> None:
    masks = methods.rise_masks(2000, 8, 0.1, (30, 30))
    assert masks.shape == (2000, 30, 30)
    assert masks.min() >= 0 and masks.max() <= 1
    assert masks.mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_attention_rollout_literally(pool: str) -> None:
    """The product of (attention + identity) / 2 over the layers, each row of which is a distribution over tokens."""
    model = timm.create_model("test_vit", num_classes=3, global_pool=pool, fc_norm=False).eval()
    fused, projected = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")], []
    x = real_image(160)
    qkv = [block.attn.qkv for block in model.blocks]
    with torch.no_grad(), hooked(qkv, lambda module, args, output: projected.append(output[0].double())):
        model(normalized(x, model.pretrained_cfg))
    rolled = torch.eye(101, dtype=torch.double)
    for output, block in zip(projected, model.blocks, strict=True):
        q, k, _ = output.unflatten(1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
        attention = (q @ k.transpose(1, 2) * block.attn.scale).softmax(2).mean(0)
        rolled = (attention + torch.eye(101)) / 2 @ rolled
    torch.testing.assert_close(rolled.sum(1), torch.ones(101, dtype=torch.double))
    row = rolled[0] if pool == "token" else rolled[1:].mean(0)
    expected = F.interpolate(row[1:].reshape(1, 1, 10, 10), 160, mode="bilinear")[0]
    found = attribute(model, x, 0, "attention_rollout")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert (found > 0).all()
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_grad_cam_refuses_what_has_no_maps(name: str) -> None:
    kwargs = dict(depths=(1, 1), embed_dim=24, num_heads=(2, 2)) if name.startswith("swin") else {}
    model = timm.create_model(name, **kwargs).eval()
    with pytest.raises(MethodError, match=r"gradcam needs feature maps \(N, C, H, W\)"):
        attribute(model, real_image(model.pretrained_cfg["input_size"][-1]), 0, "gradcam")


def test_smooth_grad_literally(plain: nn.Module) -> None:
    x, generator = real_image(64), torch.Generator().manual_seed(3)
    noise = [0.2 * torch.randn(3, 64, 64, generator=generator) for _ in range(2)]
    gradients = []
    for one in noise:
        noisy = (x + one).requires_grad_()
        plain(normalized(noisy, plain.pretrained_cfg))[0, 1].backward(inputs=[noisy])
        gradients.append(noisy.grad.sum(1))
    found = attribute(plain, x, 1, "smoothgrad", samples=2, stdev=0.2, seed=3)
    torch.testing.assert_close(found, sum(gradients) / 2)


def test_deep_lift_literally() -> None:
    first, second = nn.Linear(12, 9, dtype=torch.double), nn.Linear(9, 2, dtype=torch.double)
    model: Any = nn.Sequential(nn.Flatten(1), first, nn.SiLU(inplace=True), second).eval()
    model.num_classes, model.pretrained_cfg = 2, dict(mean=(0.0,) * 3, std=(0.5,) * 3)
    x = torch.rand(2, 3, 2, 2, dtype=torch.double)
    expected = torch.zeros(2, 12, dtype=torch.double)
    for n, target in enumerate((1, 0)):
        z = x[n].flatten() / 0.5
        for unit in range(9):
            before, now = first.bias[unit], first.bias[unit] + first.weight[unit] @ z
            multiplier = (F.silu(now) - F.silu(before)) / (now - before)
            expected[n] += (second.weight[target, unit] * multiplier * first.weight[unit] * z).detach()
    found = attribute(model, x, [1, 0], "deeplift")
    torch.testing.assert_close(found, expected.reshape(2, 3, 2, 2).sum(1))
    assert model[2].inplace


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)])
def test_deep_lift_passes_max_pooling(pool: nn.Module) -> None:
    """Overlapping windows, too: contributions sum up to the difference."""
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), pool, nn.Conv2d(6, 5, 3), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(4)
    model: Any = nn.Sequential(*layers)
    model(torch.zeros(1, 3, 13, 13))
    model.double().eval()
    model.num_classes, model.pretrained_cfg = 4, dict(mean=(0.4,) * 3, std=(0.2,) * 3)
    x = torch.rand(2, 3, 13, 13, dtype=torch.double)
    with torch.no_grad():
        z = (x - 0.4) / 0.2
        difference = (model(z) - model(torch.zeros_like(z)))[:, 3]
    torch.testing.assert_close(attribute(model, x, 3, "deeplift").sum((1, 2)), difference)


def test_deep_lift_is_captum_s_where_nothing_is_tied() -> None:
    """Neither windows that overlap, nor activations of the baseline that rounding would rank before pooling."""
    captum = pytest.importorskip("captum.attr")
    layers = nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ELU(), nn.Flatten(), nn.LazyLinear(4)
    model: Any = nn.Sequential(*layers)
    model(torch.zeros(1, 3, 14, 14))
    model.double().eval()
    model.num_classes, model.pretrained_cfg = 4, dict(mean=(0.4,) * 3, std=(0.2,) * 3)
    x = torch.rand(2, 3, 14, 14, dtype=torch.double)
    expected = captum.DeepLift(model).attribute(((x - 0.4) / 0.2).requires_grad_(), target=3).sum(1)
    torch.testing.assert_close(attribute(model, x, 3, "deeplift"), expected)


def test_deep_lift_refuses_a_module_that_runs_twice() -> None:
    class Twice(Brightness):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(super().forward(x) - 1) - 1)

    for act in (nn.ReLU(), nn.SiLU()):
        with pytest.raises(
            MethodError, match=f"needs a module for each activation; one {type(act).__name__} runs twice"
        ):
            attribute(Twice(act).eval(), real_image(16), 0, "deeplift")


@pytest.mark.parametrize("rectifier", [nn.ReLU, nn.ReLU6])
def test_guided_backprop_passes_only_positive_gradients_through_active_units(rectifier: type[nn.Module]) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(12, 40, dtype=torch.double), nn.Linear(40, 2, dtype=torch.double)
    model: Any = nn.Sequential(nn.Flatten(1), first, rectifier(), second).eval()
    model.num_classes, model.pretrained_cfg = 2, dict(mean=(0.0,) * 3, std=(0.1,) * 3)
    x = torch.rand(1, 3, 2, 2, dtype=torch.double)
    value = first(x.flatten(1) / 0.1)
    active = (value > 0) & ((value < 6) | (rectifier is nn.ReLU))
    assert 0 < active.sum() < 40 and ((value > 6).any())
    expected = (active * second.weight[1].clamp(min=0)) @ first.weight / 0.1
    torch.testing.assert_close(attribute(model, x, 1, "guided_backprop"), expected.reshape(1, 3, 2, 2).sum(1))


class Residual(nn.Module):
    """A sum, a mean and a gate by functions, and timm's batch norm with an activation, all without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.pretrained_cfg = 3, dict(input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), timm.layers.BatchNormAct2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.se, self.act, self.fc = timm.layers.SqueezeExcite(8), nn.ReLU(), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        return self.fc(self.act(x + self.se(self.bn2(self.conv2(x)))).mean((2, 3)))


def test_relevance_adds_up_to_the_logit_whatever_its_sign() -> None:
    torch.manual_seed(0)
    model, x = Residual().double().eval(), real_image(16, 3).double()
    for norm in (model.bn1, model.bn2):
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_()
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(x).detach()
    assert logits.min() < 0 < logits.max()
    for target in range(3):
        relevance = attribute(model, x, [target] * 3, "lrp").sum((1, 2))
        torch.testing.assert_close(relevance, logits[:, target], rtol=1e-3, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_relevance_merges_norms_where_they_follow_and_undoes_it() -> None:
    model = timm.create_model("densenet121", growth_rate=8, block_config=(2, 2), num_classes=3).eval()
    enliven(model, real_image(64, 2))
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(real_image(64))
    assert attribute(model, real_image(64), 1, "lrp").any()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(model(real_image(64)), logits, rtol=0, atol=0)
    with pytest.raises(MethodError, match="GroupNorm"):
        attribute(timm.create_model("resnet50_gn").eval(), real_image(64), 1, "lrp")
