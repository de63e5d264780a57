"""Attribution methods: each against what is known of it."""

import copy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
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
from timm_bcos.nn.modules import hooked

pytest.importorskip("captum")
FEW: dict[str, dict[str, Any]] = dict(rise=dict(masks=40), lime=dict(samples=40), smoothgrad=dict(samples=3),
                                      occlusion=dict(window=16))  # fmt: skip


REFUSED = {
    ("bcos", "plain"): "no B-cos network",
    ("lrp", "converted"): "lrp has rules",
    ("attention_rollout", "plain"): "vision transformers",
    ("attention_rollout", "converted"): "vision transformers",
    ("chefer", "plain"): "vision transformers",
    ("chefer", "converted"): "vision transformers",
    ("attnlrp", "converted"): "attnlrp has rules",
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
    torch.testing.assert_close(torch.cat(one_by_one), maps, rtol=1e-3, atol=1e-4 * maps.abs().max().item())
    if method != "gradcam":  # a few large cells, which may all be of one sign
        assert maps.max() > 0 and (maps.min() >= 0 if method == "rise" else maps.min() < 0)
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


def test_grad_cam_refuses_layers_without_maps(plain: nn.Module) -> None:
    with pytest.raises(MethodError, match=r"layer 'fc' returns \(1, 4\)"):
        attribute(plain, real_image(64), 1, "gradcam", layer="fc")
    plain.register_module("idle", nn.Identity())
    with pytest.raises(MethodError, match="layer 'idle' returns no tensor for this input"):
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


@pytest.mark.parametrize("method", ["gradient", "ixg", "ig", "occlusion", "rise"])
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


@pytest.mark.parametrize("method", ["gradient", "ixg", "ig", "deeplift", "smoothgrad", "guided_backprop", "occlusion"])
def test_signs_say_what_speaks_for_a_class_and_what_against_it(method: str) -> None:
    maps = attribute(Difference().eval(), 0.5 + 0.1 * real_image(32), [0], method)[0]
    windows = 4 if method == "occlusion" else 0  # which reach over the border of a quarter
    assert (maps[: 16 - windows, : 16 - windows] > 0).all()
    assert (maps[16 + windows :, 16 + windows :] < 0).all()
    torch.testing.assert_close(attribute(Difference().eval(), 0.5 + 0.1 * real_image(32), [1], method)[0], -maps)


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
        model(normalised(x, model.pretrained_cfg))
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
    with pytest.raises(MethodError, match=r"gradcam needs maps \(N, C, H, W\)"):
        attribute(model, real_image(model.pretrained_cfg["input_size"][-1]), 0, "gradcam")


@pytest.mark.parametrize("method", ["rise", "lime", "smoothgrad"])
def test_seeds(plain: nn.Module, method: str) -> None:
    x, state, numpy_state = real_image(64), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    maps = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)  # which does not matter
        maps.append(attribute(plain, x, 0, method, seed=seed, **FEW[method]))
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    torch.random.set_rng_state(state)
    attribute(plain, x, 0, method, **FEW[method])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_smooth_grad_literally(plain: nn.Module) -> None:
    x, generator = real_image(64), torch.Generator().manual_seed(3)
    noise = [0.2 * torch.randn(3, 64, 64, generator=generator) for _ in range(2)]
    gradients = []
    for one in noise:
        noisy = (x + one).requires_grad_()
        plain(normalised(noisy, plain.pretrained_cfg))[0, 1].backward(inputs=[noisy])
        gradients.append(noisy.grad.sum(1))
    found = attribute(plain, x, 1, "smoothgrad", samples=2, stdev=0.2, seed=3)
    torch.testing.assert_close(found, sum(gradients) / 2)


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
    with pytest.raises(InputError, match="finite"):
        attribute(plain, x * torch.nan, 0, "ixg")
    with pytest.raises(InputError, match="got list"):
        attribute(plain, [x], 0, "ixg")
    with pytest.raises(InputError, match=r"\(0, 3, 64, 64\)"):
        attribute(plain, x[:0], 0, "ixg")
    with pytest.raises(InputError, match="meta"):
        attribute(copy.deepcopy(plain).to("meta"), x, 0, "ixg")
    with pytest.raises(InputError, match="no_grad"), torch.inference_mode():
        attribute(plain, x, 0, "ixg")
    with pytest.raises(MethodError, match="ReLU"):
        attribute(timm.create_model("test_vit").eval(), real_image(160), 0, "guided_backprop")


