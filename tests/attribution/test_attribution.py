"""Attribution methods: what all of them keep to."""

import copy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos import InputError, MethodError, ModelStateError, TargetError
from timm_bcos.attribution import methods
from timm_bcos.attribution.registry import METHODS, AttributionModel, attribute, method_names, register

pytest.importorskip("captum")
FEW: dict[str, dict[str, Any]] = dict(rise=dict(masks=40), lime=dict(samples=40), smoothgrad=dict(samples=3),
                                      occlusion=dict(window=16))  # fmt: skip


REFUSED = {
    ("bcos", "plain"): "not a B-cos model",
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


def test_new_methods_register_in_one_line(plain: nn.Module) -> None:
    try:
        register("uniform")(lambda subject, x, targets: torch.ones_like(x[:, 0]))
        assert attribute(plain, real_image(64), 0, "uniform").sum() == 64 * 64
    finally:
        METHODS.pop("uniform")


def test_aliases(plain: nn.Module) -> None:
    x = real_image(64)
    for alias, name in (("ixg", "input_x_gradient"), ("ig", "integrated_gradients")):
        assert torch.equal(attribute(plain, x, 1, alias), attribute(plain, x, 1, name))
    assert method_names(["ig", "bcos", "integrated_gradients"]) == ["integrated_gradients", "bcos"]
    assert alias not in METHODS
    with pytest.raises(MethodError, match=r"'gradients': .*input_x_gradient \(ixg\), integrated_gradients \(ig\)"):
        attribute(plain, x, 1, "gradients")
    with pytest.raises(MethodError, match="there is a method 'ig'"):
        register("ig")(lambda subject, x, targets: x[:, 0])


def test_probabilities_follow_the_config(plain: nn.Module, converted: nn.Module) -> None:
    x = real_image(64)
    assert AttributionModel(plain).probability(x).sum().item() == pytest.approx(1)
    torch.testing.assert_close(AttributionModel(converted).probability(x), converted(x).sigmoid().detach())


def test_bad_input(plain: nn.Module) -> None:
    x = real_image(64)
    with pytest.raises(MethodError, match="no attribution method 'grad'"):
        attribute(plain, x, 0, "grad")
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        attribute(plain, x * 255, 0, "input_x_gradient")
    with pytest.raises(InputError, match=r"\(N, C, H, W\)"):
        attribute(plain, x[0], 0, "input_x_gradient")
    with pytest.raises(TargetError, match="0 to 3"):
        attribute(plain, x, [4], "input_x_gradient")
    with pytest.raises(TargetError, match="give 1 classes"):
        attribute(plain, x, [1, 2], "input_x_gradient")
    with pytest.raises(ModelStateError, match="training mode"):
        attribute(timm.create_model("test_resnet"), x, 0, "input_x_gradient")
    with pytest.raises(InputError, match="finite"):
        attribute(plain, x * torch.nan, 0, "input_x_gradient")
    with pytest.raises(InputError, match="got list"):
        attribute(plain, [x], 0, "input_x_gradient")
    with pytest.raises(InputError, match=r"\(0, 3, 64, 64\)"):
        attribute(plain, x[:0], 0, "input_x_gradient")
    with pytest.raises(InputError, match="meta"):
        attribute(copy.deepcopy(plain).to("meta"), x, 0, "input_x_gradient")
    with pytest.raises(MethodError, match="ReLU"):
        attribute(timm.create_model("test_vit").eval(), real_image(160), 0, "guided_backprop")


@pytest.mark.parametrize(
    "targets", [True, [True], torch.tensor([True]), 1.0, [1.0], torch.tensor([1.5]), "cat", ["cat"], [[1]], -1, [], 1j]
)
def test_targets_that_are_no_classes(plain: nn.Module, targets: Any) -> None:
    with pytest.raises(TargetError, match="give 1 classes, whole numbers from 0 to 3"):
        attribute(plain, real_image(64), targets, "input_x_gradient")


OPTIONS = [
    ("input_x_gradient", dict(batch_size=0), "batch_size=0: give a whole number from 1"),
    ("input_x_gradient", dict(batch_size=True), "batch_size=True: give a whole"),
    ("input_x_gradient", dict(n_steps=3), "input_x_gradient has no option 'n_steps': it has none"),
    ("integrated_gradients", dict(steps=3), "integrated_gradients has no option 'steps': it has n_steps"),
    ("integrated_gradients", dict(n_steps=0), "n_steps=0: give"),
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


def test_plain_networks_of_other_channels_say_how_their_images_are_normalized() -> None:
    model, x = timm.create_model("test_resnet", num_classes=4, in_chans=1).eval(), real_image(64)[:, :1]
    z = (x - 0.5) / 0.5  # the cfg's three means are equal
    torch.testing.assert_close(attribute(model, x, 1, "input_x_gradient"), attribute_of_input(model, z, 1))
    model.pretrained_cfg["mean"] = (0.4, 0.5, 0.6)
    with pytest.raises(ModelStateError, match=r"no normalization for images of 1 channels \(mean \(0.4, 0.5, 0.6\)"):
        attribute(model, x, 1, "input_x_gradient")


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
    with pytest.raises(
        ModelStateError, match=r"Net has no normalization .*set model.pretrained_cfg = dict\(mean=..., std="
    ):
        attribute(model, x, 1, "input_x_gradient")
    model.pretrained_cfg = dict(mean=(0.0,), std=(1.0,))  # type: ignore[assignment]
    for method in ("input_x_gradient", "deeplift", "gradcam", "lrp", "occlusion", "rise"):
        assert attribute(model, x.double(), None, method, **FEW.get(method, {})).any()
    with pytest.raises(TargetError, match="from 0 to 4"):
        attribute(model, x, 5, "input_x_gradient")
    layers = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    converted = timm_bcos.bcosify(nn.Sequential(*layers), timm_bcos.BcosConfig(stem="encoded")).eval()
    assert attribute(converted, x, 4).shape == (1, 16, 16)
    with pytest.raises(TargetError, match="from 0 to 4"):
        attribute(converted, x, 5)
    with pytest.raises(ModelStateError, match=r"returns \(1, 8, 14, 14\): attribution needs logits"):
        AttributionModel(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())(x)


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
    def method(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
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
    monkeypatch.delitem(sys.modules, "timm_bcos.attribution.lime", raising=False)
    methods._library.cache_clear()
    for method, library in (("integrated_gradients", "captum"), ("lime", "skimage")):
        with pytest.raises(MethodError, match=rf"{library}.* is not installed: .*timm_bcos\[attribution\]"):
            attribute(plain, real_image(64), 0, method)
    methods._library.cache_clear()
