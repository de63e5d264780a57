"""Backward passes by hand, and what they keep, beside the formulas in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from timm_bcos import BcosConv2d, BcosLinear, UncenteredBatchNorm2d
from timm_bcos.nn import autograd, execution, functional, primitives
from timm_bcos.nn.autograd import divide_by_deviation
from timm_bcos.nn.primitives import unit_weight

Double = torch.float64
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def literal_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (weight / (x.var((0, 2, 3), correction=0) + eps).sqrt()).reshape(1, -1, 1, 1)


def literal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """B = 2, 3×3, padded by 1."""
    linear = nn.functional.conv2d(x, weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), padding=1)
    squares = nn.functional.conv2d(x * x, torch.ones(1, x.shape[1], 3, 3, dtype=x.dtype), padding=1)
    return linear.abs() / (squares + 1e-6).sqrt() * linear


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [Double, torch.float32])
def test_division_by_the_deviation(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """With a mean that is large beside the deviation, which sums of squares would not survive."""
    x = (5 + torch.randn(4, 6, 9, 7, dtype=dtype)).contiguous(memory_format=layout)
    weight = torch.randn(6, dtype=dtype)
    expected = gradients(lambda x, w: literal_norm(x, w, 1e-5), x.double(), weight.double())
    found = gradients(lambda x, w: divide_by_deviation(x, w, 1e-5)[0], x, weight)
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype is Double else dict(rtol=1e-4, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)
    torch.testing.assert_close(divide_by_deviation(x, weight, 1e-5)[1], x.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("large", [1, 1 << 21], ids=["one by one", "whole"])
def test_a_convolution_and_its_norm(layout: torch.memory_format, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "LARGE", large)
    conv, norm = BcosConv2d(4, 5, 3, padding=1, dtype=Double), UncenteredBatchNorm2d(5, dtype=Double)
    x = torch.randn(3, 4, 6, 5, dtype=Double).contiguous(memory_format=layout)
    weight, scale = torch.randn(5, 4, 3, 3, dtype=Double), torch.randn(5, dtype=Double)

    def ours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        y = torch.func.functional_call(conv, dict(weight=weight), x)
        return torch.func.functional_call(norm, dict(weight=scale), y)

    expected = gradients(lambda x, w, s: literal_norm(literal_conv(x, w), s, norm.eps), x, weight, scale)
    for one, other in zip(gradients(ours, x, weight, scale), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_of_depthwise_convolutions() -> None:
    conv = BcosConv2d(2, 2, 3, stride=2, padding=1, groups=2, dtype=Double)
    x = torch.randn(2, 2, 4, 5, dtype=Double, requires_grad=True)
    assert torch.autograd.gradcheck(conv, x)
    assert torch.autograd.gradgradcheck(conv, x)


def test_second_derivatives() -> None:
    conv, norm = BcosConv2d(2, 2, 3, padding=1, dtype=Double), UncenteredBatchNorm2d(2, dtype=Double)
    x = torch.randn(2, 2, 3, 3, dtype=Double, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=Double, requires_grad=True)
    scale = torch.randn(2, dtype=Double, requires_grad=True)

    def both(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        y = torch.func.functional_call(conv, dict(weight=weight), x)
        return torch.func.functional_call(norm, dict(weight=scale), y)

    assert torch.autograd.gradcheck(both, (x, weight, scale))
    assert torch.autograd.gradgradcheck(both, (x, weight, scale))
    assert torch.autograd.gradgradcheck(lambda x, w: divide_by_deviation(x, w, 1e-3)[0], (x, scale))
    assert torch.autograd.gradgradcheck(lambda x, w: divide_by_deviation(x, w, 1e-3)[0], (x, scale.detach()))
    for power in (1.0, 0.5):
        assert torch.autograd.gradgradcheck(lambda w, p=power: unit_weight(w, p), (weight,))


def literal_linear(x: Tensor, weight: Tensor) -> Tensor:
    linear = x @ (weight / weight.norm(dim=1, keepdim=True)).T
    return 1.5 * linear.abs() / (x.norm(dim=-1, keepdim=True) + 1e-12) * linear


@pytest.mark.parametrize("large", [1, 1 << 21], ids=["one by one", "whole"])
def test_a_layer_behind_a_layer(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second keeps the response of the first, which need not keep its linear one; a response of 0 included."""
    monkeypatch.setattr(execution, "LARGE", large)
    linear = nn.Sequential(BcosLinear(5, 6, dtype=Double, gamma=1.5), BcosLinear(6, 4, dtype=Double, gamma=1.5))
    x, weights = torch.randn(3, 7, 5, dtype=Double), [torch.randn(*s, dtype=Double) for s in ((6, 5), (4, 6))]
    x[1, 2] = 0
    expected = gradients(lambda x, v, w: literal_linear(literal_linear(x, v), w), x, *weights)
    for one, other in zip(gradients(_called(linear), x, *weights), expected, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(0))
    convs = nn.Sequential(BcosConv2d(3, 4, 3, padding=1, dtype=Double), BcosConv2d(4, 2, 3, padding=1, dtype=Double))
    x, weights = torch.randn(2, 3, 6, 5, dtype=Double), [torch.randn(*s, 3, 3, dtype=Double) for s in ((4, 3), (2, 4))]
    expected = gradients(lambda x, v, w: literal_conv(literal_conv(x, v), w), x, *weights)
    for one, other in zip(gradients(_called(convs), x, *weights), expected, strict=True):
        torch.testing.assert_close(one, other)


