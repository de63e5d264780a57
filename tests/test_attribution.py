"""Attribution methods: each against what is known of it."""

from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import enliven, normalised, real_image
from torch import Tensor, nn

import timm_bcos
from timm_bcos import InputError, MethodError, ModelStateError, TargetError
from timm_bcos.attribution import methods
from timm_bcos.attribution.registry import METHODS, Subject, attribute, register

pytest.importorskip("captum")
FEW: dict[str, dict[str, Any]] = dict(rise=dict(masks=40), lime=dict(samples=40), smoothgrad=dict(samples=3))


REFUSED = {
    ("bcos", "plain"): "no B-cos network",
    ("lrp", "converted"): "lrp has rules",
    ("attention_rollout", "plain"): "vision transformers",
    ("attention_rollout", "converted"): "vision transformers",
}


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model("test_resnet", num_classes=4), real_image(64, 2))


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4), real_image(64, 2))


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", ["plain", "converted"])
def test_every_method_gives_signed_maps_or_a_reason(method: str, kind: str, request: pytest.FixtureRequest) -> None:
    model, x = request.getfixturevalue(kind), real_image(64, 2)
    options = FEW.get(method, {})
    if (method, kind) in REFUSED:
        with pytest.raises(MethodError, match=REFUSED[method, kind]):
            attribute(model, x, [1, 2], method)
        return
    maps = attribute(model, x, [1, 2], method, **options)
    assert maps.shape == (2, 64, 64)
    assert maps.isfinite().all() and not maps.requires_grad and bool(maps.any())
    torch.testing.assert_close(attribute(model, x, [1, 2], method, **options), maps, rtol=0, atol=0)
    one_by_one = [attribute(model, image[None], c, method, **options) for image, c in zip(x, (1, 2), strict=True)]
    if method != "smoothgrad":  # which draws its noise for the whole batch
        torch.testing.assert_close(torch.cat(one_by_one), maps, rtol=1e-3, atol=1e-4 * maps.abs().max().item())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["occlusion", "lime", "rise"])
def test_slow_methods_change_an_image_once_for_all_its_targets(plain: nn.Module, method: str) -> None:
    first, second = real_image(64, 2)[:, None]
    x, targets, seen = torch.cat([first, first, second]), [0, 2, 1], []
    handle = plain.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    together = attribute(plain, x, targets, method, **FEW.get(method, {}))
    passes, seen[:] = sum(seen), []
    single = [attribute(plain, i[None], c, method, **FEW.get(method, {})) for i, c in zip(x, targets, strict=True)]
    handle.remove()
    torch.testing.assert_close(together, torch.cat(single))
    assert 3 * passes == 2 * sum(seen)


def test_own_explanation_is_the_contribution_map(converted: nn.Module) -> None:
    x = real_image(64, 2)
    torch.testing.assert_close(attribute(converted, x), timm_bcos.explain(converted, x).contribution_map)


def test_gradients_are_those_of_the_normalised_image(plain: nn.Module) -> None:
    x = real_image(64)
    z = normalised(x, plain.pretrained_cfg).requires_grad_()
    (expected,) = torch.autograd.grad(plain(z)[0, 3], z)
    std = torch.tensor(plain.pretrained_cfg["std"])[:, None, None]
    torch.testing.assert_close(attribute(plain, x, 3, "gradient"), (expected / std).sum(1))
    torch.testing.assert_close(attribute(plain, x, 3, "ixg"), (expected * z).sum(1))


def test_gradients_of_a_pixel_go_through_both_its_encodings(converted: nn.Module) -> None:
    x = real_image(64).requires_grad_()
    (expected,) = torch.autograd.grad(converted(x)[0, 1], x)
    found = attribute(converted, x.detach(), 1, "gradient")
    torch.testing.assert_close(found, expected.sum(1))
    assert found.abs().max() > 1e-3  # the two encodings of a colour would cancel if they were summed


def test_integrated_gradients_sum_up_to_the_difference(plain: nn.Module) -> None:
    x = real_image(64)
    z = normalised(x, plain.pretrained_cfg)
    with torch.no_grad():
        difference = (plain(z) - plain(torch.zeros_like(z)))[0, 2]
    total = attribute(plain, x, 2, "ig", n_steps=300).sum()
    torch.testing.assert_close(total, difference, rtol=0.02, atol=0.02)


def test_deep_lift_sums_up_to_the_difference() -> None:
    """In a network of linear layers and activations, of a kind that captum's own table lacks."""
    model, x = enliven(timm.create_model("tf_efficientnet_lite0", num_classes=4), real_image(64)), real_image(64)
    z = normalised(x, model.pretrained_cfg)
    with torch.no_grad():
        difference = (model(z) - model(torch.zeros_like(z)))[0, 2]
    torch.testing.assert_close(attribute(model, x, 2, "deeplift").sum(), difference, rtol=1e-3, atol=1e-3)
    assert (attribute(model, x, 2, "ixg").sum() - difference).abs() > 0.1


