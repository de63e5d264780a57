"""Exact means exact: networks that mathematics calls dynamic linear, and those that only look like it."""

import copy
import random
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_bcos
from tests.helpers import smooth_noise
from timm_bcos.dynamic_linear.registry import TABLE as FUNCTIONS

TABLE = torch.randn(10, 6, dtype=torch.float64)
MATRIX = torch.randn(6, 6, dtype=torch.float64) / 6
GRID = torch.rand(1, 4, 4, 2, dtype=torch.float64) - 0.5


class Swish(torch.autograd.Function):
    """A function that autograd differentiates by a formula of its own."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def into_buffer(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def write(z: Tensor) -> Tensor:
        y = torch.zeros_like(z)
        y[:, :3] = value(z)[:, :3]
        y[:, 3:] = z[:, 3:]
        return y

    return write


def add_in_place(z: Tensor) -> Tensor:
    y = z * 1
    y += z.sigmoid()
    return y


def masked(z: Tensor) -> Tensor:
    return z.masked_fill(z > 0.1, 0.0)


def channels(z: Tensor) -> Tensor:
    return z.mean((2, 3), keepdim=True)


# What a block returns for feature maps z (N, 6, H, W), and whether z's image explains all of it.
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid gate": lambda z: z * z.sigmoid(),
    "keyword softmax gate": lambda z: z * torch.softmax(input=z, dim=1),
    "keyword sum": lambda z: torch.add(z, other=z.relu()),
    "keyword product": lambda z: torch.mul(input=z, other=channels(z)),
    "exponential scales": lambda z: z * torch.exp(-z.square()),
    "logarithm scales": lambda z: z * torch.log1p(z.abs()),
    "sine scales": lambda z: z * torch.sin(3 * z),
    "sorted channels": lambda z: z.sort(1).values,
    "top channels": lambda z: z.topk(6, dim=1).values + z.amax(1, keepdim=True),
    "median": lambda z: z + z.median(1, keepdim=True).values,
    "spectrum": lambda z: torch.fft.ifft2(torch.fft.fft2(z) * 0.5).real,
    "spectral gate": lambda z: torch.fft.irfft2(torch.fft.rfft2(z) * channels(z).sigmoid(), s=z.shape[-2:]),
    "complex modulus": lambda z: torch.fft.rfft2(z).abs()[..., :4],
    "einsum": lambda z: torch.einsum("nchw,cd->ndhw", z, MATRIX),
    "bilinear": lambda z: torch.einsum("nchw,ndhw->nchw", z, z),
    "sampled": lambda z: F.grid_sample(z, GRID.expand(len(z), -1, -1, -1), align_corners=False),
    "sampled where it says": lambda z: F.grid_sample(
        z, GRID.expand(len(z), -1, -1, -1) + channels(z)[:, :2, 0, 0].tanh()[:, None, None], align_corners=False
    ),
    "running sum": lambda z: z.cumsum(2) / 10,
    "row of a table scales": lambda z: z * F.embedding(channels(z)[:, :, 0, 0].argmax(1), TABLE)[:, :, None, None],
    "attention": lambda z: F.scaled_dot_product_attention(*[z.flatten(2).transpose(1, 2)] * 3).transpose(1, 2)[
        ..., None
    ],
    "gate added to scores": lambda z: (
        (z.flatten(2) @ MATRIX.new_ones(z[0, 0].numel(), 6) + channels(z)[..., 0].sigmoid()).softmax(-1) @ z.flatten(2)
    )[..., None],
    "unknown function in a gate": lambda z: z * torch.special.bessel_j0(z).detach(),
    "normalized": lambda z: F.normalize(z, dim=1),
    "local response": lambda z: F.local_response_norm(z, 3),
    "deviation scales": lambda z: z / z.std((1, 2, 3), keepdim=True),
    "masked": masked,
    "written into a buffer": into_buffer(lambda z: 2 * z),
    "glu": lambda z: F.glu(z, 1).repeat(1, 2, 1, 1),
    "maximum": lambda z: torch.maximum(z, z.flip(1)),
    "silu in place": lambda z: F.silu(z * 1, inplace=True),
    "dropped": lambda z: F.dropout(z, 0.5, training=False),
    "huber of a ratio": lambda z: z * (z / z.square().mean((1, 2, 3), keepdim=True)).clamp(-1, 1).square(),
}
INEXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid added": lambda z: z + z.sigmoid(),
    "sigmoid added in place": add_in_place,
    "sigmoid subtracted": lambda z: torch.sub(z, z.sigmoid(), alpha=2),
    "detached added": lambda z: z + z.detach(),
    "data added": lambda z: z + z.data,
    "exponential added": lambda z: z + torch.exp(-z.square()),
    "logarithm added": lambda z: torch.add(z, torch.log1p(z.abs())),
    "softmax added": lambda z: z + z.softmax(1),
    "sine added": lambda z: z + z.sin(),
    "mean and deviation": lambda z: torch.cat([z.mean((2, 3)), z.std((2, 3))], 1)[:, 3:9, None, None],
    "norm added": lambda z: z + z.norm(dim=1, keepdim=True),
    "step added": lambda z: z + (z > 0).to(z.dtype),
    "sign added": lambda z: z + z.sign() / 10,
    "chosen": lambda z: torch.where(z > 0, z, z.sigmoid()),
    "largest of a gate": lambda z: torch.maximum(z, z.sigmoid()),
    "row of a table": lambda z: z + F.embedding(channels(z)[:, :, 0, 0].argmax(1), TABLE)[:, :, None, None],
    "gate written": into_buffer(lambda z: z.sigmoid()),
    "gate index_put": lambda z: z.index_put((torch.tensor([0]),), z.sigmoid()[0]),
    "gate stacked": lambda z: torch.stack([z, z.exp()]).sum(0),
    "gate by a constant": lambda z: z + 2.0 * z.sigmoid() * TABLE[0, :, None, None],
    "bias of a gate": lambda z: F.conv2d(z, MATRIX[:, :, None, None], channels(z)[0, :, 0, 0].sigmoid()),
    "norm shifted by a gate": lambda z: F.layer_norm(z, z.shape[-1:], None, z.sigmoid()[0, 0, 0]),
    "cumulative product": lambda z: z + z.cumprod(1),
    "product of all": lambda z: z * 1 + z.prod(1, keepdim=True),
    "cumulative logsumexp": lambda z: z + torch.logcumsumexp(z, 1),
    "normal distribution": lambda z: z + torch.special.ndtr(z),
    "autograd function": lambda z: Swish.apply(z),
    "scripted function": lambda z: scripted(z),
    "random": lambda z: F.dropout(z, 0.5, training=True),
    "number": lambda z: z + z.mean().item(),
    "interpolated": lambda z: torch.lerp(z, z.sigmoid(), 0.5),
    "sigmoid through a view": lambda z: z + z.sigmoid().flatten(1).reshape(z.shape).contiguous(),
}


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


class Architecture(nn.Module):
    """A bias-free convolution, the block, and a bias-free classifier: nothing in it is constant but the block's."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.block = Block(function)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.conv(x)).mean((2, 3)))


