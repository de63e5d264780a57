from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_bcos
from timm_bcos.dynamic_linear.bias_tracker import BiasTracker
from timm_bcos.dynamic_linear.mode import active, explanation_mode
from timm_bcos.dynamic_linear.registry import TABLE
from timm_bcos.dynamic_linear.tracking_mode import BiasTrackingMode
from timm_bcos.explanation.linear_parts import LinearPart, linear_part

Double = torch.float64
BIAS = torch.randn(6, dtype=Double)
WEIGHT = torch.randn(6, 6, dtype=Double)
STATS = torch.rand(6, dtype=Double) + 0.5

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
    "relu": F.relu,
    "relu6": lambda x: F.relu6(10 * x),
    "hardtanh": lambda x: F.hardtanh(3 * x),
    "tanh": torch.tanh,
    "leaky relu": F.leaky_relu,
    "gate": lambda x: x * x.flip(-1).sigmoid(),
    "gate in place": lambda x: (x * 1).mul_(x.sigmoid()),
    "product": lambda x: x * x.flip(-1),
    "product in place": lambda x: (x * 1).mul_(x.flip(-1)),
    "matrix product": lambda x: x.unsqueeze(-1) @ x.unsqueeze(-2),
    "quotient": lambda x: x / (1 + x.abs().mean(-1, keepdim=True)),
    "sum with a constant": lambda x: 3 * x + BIAS,
    "sum with a number": lambda x: 2 - x + 1,
    "sum in place": lambda x: (x * 1).add_(BIAS),
    "number in front": lambda x: torch.rsub(x, 2.0),
    "constant in front": lambda x: BIAS - x,
    "constant in place": lambda x: into_constant(x),
    "augmented sum": lambda x: augmented(x),
    "concatenation": lambda x: torch.cat([x, BIAS.expand(2, -1)], -1),
    "stack": lambda x: torch.stack([x, BIAS.expand(2, -1)]),
    "addcmul": lambda x: torch.addcmul(BIAS, x, x.sigmoid(), value=0.5),
    "linear": lambda x: F.linear(x, WEIGHT, BIAS),
    "conv1d": lambda x: F.conv1d(x[:, :, None], WEIGHT[:, :, None], BIAS),
    "conv2d": lambda x: F.conv2d(x[:, :, None, None], WEIGHT[:, :, None, None], BIAS),
    "conv3d": lambda x: F.conv3d(x[:, :, None, None, None], WEIGHT[:, :, None, None, None], BIAS),
    "conv transpose": lambda x: F.conv_transpose2d(x[:, :, None, None], WEIGHT[:, :, None, None], BIAS, stride=2),
    "layer norm": lambda x: F.layer_norm(x, (6,), STATS, BIAS),
    "group norm": lambda x: F.group_norm(x[:, :, None], 2, STATS, BIAS),
    "rms norm": lambda x: F.rms_norm(x, (6,), STATS),
    "batch norm": lambda x: F.batch_norm(x, BIAS, STATS, STATS, BIAS),
    "plain batch norm": lambda x: F.batch_norm(x, BIAS, STATS),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 2, 2, 3)] * 3),
    "causal attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(1, 1, 4, 3)] * 3, is_causal=True),
    "grouped queries": lambda x: F.scaled_dot_product_attention(
        x.reshape(1, 4, 1, 3), *[x[:1].reshape(1, 2, 1, 3)] * 2, enable_gqa=True
    ),
    "attention that leaves out": lambda x: F.scaled_dot_product_attention(
        *[x.reshape(1, 2, 2, 3)] * 3, attn_mask=torch.tensor([[True, False], [True, True]]), scale=0.7
    ),
    "attention over a sequence": lambda x: attend(x.reshape(2, 1, 6)),
    "padded attention over a sequence": lambda x: attend(
        x.reshape(2, 1, 6), key_padding_mask=torch.tensor([[False, True]]), attn_mask=torch.zeros(2, 2, dtype=Double)
    ),
    "attention with a mask of the input": lambda x: F.scaled_dot_product_attention(
        *[x.reshape(1, 2, 2, 3)] * 3, attn_mask=x[0, 0] * x.reshape(1, 2, 2, 3) @ x.reshape(1, 2, 3, 2)
    ),
    "choice": lambda x: torch.where(x > 0.1, 2 * x, BIAS),
    "choice of two": lambda x: torch.where(x > 0.1, x, x.flip(-1)),
    "maximum with a constant": lambda x: torch.maximum(x, 0.1 * BIAS),
    "minimum of two": lambda x: torch.minimum(x, x.flip(-1)),
    "padding": lambda x: F.pad(x, (1, 2)) + F.pad(x, (1, 2), value=0.5),
    "power": lambda x: x**3 + x.pow(2) + torch.square(x),
    "star relu": lambda x: 0.8 * F.relu(x) ** 2 - 0.4,
    "fractional power": lambda x: x * x.square().mean(-1, keepdim=True) ** -0.5,
    "einsum": lambda x: torch.einsum("ni,nj->nij", x, x),
    "einsum of three": lambda x: torch.einsum("ni,nj,nj,ij->n", x, x, x, WEIGHT),
    "clamp": lambda x: x.clamp(-0.5, 0.3) + torch.clamp(x, min=0.1),
    "reciprocal": lambda x: x * (1 / (1 + x.square().sum())) + x * torch.reciprocal(2 + x.exp()),
    "quotient in place": lambda x: (x * 1).div_(1 + x.square()),
    "logarithm": lambda x: x * torch.log1p(x.square()) * x.cos(),
    "response norm": lambda x: x * (x.norm(dim=-1, keepdim=True) / 3),
    "max pooling": lambda x: F.max_pool1d(x[None], 2),
}


