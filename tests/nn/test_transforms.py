"""torch.func, forward mode, batched gradients, tracers, programs: layers as torch's own, beside the formulas."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.onnx import onnx_export
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from tests.helpers import enliven, real_image
from tests.helpers.slow import slow_but_for
from timm_bcos import BcosConv2d, BcosLinear, UncenteredBatchNorm2d
from timm_bcos.nn import autograd
from timm_bcos.nn.primitives import max_out

Double = torch.float64
KINDS: dict[str, dict[str, Any]] = {
    "B = 2": dict(),
    "B = 1.5": dict(b=1.5, gamma=2.0),
    "B = 1": dict(b=1),
    "MaxOut": dict(max_out=2),
    "free rows": dict(normalize_weight=False),
    "free rows, B = 1.75": dict(normalize_weight=False, b=1.75),
}


def response(linear: Tensor, norm: Tensor, weight: Tensor, b: float, gamma: float, max_out: int, free: bool) -> Tensor:
    """Of units on axis 1, in torch's elementary functions."""
    linear = linear.unflatten(1, (-1, max_out)).amax(2)
    factor = 1 if b == 1 else linear.abs() / norm if b == 2 else (linear.abs() / norm + 1e-6) ** (b - 1)
    amplitude = weight.flatten(1).norm(dim=1).reshape([-1] + [1] * (linear.ndim - 2)) if free else 1
    return gamma * factor * linear * amplitude


def literal(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """A layer's response to images of one group, padded by 1, or to vectors."""
    rows = weight / weight.flatten(1).norm(dim=1).reshape([-1] + [1] * (weight.ndim - 1))
    unit = layer.b, layer.gamma, layer.max_out, not layer.normalize_weight
    if isinstance(layer, BcosLinear):
        return response(x @ rows.T, x.norm(dim=-1, keepdim=True) + 1e-12, weight, *unit)
    squares = F.conv2d(x * x, torch.ones_like(weight[:1]), padding=1)
    return response(F.conv2d(x, rows, padding=1), (squares + 1e-6).sqrt(), weight, *unit)


def layers(kind: str) -> list[tuple[nn.Module, Tensor]]:
    conv, linear = (
        BcosConv2d(3, 4, 3, padding=1, dtype=Double, **KINDS[kind]),
        BcosLinear(5, 4, dtype=Double, **KINDS[kind]),
    )
    return [(conv, torch.randn(2, 3, 4, 4, dtype=Double)), (linear, torch.randn(3, 5, dtype=Double))]


def called(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: functional_call(layer, dict(weight=weight), x)


def transformed(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, weights: Tensor, tangents: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """What torch.func makes of a function of images or vectors, and weights."""
    return [
        *grad(lambda *inputs: f(*inputs).square().sum(), argnums=(0, 1))(x, weight),
        *jvp(f, (x, weight), tangents),
        jacrev(f)(x, weight),
        jacfwd(f, argnums=1)(x, weight),
        hessian(lambda v: f(v, weight).square().sum())(x),
        vmap(f, (0, None))(x[:, None], weight),
        vmap(f, (None, 0))(x, weights),
        vmap(grad(lambda w, v: f(v[None], w).square().sum()), (None, 0))(weight, x),
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_layers(kind: str, training: bool) -> None:
    for layer, x in layers(kind):
        ours, weight = called(layer.train(training)), layer.weight.detach()
        formula = lambda x, w, layer=layer: literal(layer, x, w)  # noqa: E731
        tangents = torch.randn_like(x), torch.randn_like(weight)
        weights = torch.stack([weight, torch.randn_like(weight)])
        pairs = [transformed(f, x, weight, weights, tangents) for f in (ours, formula)]
        for found, expected in zip(*pairs, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients_and_dual_numbers(kind: str) -> None:
    for layer, x in layers(kind):
        leaf = x.clone().requires_grad_()
        y, expected = layer(leaf), literal(layer, leaf, layer.weight)
        directions = torch.randn(3, *y.shape, dtype=Double)
        for inputs in (leaf, layer.weight):
            found = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
            one_by_one = [torch.autograd.grad(expected, inputs, d, retain_graph=True)[0] for d in directions]
            torch.testing.assert_close(found[0], torch.stack(one_by_one))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            found = [forward_ad.unpack_dual(f).tangent for f in (layer(dual), literal(layer, dual, layer.weight))]
        torch.testing.assert_close(*found)


MODES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "eager": lambda layer: layer,
    "compiled": lambda layer: torch.compile(layer, backend="aot_eager"),
    "scripted": torch.jit.script,
    "torch.fx": torch.fx.symbolic_trace,
}
DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], nn.Module, Tensor], Tensor]] = {
    "backward": lambda f, layer, x: torch.autograd.grad(f(x).square().sum(), layer.weight)[0],
    "double backward": lambda f, layer, x: torch.autograd.grad(
        torch.autograd.grad(f(x).sum(), layer.weight, create_graph=True)[0].square().sum(), layer.weight
    )[0],
}
FUNCTIONAL: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, weight: grad(f)(weight),
    "vmap of grad": lambda f, weight: vmap(grad(f))(weight[None])[0],
    "jacrev": lambda f, weight: jacrev(f)(weight),
    "jacfwd": lambda f, weight: jacfwd(f)(weight),
}