def build(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    config = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,), b=1)
    rules = timm_bcos.RULES | {Block: timm_bcos.keep}
    return timm_bcos.bcosify(Architecture(function).double(), config, rules=rules).eval()


@pytest.mark.parametrize("name", EXACT)
def test_calls_exact_what_is(name: str) -> None:
    model, x = build(EXACT[name]), smooth_noise(2, 3, 16)
    verdict = timm_bcos.check(model, x)
    assert verdict.exact, verdict
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = timm_bcos.explain(model, x)
    assert (explanation.logit.abs() > 1e-6).all()
    assert explanation.completeness_error.max() <= 1e-10
    torch.testing.assert_close(explanation.bias, torch.zeros_like(explanation.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", INEXACT)
def test_calls_not_exact_what_is_not(name: str) -> None:
    model, x = build(INEXACT[name]), smooth_noise(2, 3, 16)
    verdict = timm_bcos.check(model, x)
    assert not verdict.exact
    assert verdict.randomness > 0 or any(d.module == "block" or d.kind == "unseen" for d in verdict.violations), verdict


@pytest.mark.parametrize("name", sorted(INEXACT.keys() - {"random"}))
def test_explanations_say_what_is_not_exact(name: str) -> None:
    model, x = build(INEXACT[name]), smooth_noise(2, 3, 16)
    with pytest.warns(timm_bcos.InexactWarning, match="block|does not see into"):
        explanation = timm_bcos.explain(model, x)
    assert explanation.violations
    if name != "number":  # which is a literal from then on
        assert (explanation.constant_bias.abs() <= 1e-12).all()


def test_what_a_gate_adds_counts_and_is_told_apart() -> None:
    """By hand: logit = w · mean(conv + sigmoid(conv)), of which the sigmoid's part is no constant."""
    model, x = build(lambda z: z + z.sigmoid()), smooth_noise(2, 3, 16)
    with pytest.warns(timm_bcos.InexactWarning, match="block: add adds"):
        explanation = timm_bcos.explain(model, x, 1)
    z = model.conv(x)
    expected = z.sigmoid().mean((2, 3)) @ model.head.weight[1]
    torch.testing.assert_close(explanation.bias, expected.detach())
    torch.testing.assert_close(explanation.logit - expected, explanation.contributions.sum((1, 2, 3)))


def test_constants_are_exact_beside_gates() -> None:
    """A literal that is added is a constant, whatever gates do elsewhere."""
    model, x = build(lambda z: (z + 0.5) * z.sigmoid()), smooth_noise(2, 3, 16)
    explanation = timm_bcos.explain(model, x, 0)
    expected = 0.5 * model.conv(x).sigmoid().mean((2, 3)) @ model.head.weight[0]
    assert timm_bcos.check(model, x).exact
    torch.testing.assert_close(explanation.constant_bias, expected.detach())
    torch.testing.assert_close(explanation.bias, explanation.constant_bias)


def test_sigmoids_can_be_activations() -> None:
    """a(x) = 1/2 + x · slope: with that form a network that passes sigmoids on is exact, and 1/2 is its constant."""

    class Passing(nn.Sigmoid):
        pass

    torch.manual_seed(0)
    network = Architecture(nn.Identity()).double()
    network.block = nn.Sequential(Passing(), nn.Conv2d(6, 6, 1, bias=False)).double()
    config, x = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,), b=1), smooth_noise(2, 3, 16)
    rules = timm_bcos.RULES | {Passing: timm_bcos.keep}
    gates = timm_bcos.bcosify(copy.deepcopy(network), config, rules=rules).eval()
    with pytest.raises(timm_bcos.TargetError, match="ends in sigmoid"):
        timm_bcos.explain(gates, x)
    told = timm_bcos.bcosify(
        copy.deepcopy(network), config, rules=rules | {Passing: timm_bcos.sigmoid_as_activation}
    ).eval()
    network.block[0] = nn.Sigmoid()
    for model in (told, timm_bcos.bcosify(network, config).eval()):  # in a Sequential it is seen
        assert timm_bcos.check(model, x).exact
        torch.testing.assert_close(model(x), gates(x))
        constant = model.head(model.block[1](torch.full((2, 6, 1, 1), 0.5, dtype=x.dtype)).mean((2, 3)))
        torch.testing.assert_close(timm_bcos.explain(model, x, 1).constant_bias, constant[:, 1].detach())