def attend(x: Tensor, **masks: Tensor) -> Tensor:
    """torch's attention layer as a function, over (L, N, E)."""
    return F.multi_head_attention_forward(
        x,
        x,
        x,
        6,
        2,
        WEIGHT.repeat(3, 1),
        BIAS.repeat(3),
        None,
        None,
        False,
        0.0,
        WEIGHT,
        BIAS,
        training=False,
        **masks,
    )[0]


def augmented(x: Tensor) -> Tensor:
    y = 2 * x
    y += BIAS
    y *= x.sigmoid()
    return y


def into_constant(x: Tensor) -> Tensor:
    y = BIAS.expand(2, -1).clone()
    y += x
    return y


def take_apart(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, LinearPart, Tensor]:
    """A random projection of f(x) by linear algebra: its value, its parts, and W x."""
    leaf = x.detach().clone().requires_grad_()
    account = BiasTracker(nn.Identity(), 1, leaf)
    with active(BiasTrackingMode(leaf, account)):
        value = function(leaf)
    direction = torch.randn(value.shape, dtype=Double)
    projected = ((value.real if value.is_complex() else value) * direction).sum()
    part = linear_part(projected, leaf, account)
    return projected.detach(), part, (part.weights[:, : leaf.shape[1]] * leaf).sum().detach()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_adds_up(name: str) -> None:
    """In explanation mode f(x) = J x + (contribution of the constants), and its value does not change."""
    function = FUNCTIONS[name]
    x = torch.randn(2, 6, dtype=Double)
    torch.manual_seed(1)
    value, part, image = take_apart(function, x)
    torch.manual_seed(1)
    direction = torch.randn(function(x).shape, dtype=Double)
    torch.testing.assert_close(value, (function(x) * direction).sum(), rtol=1e-12, atol=1e-12)
    assert part.violations == ()
    torch.testing.assert_close(image + part.constant_bias.sum(), value, rtol=1e-10, atol=1e-10)


def test_constants_are_derivatives_by_their_factor() -> None:
    """What constants contribute is the derivative by α when all of them are multiplied by α, the rest frozen."""
    x = torch.randn(3, 6, dtype=Double)
    leaf = x.clone().requires_grad_()
    account = BiasTracker(nn.Identity(), 3, leaf)
    with active(BiasTrackingMode(leaf, account)):
        hidden = F.layer_norm(F.linear(leaf, WEIGHT, BIAS), (6,), STATS, BIAS)
    contributed = torch.stack([linear_part(hidden[:, k].sum(), leaf, account).constant_bias for k in range(6)], 1)
    plain = F.linear(x, WEIGHT, BIAS)
    deviation = (plain.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(contributed, (BIAS - BIAS.mean()) / deviation * STATS + BIAS)


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 5, 3), (8, 3)])
def test_constants_are_booked_to_their_image(shape: tuple[int, ...]) -> None:
    """Images lie in front, second behind a sequence's positions, or as several rows each."""
    x = torch.randn(2, 12 if shape != (2, 5, 3) else 15, dtype=Double)
    leaf = x.clone().requires_grad_()
    account = BiasTracker(nn.Identity(), 2, leaf)
    with active(BiasTrackingMode(leaf, account)):
        y = leaf.reshape(2, 4, 3).transpose(0, 1) if shape == (4, 2, 3) else leaf.reshape(shape)
        y = y + BIAS[:3]
        y = y.transpose(0, 1) if shape == (4, 2, 3) else y
        logits = y.reshape(2, -1).sum(1)
    part = linear_part(logits.sum(), leaf, account)
    torch.testing.assert_close(part.constant_bias + (part.weights[:, : x.shape[1]] * x).sum(1), logits.detach())


def test_mode_changes_nothing_and_nests() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), explanation_mode(model), explanation_mode(model):
        assert model[0].weight.requires_grad
        assert not model(torch.ones(1, 3)).requires_grad
        raise RuntimeError("inside")
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    x = torch.tensor([0.5], requires_grad=True)
    (outside,) = torch.autograd.grad(F.gelu(x).sum(), x)
    torch.testing.assert_close(outside, torch.autograd.functional.jacobian(F.gelu, x)[0])


def test_mode_refuses_checkpointing() -> None:
    model = nn.Linear(3, 3)
    model.grad_checkpointing = True
    with pytest.raises(timm_bcos.ModelStateError, match="set_grad_checkpointing"), explanation_mode(model):
        pass


def test_declare_adds_a_function() -> None:
    def cube(x: Tensor) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(cube, (x,), x)
        return x**3

    @timm_bcos.register_function(cube)
    def _cube(func: object, x: Tensor) -> Tensor:
        return x * x.detach() ** 2

    try:
        x = torch.tensor([2.0], requires_grad=True)
        with explanation_mode(nn.Identity()):
            (gradient,) = torch.autograd.grad(cube(x).sum(), x)
        assert gradient.item() == 4
    finally:
        del TABLE[cube]


def test_captum_sees_the_linear_map() -> None:
    captum = pytest.importorskip("captum.attr")
    import timm

    from tests.helpers import enliven, real_image

    x = real_image(32)
    model = enliven(timm.create_model("bcos_cnn9"), x)
    explanation = timm_bcos.explain(model, x)
    encoded = timm_bcos.encode_image(x, 3)
    with explanation_mode(model):
        contributions = captum.InputXGradient(model).attribute(encoded.requires_grad_(), target=int(explanation.target))
    torch.testing.assert_close(contributions, explanation.contributions)
