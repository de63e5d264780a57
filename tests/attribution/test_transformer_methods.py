"""Attribution methods for transformers: each against cases worked by hand and slow, literal twins in float64."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import normalized, real_image
from timm_bcos import MethodError
from timm_bcos.attribution.registry import attribute

EXACT = dict(gamma=0.0, conv_gamma=0.0)


def readable(module: Any, channels: int = 1) -> Any:
    """A network of pixels in [0, 1] that are not normalized."""
    module.num_classes, module.in_chans = 2, channels
    module.pretrained_cfg = dict(mean=(0.0,) * channels, std=(1.0,) * channels)
    return module.double().eval()


class Attending(nn.Module):
    """Tokens of one number, a class token of 1 and two patches, that mix by given attention; the logits are ±."""

    def __init__(self, layers: Tensor, pool: str = "token") -> None:
        super().__init__()
        self.layers, self.global_pool, self.num_prefix_tokens = layers, pool, 1
        self.patch_embed = SimpleNamespace(grid_size=(1, 2))
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(attn_drop=nn.Identity())) for _ in layers)
        readable(self).pretrained_cfg = dict(mean=(0.5,), std=(0.5,))

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.pad(x.flatten(1), (1, 0), value=1.0)[:, :, None]
        for block, weights in zip(self.blocks, self.layers, strict=True):
            weights = weights.expand(len(x), -1, -1, -1) + 0 * tokens.sum()  # on the graph
            tokens = (block["attn_drop"](weights) @ tokens[:, None]).mean(1)  # type: ignore[index]
        y = tokens[:, 0, 0] if self.global_pool == "token" else tokens[:, 1:, 0].mean(1)
        return torch.stack([y, -y], 1)


ONE_HEAD = torch.tensor([[[[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]]], dtype=torch.double)
PIXELS = torch.tensor([0.9, 0.3], dtype=torch.double).reshape(1, 1, 1, 2)  # 0.8 and -0.4 for the network


def test_chefer_of_one_layer_by_hand() -> None:
    """The gradient by the class token's weight of a patch is the patch's value."""
    found = attribute(Attending(ONE_HEAD), PIXELS.repeat(2, 1, 1, 1), [0, 1], "chefer")
    expected = torch.tensor([[[0.5 * 0.8, 0.0]], [[0.0, 0.3 * 0.4]]], dtype=torch.double)
    torch.testing.assert_close(found, expected)


def test_chefer_of_pooled_patches_by_hand() -> None:
    """Both patches' rows count half in the logit and half in the map."""
    found = attribute(Attending(ONE_HEAD, "avg"), PIXELS, 0, "chefer")
    expected = torch.tensor([[[(0.6 + 0.3) * 0.8 / 4, 0.0]]], dtype=torch.double)
    torch.testing.assert_close(found, expected)


def test_chefer_of_two_layers_and_heads_by_hand() -> None:
    """R = I, then R ← R + Ā · R with Ā the mean over heads of (∇A ⊙ A)⁺."""
    layers = torch.rand(2, 2, 3, 3, dtype=torch.double)
    first, second = layers.mean(1)
    values = torch.tensor([1, 0.8, -0.4], dtype=torch.double)
    by_second, by_first = torch.zeros(2, 3, 3, dtype=torch.double)
    by_second[0] = first @ values / 2  # of two heads
    by_first[:] = second[0][:, None] * values / 2
    relevance = torch.eye(3, dtype=torch.double)
    for heads, gradient in zip(layers, (by_first, by_second), strict=True):
        relevance = relevance + sum((gradient * head).clamp(min=0) for head in heads) / 2 @ relevance
    found = attribute(Attending(layers), PIXELS, 0, "chefer")
    torch.testing.assert_close(found[0, 0], relevance[0, 1:])
    assert (found > 0).any()