def test_check_does_not_depend_on_float32() -> None:
    """The faint signal of an untrained network drowns in float32's rounding, not the verdict."""
    import timm

    model = timm.create_model("bcosv2_resnet18").eval()
    assert timm_bcos.check(model, torch.rand(1, 3, 64, 64)).exact


def test_check_takes_other_types_of_images() -> None:
    model = build(EXACT["sigmoid gate"])
    assert timm_bcos.check(model, smooth_noise(1, 3, 16, torch.float32)).exact
    with pytest.raises(timm_bcos.InputError, match="pixels in"):
        timm_bcos.check(model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_outputs_that_are_gates_name_their_function() -> None:
    class Probabilities(Architecture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(1)

    rules = timm_bcos.RULES | {Block: timm_bcos.keep}
    model = timm_bcos.bcosify(Probabilities(nn.Identity()), timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,)), rules=rules)
    with pytest.raises(timm_bcos.TargetError, match=r"the model ends in log_softmax.*register_function"):
        timm_bcos.explain(model.eval(), smooth_noise(1, 3, 16, torch.float32))


def chains(count: int) -> list[tuple[str, ...]]:
    """Random chains of two or three blocks, exact and inexact ones."""
    rng = random.Random(0)
    keeps_shape = [
        name for name, f in (EXACT | INEXACT).items() if f(torch.rand(2, 6, 8, 8).double()).shape[1:] == (6, 8, 8)
    ]
    names = sorted({*keeps_shape} - {"random", "masked"})
    return [tuple(rng.sample(names, rng.choice((2, 3)))) for _ in range(count)]