def tied_layers(b: float) -> list[tuple[nn.Module, Tensor]]:
    """Layers whose three units per output are equal, as after a conversion."""
    unit: dict[str, Any] = dict(b=b, max_out=3, dtype=Double)
    pairs = [
        (BcosConv2d(3, 4, 3, padding=1, **unit), torch.randn(2, 3, 4, 4, dtype=Double)),
        (BcosLinear(5, 4, **unit), torch.randn(3, 5, dtype=Double)),
    ]
    for layer, _ in pairs:
        layer.weight.data = layer.weight.data[::3].repeat_interleave(3, 0)
    return pairs


def gradient_of_first_units(layer: nn.Module, x: Tensor, order: int) -> Tensor:
    """The gradient of a layer without MaxOut, whose rows the first units are; 0 for the others."""
    plain = BcosLinear(5, 4, b=layer.b) if isinstance(layer, BcosLinear) else BcosConv2d(3, 4, 3, padding=1, b=layer.b)
    plain.weight = nn.Parameter(layer.weight.detach()[::3])
    derivative = DERIVATIVES["backward" if order == 1 else "double backward"](plain, plain, x)
    expected = torch.zeros_like(layer.weight)
    expected[::3] = derivative
    return expected


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning"
)
@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_equal_units_of_max_out_give_the_gradient_to_the_first(mode: str, b: float) -> None:
    for layer, x in tied_layers(b):
        torch._dynamo.reset()
        first = DERIVATIVES["backward"](MODES[mode](layer), layer, x)
        torch.testing.assert_close(first, gradient_of_first_units(layer, x, 1))
        if mode != "compiled":  # which has no second derivatives
            second = DERIVATIVES["double backward"](MODES[mode](layer), layer, x)
            torch.testing.assert_close(second, gradient_of_first_units(layer, x, 2))


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("transform", FUNCTIONAL)
def test_equal_units_of_max_out_under_torch_func(transform: str, b: float) -> None:
    for layer, x in tied_layers(b):
        loss = lambda w, layer=layer, x=x: called(layer)(x, w).square().sum()  # noqa: E731
        found = FUNCTIONAL[transform](loss, layer.weight.detach())
        torch.testing.assert_close(found, gradient_of_first_units(layer, x, 1))


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_max_out_passes_nan_on(wants_gradients: bool) -> None:
    nan = float("nan")
    x = torch.tensor([[nan, 1.0, 1.0, nan, 2.0, 1.0, 1.0, 3.0]]).requires_grad_(wants_gradients)
    torch.testing.assert_close(max_out(x, 2, -1), torch.tensor([[nan, nan, 2.0, 3.0]]), equal_nan=True)


def literal_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (weight / (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()).reshape(1, -1, 1, 1)


def test_transforms_of_the_uncentered_norm() -> None:
    """Whose running statistics cannot follow inside a transform, as with torch's."""
    norm, x = UncenteredBatchNorm2d(3, dtype=Double), torch.randn(2, 3, 4, 4, dtype=Double)
    weight = torch.randn(3, dtype=Double)
    leaf = x.clone().requires_grad_()
    y, expected = called(norm)(leaf, weight), literal_norm(leaf, weight)
    directions = torch.randn(3, *y.shape, dtype=Double)
    (found,) = torch.autograd.grad(y, leaf, directions, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(expected, leaf, d, retain_graph=True)[0] for d in directions]
    torch.testing.assert_close(found, torch.stack(one_by_one))
    norm.reset_running_stats()
    norm.eval()
    scaled = lambda x, w: x * literal_scale(w)  # noqa: E731
    scale = weight / (1 + norm.eps) ** 0.5
    torch.testing.assert_close(*[jacrev(f, 1)(x, weight) for f in (called(norm), scaled)])
    torch.testing.assert_close(vmap(norm)(x[:, None]).squeeze(1), x * literal_scale(norm.weight.detach()))
    torch.testing.assert_close(jvp(lambda v: called(norm)(v, weight), (x,), (x,))[1], x * scale.reshape(-1, 1, 1))


def literal_scale(weight: Tensor) -> Tensor:
    return (weight / (1 + 1e-5) ** 0.5).reshape(1, -1, 1, 1)


def test_gradients_of_samples_of_a_network() -> None:
    """As `torch.func` is used: functional_call, a gradient for each sample."""
    model = timm.create_model("bcos_cnn9", num_classes=4).double().eval()
    x = real_image(16, 3, dtype=Double)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, image[None]).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