def transformer(kind: str, **kwargs: Any) -> Any:
    """A small network with attention that matters."""
    arch = {} if kind == "test_vit" else dict(arch="test_vit")
    model = timm.create_model(kind, num_classes=3, **arch, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def shown(attn: Any, kept: list[Tensor]) -> Callable[..., Tensor]:
    """The forward of an attention layer, literally."""

    def forward(x: Tensor, **_: Any) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        kept.append((q @ k.transpose(2, 3) * attn.scale).softmax(3))
        projected: Tensor = attn.proj((kept[-1] @ v).transpose(1, 2).flatten(2))
        return projected

    return forward


@pytest.mark.parametrize("kind", ["test_vit", "bcosify"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_chefer_literally(kind: str, pool: str) -> None:
    model = transformer(kind, global_pool=pool, fc_norm=False).double()
    x = real_image(160, dtype=torch.double)
    kept: list[Tensor] = []
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attn.forward = shown(block.attn, kept)
    logits = twin(normalized(x, model.pretrained_cfg) if kind == "test_vit" else x)
    relevance = torch.eye(101, dtype=torch.double)
    for attention, gradient in zip(kept, torch.autograd.grad(logits[0, 2], kept), strict=True):
        relevance = relevance + (attention * gradient).clamp(min=0)[0].mean(0).detach() @ relevance
    row = relevance[0] if pool == "token" else (relevance - torch.eye(101))[1:].mean(0)
    expected = F.interpolate(row[1:].reshape(1, 1, 10, 10), 160, mode="bilinear")[0]
    found = attribute(model, x, 2, "chefer")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert (found >= 0).all() and found.std() > 0.1 * found.mean()
    assert not torch.allclose(found, attribute(model, x, 1, "chefer"))


class Softmax(nn.Module):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).softmax(1) @ self.weights


def test_softmax_takes_the_rule_of_the_paper() -> None:
    x, weights = torch.rand(2, 1, 1, 5, dtype=torch.double), torch.randn(5, 2, dtype=torch.double)
    found = attribute(readable(Softmax(weights)), x, 1, "attnlrp", **EXACT)
    for pixels, relevance in zip(x.flatten(1), found.flatten(1), strict=True):
        s = pixels.softmax(0)
        output = s * weights[:, 1]
        torch.testing.assert_close(relevance, pixels * (output - s * output.sum()))


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1).chunk(2, 1)
        return torch.stack([(a * b).sum(1), (a[:, None] @ b[:, :, None]).flatten()], 1)


@pytest.mark.parametrize("target", [0, 1])
def test_factors_of_a_product_take_halves(target: int) -> None:
    x = torch.rand(2, 1, 1, 6, dtype=torch.double)
    halves = x[..., :3] * x[..., 3:] / 2
    found = attribute(readable(Product()), x, target, "attnlrp")
    torch.testing.assert_close(found, torch.cat([halves, halves], 3)[:, 0])


class Normed(nn.Module):
    """Linear layers, norms and activations without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4, bias=False), nn.LayerNorm(8, bias=False)
        self.fc1, self.rms, self.fc2 = nn.Linear(8, 16, bias=False), nn.RMSNorm(16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(F.silu(self.conv(x)).flatten(2).transpose(1, 2))
        tokens = tokens + self.fc2(self.rms(F.gelu(self.fc1(tokens))))
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("gammas", [EXACT, {}, dict(gamma=3.0, conv_gamma=0.5)])
def test_relevance_adds_up_to_the_logit_whatever_its_sign(gammas: dict[str, float]) -> None:
    model, x = readable(Normed(), 3), real_image(16, 3, torch.double)
    logits = model(x).detach()
    assert logits.min() < 0 < logits.max()
    for target in range(2):
        found = attribute(model, x, target, "attnlrp", **gammas).sum((1, 2))
        torch.testing.assert_close(found, logits[:, target])


def passed_on(x: Tensor, weight: Tensor, bias: Tensor, gamma: float, relevance: Tensor) -> Tensor:
    """R_i = Σ_j (z_ij + γ z_ij^±) / Σ_i (z_ij + γ z_ij^±) R_j, of one vector; the bias is one more input."""
    shares = torch.zeros_like(x)
    for j, row in enumerate(weight):
        z = torch.cat([row * x, bias[j : j + 1]])
        counted = z + gamma * (z.clamp(min=0) if z.sum() > 0 else z.clamp(max=0))
        shares += counted[:-1] / counted.sum() * relevance[j]
    return shares


@pytest.mark.parametrize("gamma", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gamma_rule_literally(kind: str, gamma: float) -> None:
    """Two layers, the second of which has inputs of both signs; a kernel as large as the image is a linear layer."""
    first: Any = nn.Linear(6, 12) if kind == "linear" else nn.Conv2d(1, 12, (2, 3))
    second: Any = nn.Linear(12, 2) if kind == "linear" else nn.Conv2d(12, 2, 1)
    flatten = nn.Flatten()
    layers = (flatten, first, nn.GELU(), second) if kind == "linear" else (first, nn.GELU(), second, flatten)
    model = readable(nn.Sequential(*layers))
    model.pretrained_cfg["mean"] = (0.5,)
    x = torch.rand(1, 1, 2, 3, dtype=torch.double)
    z, options = (x - 0.5).flatten(), dict(EXACT, **{"gamma" if kind == "linear" else "conv_gamma": gamma})
    hidden = F.gelu(first.weight.flatten(1) @ z + first.bias).detach()
    assert hidden.min() < 0 < hidden.max()
    top = torch.tensor([0, model(x - 0.5)[0, 1].item()], dtype=torch.double)
    below = passed_on(hidden, second.weight.flatten(1), second.bias, gamma, top)
    expected = passed_on(z, first.weight.flatten(1), first.bias, gamma, below).detach()
    torch.testing.assert_close(attribute(model, x, 1, "attnlrp", **options).flatten(), expected)


class Attention(nn.Module):
    """Rows of the image are tokens, which attend to each other with two heads; the first one is read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, 0]
        if self.kind == "torch":
            return self.head(self.layer(tokens, tokens, tokens, need_weights=False)[0][:, 0])  # type: ignore[no-any-return]
        q, k, v = F.linear(tokens, self.layer.in_proj_weight).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * 2**-0.5).softmax(-1) @ v
        return self.head(self.layer.out_proj(y.transpose(1, 2).flatten(2))[:, 0])  # type: ignore[no-any-return]