@pytest.mark.parametrize(
    "targets", [True, [True], torch.tensor([True]), 1.0, [1.0], torch.tensor([1.5]), "cat", ["cat"], [[1]], -1, [], 1j]
)
def test_targets_that_are_no_classes(plain: nn.Module, targets: Any) -> None:
    with pytest.raises(TargetError, match="give 1 classes, whole numbers from 0 to 3"):
        attribute(plain, real_image(64), targets, "ixg")


OPTIONS = [
    ("ixg", dict(batch_size=0), "batch_size=0: give a whole number from 1"),
    ("ixg", dict(batch_size=True), "batch_size=True: give a whole"),
    ("ixg", dict(n_steps=3), "ixg has no option 'n_steps': it has none"),
    ("ig", dict(steps=3), "ig has no option 'steps': it has n_steps"),
    ("ig", dict(n_steps=0), "n_steps=0: give"),
    ("smoothgrad", dict(samples=0), "samples=0: give"),
    ("smoothgrad", dict(stdev=float("nan")), "stdev=nan: give"),
    ("occlusion", dict(window=0), "window=0: give"),
    ("occlusion", dict(stride=0), "stride=0: give"),
    ("occlusion", dict(window=65), "window=65: the images are only 64 × 64"),
    ("lime", dict(samples=0), "samples=0: give"),
    ("lime", dict(features=0), "features=0: give"),
    ("lime", dict(kernel_size=0.5), "kernel_size=0.5: give"),
    ("rise", dict(masks=0), "masks=0: give"),
    ("rise", dict(masks=2.5), "masks=2.5: give"),
    ("rise", dict(cells=0), "cells=0: give"),
    ("rise", dict(p=0.0), "p=0.0: give"),
    ("gradcam", dict(layer=""), "no layer ''"),
]


@pytest.mark.parametrize(("method", "options", "text"), OPTIONS, ids=[f"{m}-{o}" for m, o, _ in OPTIONS])
def test_options_out_of_range(plain: nn.Module, method: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        attribute(plain, real_image(64), 0, method, **options)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("method", ["bcos", "gradient", "ig", "deeplift", "smoothgrad", "gradcam", "occlusion", "lime",
                                    "rise"])  # fmt: skip
def test_networks_of_other_channels(channels: int, method: str) -> None:
    x = torch.cat([real_image(64), real_image(64)], 1)[:, :channels]
    model = enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4, in_chans=channels), x)
    maps = attribute(model, x, 1, method, **FEW.get(method, {}))
    assert maps.shape == (1, 64, 64) and maps.any()
    with pytest.raises(InputError, match=f"images have 3 channels, .* takes {channels}"):
        attribute(model, real_image(64), 1, method)


def test_plain_networks_of_other_channels_say_how_their_images_are_normalised() -> None:
    model, x = timm.create_model("test_resnet", num_classes=4, in_chans=1).eval(), real_image(64)[:, :1]
    z = (x - 0.5) / 0.5  # the cfg's three means are equal
    torch.testing.assert_close(attribute(model, x, 1, "ixg"), attribute_of_input(model, z, 1))
    model.pretrained_cfg["mean"] = (0.4, 0.5, 0.6)
    with pytest.raises(ModelStateError, match=r"how images of 1 channels are normalised \(mean \(0.4, 0.5, 0.6\)"):
        attribute(model, x, 1, "ixg")


def attribute_of_input(model: nn.Module, z: Tensor, target: int) -> Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(z)[0, target], z)
    return (gradient * z).sum(1).detach()