# Programs.

DYNAMIC = ["test_efficientnet", "mobilenetv3_small_050"]


@pytest.mark.parametrize("arch", slow_but_for(["test_efficientnet"], DYNAMIC))
def test_export_with_any_height_and_width(arch: str) -> None:
    model = enliven(timm.create_model("bcosify", arch=arch, b=2, num_classes=5), real_image(64, 2)).eval()
    size = {
        2: Dim("height", min=33, max=512),
        3: Dim("width", min=33, max=512),
    }  # 32 is one pixel, which is its own case
    program = torch.export.export(model, (real_image(64, 2),), dynamic_shapes=({0: Dim("batch"), **size},))
    for height, width in ((96, 64), (75, 128)):
        x = real_image(128, 3)[:, :, :height, :width]
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


UNITS: tuple[dict[str, Any], ...] = (dict(), dict(max_out=2), dict(b=1.5, normalize_weight=False))
EQUAL = [pytest.param((unit,) * 3, marks=pytest.mark.slow) for unit in UNITS]


@pytest.mark.parametrize("units", [UNITS, *EQUAL], ids=str)
def test_training_a_compiled_network_of_any_size(units: tuple[dict[str, Any], ...]) -> None:
    convs = BcosConv2d(4, 6, 1, **units[1]), BcosConv2d(6, 6, 3, stride=2, padding=1, groups=6, **units[2])
    linear = BcosLinear(6, 3, **units[0])
    network = nn.Sequential(convs[0], UncenteredBatchNorm2d(6), convs[1], Tokens(), linear).double()
    torch._dynamo.reset()
    compiled = torch.compile(network, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((2, 4, 8, 8), (3, 4, 12, 10)):
        x, found = torch.randn(size, dtype=Double), []
        for model in (compiled, network):
            network.zero_grad()
            model(x).square().sum().backward()
            found.append([p.grad for p in network.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


# Evaluation without gradients is made of torch's own functions.


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("bcos_cnn9", {}), ("bcosify", dict(arch="test_resnet")), ("bcosify", dict(arch="test_efficientnet", b=1.5))],
)
def test_no_autograd_function_runs_in_evaluation(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = timm.create_model(name, num_classes=5, **kwargs).eval(), real_image(64, 2)
    expected = model(x)
    for function in (autograd._BcosResponse, autograd._DivideByDeviation):
        monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.requires_grad_(False)(x), expected)


TRACED = [
    ("bcos_cnn9", {}, 32),
    ("bcos_resnet18", dict(layers=(1, 1, 1, 1)), 64),
    ("bcosify", dict(arch="test_resnet", b=1.5), 64),
    ("bcosify", dict(arch="test_efficientnet"), 64),  # depthwise
    ("bcosify", dict(arch="regnetx_002"), 64),  # groups
    ("bcosify", dict(arch="test_vit"), 160),
    (
        "bcosify",
        dict(arch="test_efficientnet", pad_type="same", antialias=True, b=1.5),
        64,
    ),  # low-pass filters and 'SAME' padding
]


@pytest.mark.parametrize(("name", "kwargs", "size"), TRACED, ids=[kw.get("arch", name) for name, kw, _ in TRACED])
def test_tracing_and_timms_onnx_export_by_default(name: str, kwargs: dict[str, Any], size: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, x = (
        enliven(timm.create_model(name, num_classes=5, **kwargs), real_image(size, 2)).eval(),
        real_image(size, 3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x[:2])
        onnx_export(model, str(tmp_path / "x.onnx"), x[:2])
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "kwargs"), [("bcos_cnn9", {}), ("bcosify", dict(arch="test_efficientnet"))])
def test_a_graph_of_torch_fx_is_the_network(name: str, kwargs: dict[str, Any], training: bool) -> None:
    """Gradients too."""
    model = timm.create_model(name, num_classes=5, **kwargs).double().train(training)
    traced = torch.fx.symbolic_trace(model)
    found = []
    for network in (model, traced):
        x = real_image(64, 2, dtype=Double).requires_grad_()
        y = network(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