def relevance_of_attention(model: Attention, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """(tokens, features) of one image's tokens, and of the scores before softmax, by the rules one after the other."""
    q, k, v = (x @ model.layer.in_proj_weight.T).unflatten(1, (3, 2, 2)).permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) * 2**-0.5
    weights = scores.softmax(2)
    y = weights @ v
    of_y = torch.zeros_like(y)  # heads, tokens, features
    of_y[:, 0] = y[:, 0] * (model.head.weight @ model.layer.out_proj.weight)[target].unflatten(0, (2, 2))
    terms = torch.einsum("hij,hjd,hid->hijd", weights, v, of_y / y) / 2
    of_weights, of_v = terms.sum(3), terms.sum(1)
    of_scores = scores * (of_weights - weights * of_weights.sum(2, keepdim=True))
    terms = torch.einsum("hid,hjd,hij->hijd", q, k, 2**-0.5 * of_scores / scores) / 2
    of_q, of_k = terms.sum(2), terms.sum(1)
    projected = torch.stack([q, k, v]).permute(2, 0, 1, 3).flatten(1)
    of_projected = torch.stack([of_q, of_k, of_v]).permute(2, 0, 1, 3).flatten(1)
    return x * (of_projected / projected @ model.layer.in_proj_weight), of_scores