def test_networks_of_ones_own() -> None:
    """Without num_classes, pretrained_cfg or in_chans, with several outputs, in another precision than the image."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.fc(self.act(self.conv(x)).mean((2, 3))), "auxiliary"

    model, x = Net().eval(), real_image(16)
    with pytest.raises(ModelStateError, match=r"Net does not say .*set model.pretrained_cfg = dict\(mean=..., std="):
        attribute(model, x, 1, "ixg")
    model.pretrained_cfg = dict(mean=(0.0,), std=(1.0,))  # type: ignore[assignment]
    for method in ("ixg", "deeplift", "gradcam", "lrp", "occlusion", "rise"):
        assert attribute(model, x.double(), None, method, **FEW.get(method, {})).any()
    with pytest.raises(TargetError, match="from 0 to 4"):
        attribute(model, x, 5, "ixg")
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    converted = timm_bcos.bcosify(nn.Sequential(*layers), timm_bcos.BcosConfig(stem="encoded")).eval()
    assert attribute(converted, x, 4).shape == (1, 16, 16)
    with pytest.raises(TargetError, match="from 0 to 4"):
        attribute(converted, x, 5)
    with pytest.raises(ModelStateError, match=r"returns \(1, 8, 14, 14\): attribution needs logits"):
        Subject(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())(x)


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


class State:
    """What other users of a model could see."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.flags = [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]
        self.modules = [
            (id(m), m.training, *(len(value) for name, value in vars(m).items() if name.endswith("_hooks")),
             getattr(m, "fused_attn", None), sorted(vars(m)))
            for m in model.modules()
        ]  # fmt: skip
        self.random = torch.random.get_rng_state()

    def __eq__(self, other: Any) -> bool:
        return (
            all(torch.equal(value, other.values[name]) for name, value in self.values.items())
            and (self.flags, self.modules) == (other.flags, other.modules)
            and torch.equal(self.random, other.random)
        )


@pytest.mark.parametrize("kind", ["plain", "converted"])
def test_threads_do_not_see_each_other(kind: str, request: pytest.FixtureRequest) -> None:
    """Methods in four threads, and gradients for the weights in another, on one model: bitwise as one by one."""
    model, x = request.getfixturevalue(kind), real_image(64, 2)
    names = [name for name in METHODS if (name, kind) not in REFUSED]
    expected = {name: attribute(model, x, [1, 2], name, **FEW.get(name, {})) for name in names}
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    before, done = State(model), threading.Event()

    def learn() -> int:
        steps = 0
        while not done.is_set():
            found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
            assert State(model) == before
            steps += 1
        return steps

    def run(name: str) -> bool:
        return torch.equal(attribute(model, x, [1, 2], name, **FEW.get(name, {})), expected[name])

    with ThreadPoolExecutor(5) as pool:
        learning = pool.submit(learn)
        try:
            assert all(pool.map(run, names))
        finally:
            done.set()
        assert learning.result() > 1
    assert State(model) == before


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupting() -> Iterator[str]:
    def method(subject: Subject, x: Tensor, targets: Tensor) -> Tensor:
        def stop(*_: Any) -> None:
            raise Interrupted

        for parameter in subject.model.parameters():
            parameter.requires_grad_(True)
        subject.model.fc.register_forward_hook(stop)  # type: ignore[union-attr]
        subject.model.fc.train()  # type: ignore[union-attr]
        return subject(subject.prepare(x))

    register("interrupting")(method)
    yield "interrupting"
    METHODS.pop("interrupting")


def test_an_interruption_leaves_no_trace(plain: nn.Module, interrupting: str) -> None:
    before = State(plain)
    with pytest.raises(Interrupted):
        attribute(plain, real_image(64), 0, interrupting)
    assert State(plain) == before
    for method in ("deeplift", "guided_backprop", "lrp", "gradcam"):
        calls: list[int] = []
        handle = plain.fc.register_forward_hook(lambda *_, calls=calls: calls.append(1) or _stop_at(calls, 1))
        with pytest.raises(Interrupted):
            attribute(plain, real_image(64), 0, method)
        handle.remove()
        assert State(plain) == before


def _stop_at(calls: list[int], count: int) -> None:
    if len(calls) == count:
        raise Interrupted


def test_a_missing_library_names_the_extra(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.delitem(sys.modules, "timm_bcos.attribution.superpixels", raising=False)
    methods._library.cache_clear()
    for method, library in (("ig", "captum"), ("lime", "skimage")):
        with pytest.raises(MethodError, match=rf"{library}.* is not installed: .*timm_bcos\[attribution\]"):
            attribute(plain, real_image(64), 0, method)
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
