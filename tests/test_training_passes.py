"""What training computes in fewer passes, or again instead of keeping it, beside the formulas in float64."""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from timm_bcos import BcosConv2d, BcosLinear, UncentredBatchNorm2d
from timm_bcos.nn import cosine, input_norms, memory, weights
from timm_bcos.nn.cosine import origin, scale_by_cosine
from timm_bcos.nn.deviation import divide_by_deviation
from timm_bcos.nn.weights import unit_weight

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
    monkeypatch.setattr(memory, "LARGE", large)
    conv, norm = BcosConv2d(4, 5, 3, padding=1, dtype=Double), UncentredBatchNorm2d(5, dtype=Double)
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
    conv, norm = BcosConv2d(2, 2, 3, padding=1, dtype=Double), UncentredBatchNorm2d(2, dtype=Double)
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


def test_a_response_is_not_kept_for_the_norm_behind_it() -> None:
    conv, norm = BcosConv2d(3, 4, 1), UncentredBatchNorm2d(4)
    y = conv(torch.randn(2, 3, 5, 5))
    z = norm(y)
    seen = weakref.ref(y)
    del y
    assert seen() is None
    z.sum().backward()


def test_a_changed_response_is_kept() -> None:
    linear = torch.randn(2, 3, 4, 4, dtype=Double, requires_grad=True)
    norm = torch.rand(2, 1, 4, 4, dtype=Double) + 1
    assert origin(scale_by_cosine(linear, norm, 2, 1.0)) is None
    y = scale_by_cosine(linear, norm, 2, 1.0, training=True)
    assert origin(y) is not None and origin(y.detach()) is None
    y.mul_(2)
    assert origin(y) is None
    (grad,) = torch.autograd.grad(divide_by_deviation(y, torch.ones(3, dtype=Double), 0.0)[0].square().sum(), linear)
    assert grad.isfinite().all()


def literal_linear(x: Tensor, weight: Tensor) -> Tensor:
    linear = x @ (weight / weight.norm(dim=1, keepdim=True)).T
    return 1.5 * linear.abs() / (x.norm(dim=-1, keepdim=True) + 1e-12) * linear


@pytest.mark.parametrize("large", [1, 1 << 21], ids=["one by one", "whole"])
def test_a_layer_behind_a_layer(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second keeps the response of the first, which need not keep its linear one; a response of 0 included."""
    monkeypatch.setattr(memory, "LARGE", large)
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


def test_a_layer_behind_a_layer_keeps_one_response() -> None:
    """In training, that is: in evaluation the gradient by the response itself is to be had."""
    layers = nn.Sequential(BcosLinear(4, 8), BcosLinear(8, 4))
    y = layers[0](torch.randn(3, 4))
    found = origin(y)
    assert found is not None
    linear = weakref.ref(found.linear)
    z = layers[1](y)
    del found, y
    gc.collect()
    assert linear() is None
    z.sum().backward()
    y = layers.eval()[0](torch.randn(3, 4))
    assert torch.autograd.grad(layers[1](y).sum(), y)[0].shape == y.shape


@pytest.mark.parametrize("size", [(), (3, 3)], ids=["vectors", "maps"])
def test_layers_on_one_input_share_its_norm(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, or a block and its shortcut; behind a layer, too; and not where the input has been changed."""
    make = partial(BcosConv2d, kernel_size=1) if size else BcosLinear
    first, second, third = (make(4, 4, dtype=Double) for _ in range(3))
    x = torch.randn(2, 4, *size, dtype=Double)

    def branches(x: Tensor) -> Tensor:
        x = 2 * x
        y = first(x)
        return second(y) * third(y) * second(x)

    counted: list[Tensor] = []
    name = "_sum_of_squares" if size else "_vector_norm"
    compute = getattr(input_norms, name)
    monkeypatch.setattr(input_norms, name, lambda x, *args: counted.append(x) or compute(x, *args))
    found = gradients(branches, x)
    assert len(counted) == 2
    monkeypatch.setattr(input_norms, "_shared", lambda x, key, compute: compute())
    expected = gradients(branches, x)
    assert len(counted) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_computes_the_same() -> None:
    block = nn.Sequential(BcosConv2d(3, 4, 3, padding=1), UncentredBatchNorm2d(4), BcosConv2d(4, 4, 1)).double()
    x = torch.randn(2, 3, 5, 5, dtype=Double)
    plain = gradients(block, x)
    for reentrant in (False, True):
        found = gradients(lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=r), x)
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("between", [[UncentredBatchNorm2d(16)], []], ids=["norm between", "layer behind layer"])
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
    monkeypatch.setattr(memory, "LARGE", 1)
    for one, other in zip(gradients(layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layer", [BcosConv2d(6, 5, 3), BcosLinear(6, 5), BcosConv2d(6, 5, 3, max_out=2)], ids=str)
def test_unit_weights_are_not_kept(layer: nn.Module) -> None:
    """Of a layer's weights the graph keeps the parameter alone."""
    made: list[weakref.ref[Tensor]] = []
    x = torch.randn(2, 6, 7, 6, requires_grad=True)

    def watched(weight: Tensor, *args: object) -> Tensor:
        made.append(weakref.ref(unit := original(weight, *args)))
        return unit

    original = weights.effective_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "effective_weight", watched)
        y = layer(x)
        assert len(made) == 1 and made[0]() is None
    y.sum().backward()
    assert len(made) == 1 or made[-1]() is None


def test_weights_that_change_before_the_backward_pass() -> None:
    """As with torch's own layers, whose graphs keep the weight itself, that is an error."""
    layer = BcosConv2d(3, 4, 1)
    y = layer(torch.randn(1, 3, 4, 4))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_known_of_a_tensor_goes_with_it() -> None:
    """It is no part of the tensor, which may be saved, and ends with it."""
    conv, norm = BcosConv2d(3, 4, 1), UncentredBatchNorm2d(4)
    gc.collect()
    before = len(cosine._ORIGINS), len(input_norms._NORMS)
    x = torch.randn(2, 3, 5, 5)
    y = conv(x)
    assert len(cosine._ORIGINS) == before[0] + 1 and not y.__dict__
    norm(y).sum().backward()
    with torch.no_grad():
        conv(x)
    assert len(input_norms._NORMS) == before[1] + 1 and not x.__dict__
    del x, y
    gc.collect()
    assert (len(cosine._ORIGINS), len(input_norms._NORMS)) == before


def test_gradients_by_a_response_itself() -> None:
    conv, norm = BcosConv2d(3, 4, 1, dtype=Double), UncentredBatchNorm2d(4, dtype=Double)
    x, seen = torch.randn(2, 3, 5, 5, dtype=Double), []
    for want in (lambda y: y.retain_grad(), lambda y: y.register_hook(seen.append)):
        y = conv(x)
        want(y)
        norm(y).square().sum().backward()
        leaf = y.detach().requires_grad_()
        (expected,) = torch.autograd.grad(literal_norm(leaf, norm.weight, norm.eps).square().sum(), leaf)
        torch.testing.assert_close(y.grad if y.retains_grad else seen[0], expected)
    conv.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    norm(conv(x)).square().sum().backward()
    torch.testing.assert_close(seen[1], expected)