def test_grad_cam_literally(plain: nn.Module) -> None:
    x = real_image(64)
    features = plain.forward_features(normalised(x, plain.pretrained_cfg)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(plain.forward_head(features)[0, 1], features)
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
    expected = F.interpolate(cam, (64, 64), mode="bilinear")[:, 0].detach()
    torch.testing.assert_close(attribute(plain, x, 1, "gradcam"), expected)
    other = attribute(plain, x, 1, "gradcam", layer="layer2")
    assert not torch.allclose(other, expected)
    with pytest.raises(MethodError, match="no layer 'layer9'"):
        attribute(plain, x, 1, "gradcam", layer="layer9")


class Brightness(nn.Module):
    """Two classes: how bright the upper left and the lower right quarter are."""

    num_classes = 2
    pretrained_cfg: ClassVar[dict[str, Any]] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return 20 * torch.stack([x[..., :half, :half].mean((1, 2, 3)), x[..., half:, half:].mean((1, 2, 3))], 1)


@pytest.mark.parametrize("method", ["gradient", "ixg", "ig", "occlusion", "rise"])
def test_methods_find_what_the_network_looks_at(method: str) -> None:
    x = 0.5 + 0.1 * real_image(32)
    options: dict[str, Any] = dict(masks=300, p=0.5) if method == "rise" else {}
    maps = attribute(Brightness().eval(), x, 0, method, **options)[0]
    assert maps[:16, :16].mean() > maps[:16, 16:].mean()
    assert maps[:16, :16].mean() > maps[16:, 16:].mean()


class Contrast(Brightness):
    """The same for contrast, which LIME takes away when it fills a segment with its mean colour."""

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
    torch.manual_seed(0)
    masks = torch.cat([methods.rise_masks(count, 8, 0.3, (32, 32)) for count in (32, 8)])
    scores = torch.stack([model(x * mask).softmax(1)[0, 1] for mask in masks])
    torch.testing.assert_close(found[0], (scores[:, None, None] * masks).sum(0) / (40 * 0.3))


def test_rise_masks_cover_p_of_the_image() -> None:
    masks = methods.rise_masks(2000, 8, 0.1, (30, 30))
    assert masks.shape == (2000, 30, 30)
    assert masks.min() >= 0 and masks.max() <= 1
    assert masks.mean().item() == pytest.approx(0.1, abs=0.01)


def test_attention_rollout_rows_are_distributions() -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    maps = attribute(model, real_image(160), 0, "attention_rollout")
    assert (maps > 0).all()
    grid = F.avg_pool2d(maps, 16)[0]  # upsampling keeps means but at the borders
    assert grid.sum().item() <= 1.05
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused


def test_attention_rollout_averages_the_patches_where_the_network_does() -> None:
    pooled = timm.create_model("test_vit", num_classes=3, global_pool="avg", fc_norm=False).eval()
    token = timm.create_model("test_vit", num_classes=3).eval()
    token.load_state_dict(pooled.state_dict())
    x = real_image(160)
    maps = [attribute(model, x, 0, "attention_rollout") for model in (pooled, token)]
    assert not torch.allclose(*maps, rtol=1e-3)


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_grad_cam_refuses_what_has_no_maps(name: str) -> None:
    kwargs = dict(depths=(1, 1), embed_dim=24, num_heads=(2, 2)) if name.startswith("swin") else {}
    model = timm.create_model(name, **kwargs).eval()
    with pytest.raises(MethodError, match=r"gradcam needs maps \(N, C, H, W\)"):
        attribute(model, real_image(model.pretrained_cfg["input_size"][-1]), 0, "gradcam")


def test_seeds(plain: nn.Module) -> None:
    x, state = real_image(64), torch.random.get_rng_state()
    a, b, c = (attribute(plain, x, 0, "rise", masks=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_new_methods_register_in_one_line(plain: nn.Module) -> None:
    try:
        register("uniform")(lambda subject, x, targets: torch.ones_like(x[:, 0]))
        assert attribute(plain, real_image(64), 0, "uniform").sum() == 64 * 64
    finally:
        METHODS.pop("uniform")


def test_probabilities_follow_the_config(plain: nn.Module, converted: nn.Module) -> None:
    x = real_image(64)
    assert Subject(plain).probability(x).sum().item() == pytest.approx(1)
    torch.testing.assert_close(Subject(converted).probability(x), converted(x).sigmoid().detach())


def test_bad_input(plain: nn.Module) -> None:
    x = real_image(64)
    with pytest.raises(MethodError, match="no attribution method 'grad'"):
        attribute(plain, x, 0, "grad")
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attribute(plain, x * 255, 0, "ixg")
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        attribute(plain, x[0], 0, "ixg")
    with pytest.raises(TargetError, match="0 to 3"):
        attribute(plain, x, [4], "ixg")
    with pytest.raises(TargetError, match="give 1 classes"):
        attribute(plain, x, [1, 2], "ixg")
    with pytest.raises(ModelStateError, match="training mode"):
        attribute(timm.create_model("test_resnet"), x, 0, "ixg")
    with pytest.raises(MethodError, match="ReLU"):
        attribute(timm.create_model("test_vit").eval(), real_image(160), 0, "guided_backprop")


def test_a_missing_library_names_the_extra(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lime.lime_image", None)
    methods._library.cache_clear()
    with pytest.raises(MethodError, match=r"timm_bcos\[attribution\]"):
        attribute(plain, real_image(64), 0, "lime")
    methods._library.cache_clear()


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