@pytest.mark.parametrize("kind", ["torch", "fused", "explicit"])
def test_attention_literally(kind: str) -> None:
    """Values take half of the relevance, exactly; softmax makes and destroys some of the other half."""
    model, x = readable(Attention(kind)), torch.rand(2, 1, 5, 4, dtype=torch.double)
    with torch.no_grad():
        expected, of_scores = relevance_of_attention(model, x[0, 0], 1)
    found = attribute(model, x, 1, "attnlrp", **EXACT)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[0].sum(), model(x)[0, 1] / 2 + of_scores.sum())
    torch.testing.assert_close(attribute(model, x[:1], 1, "attnlrp"), attribute(model, x, 1, "attnlrp")[:1])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("test_vit", "attention_rollout"),
        ("test_vit", "chefer"),
        ("test_vit", "attnlrp"),
        ("bcosify", "attention_rollout"),
        ("bcosify", "chefer"),
    ],
)
def test_maps_in_batches_of_any_size_of_a_network_that_stays_as_it_is(kind: str, method: str) -> None:
    model, x = transformer(kind), real_image(160, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    members = [{name: getattr(m, name, None) for name in ("fused_attn", "training")} for m in model.modules()]
    maps = attribute(model, x, [0, 2, 1], method)
    one_by_one = attribute(model, x, [0, 2, 1], method, batch_size=1)
    torch.testing.assert_close(one_by_one, maps, rtol=1e-3, atol=1e-4 * maps.abs().max().item())
    assert maps.shape == (3, 160, 160) and maps.isfinite().all() and not maps.requires_grad
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert members == [{name: getattr(m, name, None) for name in ("fused_attn", "training")} for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["chefer", "attnlrp"])
def test_fused_attention_changes_nothing(method: str) -> None:
    model, x = transformer("test_vit").double(), real_image(160, dtype=torch.double)
    maps = []
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        maps.append(attribute(model, x, 1, method))
    torch.testing.assert_close(*maps)
    assert maps[0].any()


def test_both_gammas_move_relevance() -> None:
    model, x = transformer("test_vit"), real_image(160)
    options = [EXACT, dict(EXACT, gamma=0.05), dict(EXACT, conv_gamma=0.25), {}]
    maps = [attribute(model, x, 1, "attnlrp", **one) for one in options]
    assert all(not torch.allclose(a, b) for i, a in enumerate(maps) for b in maps[:i])
    assert all(one.min() < 0 < one.max() for one in maps)


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        ("chefer", "test_resnet", "chefer is for vision transformers, not for ResNet"),
        ("attention_rollout", "test_resnet", "attention_rollout is for vision transformers, not for ResNet"),
        ("attnlrp", "bcosify", "B-cos layers are neither"),
    ],
)
def test_networks_that_do_not_suit(method: str, kind: str, text: str) -> None:
    model = timm.create_model(kind, **(dict(arch="test_vit") if kind == "bcosify" else {})).eval()
    with pytest.raises(MethodError, match=text):
        attribute(model, real_image(160), 0, method)


def test_attention_that_is_not_shown() -> None:
    model = Attending(ONE_HEAD)
    model.patch_embed.grid_size = (1, 3)
    for method in ("chefer", "attention_rollout"):
        with pytest.raises(MethodError, match="Attending does not provide the attention of its 4 tokens"):
            attribute(model, PIXELS, 0, method)


def test_networks_that_end_in_a_gate() -> None:
    with pytest.raises(MethodError, match="the logits of Sequential are the output of a gate"):
        attribute(readable(nn.Sequential(nn.Flatten(), nn.Sigmoid())), PIXELS, 0, "attnlrp")


def test_functions_without_a_rule() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x.flatten(1), 0.1, 0, 0, 10)

    with pytest.raises(
        MethodError,
        match=r"no rule for fake_quantize_per_tensor_affine: register one with timm_bcos",
    ):
        attribute(readable(Unknown()), PIXELS, 0, "attnlrp")


@pytest.mark.parametrize("name", ["gamma", "conv_gamma"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_gammas_out_of_range(name: str, value: float) -> None:
    with pytest.raises(MethodError, match=f"^{name}=.*: give a number from 0"):
        attribute(readable(Normed(), 3), real_image(16), 0, "attnlrp", **{name: value})