def _called(layers: nn.Sequential) -> Callable[..., Tensor]:
    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layers, {f"{i}.weight": weight for i, weight in enumerate(weights)}, x)

    return call


def test_second_derivatives_of_a_layer_behind_a_layer() -> None:
    for make, size, shape in ((BcosLinear, (), (2, 3)), (partial(BcosConv2d, kernel_size=1), (1, 1), (1, 3, 2, 2))):
        layers = nn.Sequential(make(3, 2, dtype=Double), make(2, 2, dtype=Double))
        inputs = [torch.randn(s, dtype=Double, requires_grad=True) for s in (shape, (2, 3, *size), (2, 2, *size))]
        assert torch.autograd.gradcheck(_called(layers), inputs)
        assert torch.autograd.gradgradcheck(_called(layers), inputs)
    zero = torch.zeros(2, 3, dtype=Double, requires_grad=True)
    layers = nn.Sequential(BcosLinear(3, 2, dtype=Double), BcosLinear(2, 2, dtype=Double))
    (grad,) = torch.autograd.grad(layers(zero).sum(), zero, create_graph=True)
    assert torch.autograd.grad(grad.sum(), zero)[0].isfinite().all()


def test_checkpointing_computes_the_same() -> None:
    block = nn.Sequential(BcosConv2d(3, 4, 3, padding=1), UncenteredBatchNorm2d(4), BcosConv2d(4, 4, 1)).double()
    x = torch.randn(2, 3, 5, 5, dtype=Double)
    plain = gradients(block, x)
    for reentrant in (False, True):
        found = gradients(lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=r), x)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("between", [[UncenteredBatchNorm2d(16)], []], ids=["norm between", "layer behind layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype: torch.dtype, between: list[nn.Module]) -> None:
    block = nn.Sequential(BcosConv2d(8, 16, 3, padding=1), *between, BcosConv2d(16, 8, 1))
    x = torch.randn(4, 8, 9, 9)
    expected = gradients(block, x)
    with torch.autocast("cpu", dtype):
        found = gradients(block, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.03 * other.abs().max().item())


def test_a_linear_layer_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BcosLinear(6, 5, dtype=Double), torch.randn(3, 7, 6, dtype=Double)
    expected = gradients(layer, x)
    monkeypatch.setattr(execution, "LARGE", 1)
    for one, other in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


UNITS = [
    dict(),
    dict(gamma=-0.7),
    dict(b=1.25),
    dict(b=1.5, gamma=3.0),
    dict(b=2.5, max_out=3),
    dict(max_out=2, gamma=0.5),
    dict(normalize_weight=False),
    dict(normalize_weight=False, b=1.75),
]
WINDOWS = [
    dict(padding=1),
    dict(stride=2),
    dict(stride=(2, 1), padding=(0, 2)),
    dict(padding=2, dilation=2),
    dict(groups=2),
    dict(groups=4, padding=1, stride=2),
    dict(kernel_size=1, stride=2),
    dict(kernel_size=(1, 3), padding=(0, 1)),
    dict(pad_same=True, stride=2),
]


@pytest.mark.parametrize("large", [1, 1 << 21], ids=["one by one", "whole"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_layers_have_the_gradients_of_the_formulas(
    unit: dict[str, float], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LARGE", large)
    x = torch.randn(2, 4, 7, 6, dtype=Double)
    for window in WINDOWS:
        conv = BcosConv2d(4, 4, **{"kernel_size": 3, **window}, **unit, dtype=Double)

        def formula(x: Tensor, weight: Tensor, conv: BcosConv2d = conv) -> Tensor:
            numbers = [list(value) for value in (conv.stride, conv._zero_padding, conv.dilation)]
            return functional.bcos_conv2d(conv.pad(x), weight, *numbers, conv.groups, **unit)

        for layout in LAYOUTS:
            image = x.contiguous(memory_format=layout)
            found = gradients(
                lambda x, w, conv=conv: torch.func.functional_call(conv, dict(weight=w), x), image, conv.weight
            )
            for one, other in zip(found, gradients(formula, x, conv.weight), strict=True):
                torch.testing.assert_close(one, other)
    linear, tokens = BcosLinear(5, 3, **unit, dtype=Double), torch.randn(2, 3, 5, dtype=Double)
    found = gradients(lambda x, w: torch.func.functional_call(linear, dict(weight=w), x), tokens, linear.weight)
    expected = gradients(lambda x, w: functional.bcos_linear(x, w, **unit), tokens, linear.weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def kept_by(function: Callable[[], Tensor]) -> list[Tensor]:
    """What its graph keeps; storages once. Hooks are not asked: for them, layers keep something else."""
    kept: dict[int, Tensor] = {}
    nodes = [function().grad_fn]
    assert nodes[0] is not None
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        response = getattr(node, "response", None)
        saved = [*getattr(node, "saved_tensors", ()), *([] if response is None else [response.alias])]
        saved += [v for n in dir(node) if n.startswith("_saved_") and isinstance(v := getattr(node, n), Tensor)]
        kept |= {x.untyped_storage().data_ptr(): x for x in saved}
        nodes += [following for following, _ in node.next_functions]
    return list(kept.values())


@pytest.mark.parametrize(
    ("unit", "kept"), [(dict(), []), (dict(max_out=2), [2 * 5 * 7 * 6]), (dict(b=1.5), [2 * 5 * 7 * 6])], ids=str
)
def test_what_a_convolution_and_its_norm_keep(unit: dict[str, float], kept: list[int]) -> None:
    """Input, weights, the response, the norms of patches: two maps, as plain layers do; no unit weights.

    With MaxOut also who won, in a byte each; at other B the linear response.
    """
    conv, norm = BcosConv2d(4, 5, 3, padding=1, **unit), UncenteredBatchNorm2d(5)
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    maps = [x.numel(), 2 * 5 * 7 * 6, 2 * 7 * 6, *kept]
    found = [t.numel() for t in kept_by(lambda: norm(conv(x)))]
    assert sorted(found) == sorted([*maps, conv.weight.numel(), *[5] * 3])
    for model in (conv, BcosLinear(6, 7, **unit)):
        saved = kept_by(lambda model=model: model(x))
        assert [t.numel() for t in saved].count(model.weight.numel()) == 1


def test_weights_that_change_before_the_backward_pass() -> None:
    """As with torch's own layers, whose graphs keep the weight itself, that is an error."""
    layer = BcosConv2d(3, 4, 1)
    y = layer(torch.randn(1, 3, 4, 4))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


WAYS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "torch.autograd.grad": lambda y, loss: lambda: torch.autograd.grad(loss, y)[0],
    "a late retain_grad": lambda y, loss: lambda: (y.retain_grad(), loss.backward(), y.grad)[2],
    "a late hook": lambda y, loss: lambda: (seen := [], y.register_hook(seen.append), loss.backward())[0][0],
    "inputs of backward": lambda y, loss: lambda: (y.retain_grad(), loss.backward(inputs=[y]), y.grad)[2],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_a_response_between_layers(way: str, training: bool) -> None:
    """Whoever asks, and when: as of any tensor of torch's."""
    first, norm, second = BcosConv2d(3, 4, 1), UncenteredBatchNorm2d(4), BcosConv2d(4, 2, 3, padding=1)
    network, x = nn.Sequential(first, norm, second).double().train(training), torch.randn(2, 3, 5, 5, dtype=Double)
    for behind in (nn.Sequential(norm, second), second):
        y = network[0](x)
        leaf = y.detach().requires_grad_()
        z = leaf
        if behind is not second:
            variance = leaf.var((0, 2, 3), correction=0) if training else norm.running_var
            z = leaf * (norm.weight / (variance + norm.eps).sqrt()).reshape(1, -1, 1, 1)
        (expected,) = torch.autograd.grad(literal_conv(z, second.weight).square().sum(), leaf)
        torch.testing.assert_close(WAYS[way](y, behind(y).square().sum())(), expected)


def test_backward_hooks_of_modules() -> None:
    conv, norm, seen = BcosConv2d(3, 4, 1, dtype=Double), UncenteredBatchNorm2d(4, dtype=Double), []
    x = torch.randn(2, 3, 5, 5, dtype=Double)
    leaf = conv(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(literal_norm(leaf, norm.weight, norm.eps).square().sum(), leaf)
    conv.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    norm(conv(x)).square().sum().backward()
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_frozen_weights_and_inputs(frozen: str) -> None:
    for layer, x in ((BcosConv2d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5)), (BcosLinear(3, 4), torch.randn(2, 3))):
        layer, x = layer.double(), x.double().requires_grad_(frozen == "weight")
        formula = literal_conv if x.ndim == 4 else lambda x, w: literal_linear(x, w) / 1.5
        layer.weight.requires_grad_(frozen == "input")
        wanted = x if frozen == "weight" else layer.weight
        (found,) = torch.autograd.grad(layer(x).square().sum(), wanted)
        torch.testing.assert_close(found, torch.autograd.grad(formula(x, layer.weight).square().sum(), wanted)[0])


def test_statistics_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = 100 + torch.randn(5, 3, 6, 7)
    expected = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    for large in (1, 1 << 21):
        monkeypatch.setattr(execution, "LARGE", large)
        for statistics in (autograd._mean_and_variance, primitives.mean_and_variance):
            for one, other in zip(statistics(x), expected, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "added to": lambda y: y.add_(1),
    "rectified": lambda y: y.relu_(),
    "scaled": lambda y: y.mul_(3),
}


@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_responses_may_be_changed_in_place(change: str, max_out: int) -> None:
    """As behind torch's convolution, which keeps no output: `x += shortcut`, `nn.ReLU(inplace=True)`."""
    conv, linear = (
        BcosConv2d(3, 4, 3, padding=1, max_out=max_out, dtype=torch.float64),
        BcosLinear(4, 5, max_out=max_out, dtype=torch.float64),
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(apart: bool) -> list[Tensor]:
        y = conv(x)
        y = CHANGES[change](y * 1 if apart else y).mean((2, 3))
        y = linear(y)
        y = CHANGES[change](y * 1 if apart else y)
        return list(torch.autograd.grad(y.square().sum(), [x, conv.weight, linear.weight]))

    for found, expected in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(found, expected)