@pytest.mark.parametrize("names", chains(40), ids=" then ".join)
def test_without_constants_the_bias_is_zero_or_the_network_is_not_exact(names: tuple[str, ...]) -> None:
    functions = [(EXACT | INEXACT)[name] for name in names]

    def chain(z: Tensor) -> Tensor:
        for function in functions:
            z = function(z)
        return z

    model, x = build(chain), smooth_noise(2, 3, 16)
    verdict = timm_bcos.check(model, x)
    assert verdict.exact == all(name in EXACT for name in names), verdict
    if verdict.exact:
        explanation = timm_bcos.explain(model, x)
        torch.testing.assert_close(explanation.bias, torch.zeros_like(explanation.bias), rtol=0, atol=1e-12)
        assert explanation.completeness_error.max() <= 1e-10


def test_declared_constants_are_told_apart_by_image() -> None:
    """A handler of one's own that adds a constant to a batch."""

    def shift(z: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(z):
            return torch.overrides.handle_torch_function(shift, (z,), z)
        return z * z.square() + TABLE[0, :, None, None]

    @timm_bcos.register_function(shift)
    def _shift(func: object, z: Tensor) -> Tensor:
        return z * z.detach().square() + timm_bcos.mark_constant(TABLE[0, :, None, None])

    try:
        model, x = build(lambda z: shift(z) * z.sigmoid()), smooth_noise(2, 3, 16)
        explanation = timm_bcos.explain(model, x, 2)
        gate = model.conv(x).sigmoid()
        expected = (TABLE[0, :, None, None] * gate).mean((2, 3)) @ model.head.weight[2]
        torch.testing.assert_close(explanation.constant_bias, expected.detach())
        assert timm_bcos.check(model, x).exact
    finally:
        del FUNCTIONS[shift]


class Prepares(Architecture):
    """Changes images by itself before it reads them."""

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__(nn.Identity())
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prepare(x))


PREPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda x: x.flip(-1),
    "resized": lambda x: F.interpolate(x, size=(12, 12), mode="bilinear"),
    "normalized": lambda x: 2 * x - 1,
    "normalized in place": lambda x: x.mul_(2).sub_(1),
    "padded": lambda x: F.pad(x, (2, 2, 2, 2)),
    "padded with gray": lambda x: F.pad(x, (2, 2, 2, 2), value=0.5),
    "BGR": lambda x: x[:, [2, 1, 0]],
    "gray": lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "masked": lambda x: x * (torch.arange(16) > 4),
    "cropped": lambda x: x[..., 2:14, 2:14],
    "encoded": lambda x: torch.cat([x, 1 - x], 1),
    "mixed colors": lambda x: torch.einsum("nchw,cd->ndhw", x, MATRIX[:3, :3]),
    "centered by itself": lambda x: x - x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", PREPARED)
def test_explanations_begin_at_the_image_that_is_given(name: str) -> None:
    """What stands before the first layer is pulled back to the image; by hand, by the Jacobian of the whole."""
    config, x = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.0,), std=(1.0,)), smooth_noise(2, 3, 16)
    torch.manual_seed(0)
    model = timm_bcos.bcosify(Prepares(PREPARED[name]).double(), config).eval()
    verdict = timm_bcos.check(model, x)
    assert verdict.exact, verdict
    explanation = timm_bcos.explain(model, x, 1)
    torch.testing.assert_close(explanation.inputs, torch.cat([x, 1 - x], 1))
    image = x.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(model(image.clone())[:, 1].sum(), image)  # the model is affine
    shown, hidden = explanation.weights.chunk(2, 1)
    torch.testing.assert_close(shown - hidden, jacobian)
    assert explanation.completeness_error.max() < 1e-10


GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by a gate": lambda x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "normalized by itself": lambda x: x / x.std((2, 3), keepdim=True),
    "a gate added": lambda x: x + x.mean((1, 2, 3), keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("name", GATED)
def test_images_changed_by_gates_are_not_exact(name: str) -> None:
    """The complement 1 - P(x) then has a part that is neither the image's nor a constant."""
    config, x = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.0,), std=(1.0,)), smooth_noise(2, 3, 16)
    model = timm_bcos.bcosify(Prepares(GATED[name]).double(), config).eval()
    verdict = timm_bcos.check(model, x)
    assert not verdict.exact
    assert verdict.violations
    with pytest.warns(timm_bcos.InexactWarning, match="depends on the image"):
        timm_bcos.explain(model, x)
