"""The rule table: what each row does to the function, and what is refused, with the line that says why."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm import layers as timm_layers
from timm import models as timm_models
from timm.layers import norm, norm_act
from timm.layers.evo_norm import EvoNorm2dS0, EvoNorm2dS0a
from timm.layers.filter_response_norm import FilterResponseNormTlu2d
from timm.layers.grn import GlobalResponseNorm
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn

import timm_bcos
from tests.helpers import assert_exact, normalized, real_image
from timm_bcos import RULES, BcosConfig, BcosConv2d, UnsupportedModuleError, bcosify, keep
from timm_bcos.conversion.rules import LayerRole
from timm_bcos.nn.heads import BcosConvClassifier, BcosLinearClassifier, BcosPool2d
from timm_bcos.nn.stems import BcosStem, ImageReader

CFG = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
CONFIG = BcosConfig(**CFG)
PRESERVE = BcosConfig.finetune(b=1, bias=True, **CFG)


def network(*inner: nn.Module) -> nn.Module:
    """Modules between a stem and a classifier, 8 channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def randomized(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with weights and statistics that are not 0 and 1."""
    module = module.double().eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return module


def converted(module: nn.Module, config: BcosConfig) -> nn.Module:
    return RULES[type(module)](module, LayerRole("here"), config)


# `scripts/benchmarks/model_coverage.py` measures; here every model file is at least planned.


@pytest.mark.parametrize("shard", range(4))
def test_an_architecture_of_every_model_file_can_be_planned(shard: int) -> None:
    names = timm.list_models(exclude_filters="bcos*")
    files = sorted({timm_models.model_entrypoint(name).__module__.rpartition(".")[2] for name in names})
    assert len(files) >= 98
    for file in files[shard::4]:
        bcosify(timm.create_model(timm.list_models(module=file)[0], device="meta"), BcosConfig.v2())


# Norms.

NORMS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: getattr(norm, name)(8)
    for name in (
        "GroupNorm1", "LayerNorm", "LayerNormFp32", "LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d", "RmsNorm",
        "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32",
    )
}  # fmt: skip
NORM_ACTS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: getattr(norm_act, name)(8)
    for name in (
        "LayerNormAct", "LayerNormActFp32", "LayerNormAct2d", "LayerNormAct2dFp32", "RmsNormAct", "RmsNormActFp32",
        "RmsNormAct2d", "RmsNormAct2dFp32", "GroupNorm1Act", "BatchNormAct2d", "FrozenBatchNormAct2d",
    )
}  # fmt: skip
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "torch BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "torch SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "torch GroupNorm": lambda: nn.GroupNorm(2, 8),
    "torchvision FrozenBatchNorm2d": lambda: torchvision.ops.FrozenBatchNorm2d(8),
    "torchvision LayerNorm2d": lambda: torchvision.models.convnext.LayerNorm2d(8),
}


@pytest.mark.parametrize("name", [*NORMS, *NORM_ACTS, *OTHERS])
def test_norms_follow_the_config(name: str) -> None:
    """Kept with its bias it is the same function; without, only the additive parts are gone; removed, it is gone."""
    plain = randomized((NORMS | NORM_ACTS | OTHERS)[name]())
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    expected, state = plain(x), copy.deepcopy(plain.state_dict())
    torch.testing.assert_close(converted(plain, PRESERVE)(x), expected, rtol=1e-5, atol=1e-5)
    for member in ("bias", "running_mean"):
        if getattr(plain, member, None) is not None:
            getattr(plain, member).data.zero_()
    expected = plain(x)
    plain.load_state_dict(state)
    for config in (CONFIG, BcosConfig(norm="uncentered", bias=False)):
        unbiased = converted(plain, config)
        torch.testing.assert_close(unbiased(x), expected, rtol=1e-5, atol=1e-5)
        assert unbiased(0 * x).abs().max() == 0
    removed = converted(plain, BcosConfig(norm="remove"))
    torch.testing.assert_close(removed(x), F.relu(x) if name in NORM_ACTS else x)
    bare = converted(plain, BcosConfig(norm="remove", activation="remove"))
    torch.testing.assert_close(bare(x), x)
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", [name for name in [*NORMS, *NORM_ACTS] if name.endswith("Fp32")])
def test_float32_norms_keep_the_digits_of_float64(name: str) -> None:
    plain = randomized((NORMS | NORM_ACTS)[name]())
    sibling = randomized((NORMS | NORM_ACTS)[name.removesuffix("Fp32")]())
    sibling.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    wide = converted(plain, PRESERVE)
    torch.testing.assert_close(wide(x), sibling(x), rtol=1e-12, atol=1e-12)
    half = x.bfloat16()
    torch.testing.assert_close(wide.bfloat16()(half), plain.bfloat16()(half), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [EvoNorm2dS0, EvoNorm2dS0a, FilterResponseNormTlu2d])
def test_norm_and_activation_in_one(kind: type[nn.Module]) -> None:
    plain = randomized(kind(8, groups=2))
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    assert converted(plain, PRESERVE) is plain
    expected = kind.forward(plain, x)
    biased = converted(plain, CONFIG)
    if kind is not FilterResponseNormTlu2d:  # whose threshold comes after the bias
        torch.testing.assert_close(biased(x) + plain.bias.reshape(-1, 1, 1), expected)
    assert list(dict(biased.named_parameters())).count("bias") == 0
    assert converted(plain, BcosConfig(activation="remove"))(x).min() < 0
    assert type(converted(plain, BcosConfig(norm="remove", activation="remove"))) is nn.Identity
    with pytest.raises(UnsupportedModuleError, match=r"here: .* is norm and activation in one"):
        converted(plain, BcosConfig(norm="remove"))


def test_batch_norm_without_affine_or_running_statistics() -> None:
    x = real_image(8, 2, torch.float64)
    plain = network(nn.BatchNorm2d(8, affine=False)).double()
    timm_bcos.calibrate(plain, normalized(x, CFG))
    expected = plain(normalized(x, CFG)).detach()
    torch.testing.assert_close(bcosify(copy.deepcopy(plain), PRESERVE)(x).detach(), expected)
    uncentered = bcosify(plain, CONFIG)
    assert_exact(uncentered, x, 1e-10)
    assert not uncentered[1].weight.requires_grad
    by_batch = network(nn.BatchNorm2d(8, track_running_stats=False))
    for config in (PRESERVE, CONFIG):
        with pytest.raises(UnsupportedModuleError, match=r"1: .*BatchNorm2d has no running statistics.*norm='remove'"):
            bcosify(by_batch, config)
    assert type(bcosify(by_batch, CONFIG.change(norm="remove"))[1]) is nn.Identity


# Additive biases that modules own directly.


@pytest.mark.parametrize(
    "module",
    [
        timm_models.metaformer.StarReLU(), timm_models.hgnet.LearnableAffineBlock(), timm_models.mlp_mixer.Affine(8),
        GlobalResponseNorm(8),
    ],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_owned_biases_go_with_the_others(module: nn.Module) -> None:
    plain = randomized(module)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    name = "beta" if hasattr(plain, "beta") else "bias"
    assert converted(plain, PRESERVE) is plain
    unbiased = converted(plain, CONFIG)
    torch.testing.assert_close(unbiased(x) + getattr(plain, name), plain(x))
    assert name in dict(plain.named_parameters()) and name not in dict(unbiased.named_parameters())
    assert name not in unbiased.state_dict()
    torch.testing.assert_close(copy.deepcopy(unbiased)(x), unbiased(x))


@pytest.mark.parametrize(
    "arch", ["beitv2_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "vit_base_patch16_xp_224"]
)
def test_no_additive_bias_is_left(arch: str) -> None:
    """Position embeddings and tokens are no biases; all else that is added has gone."""
    model = bcosify(timm.create_model(arch, device="meta"))
    left = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert not left
    kept = bcosify(timm.create_model(arch, device="meta"), BcosConfig.finetune(b=1, bias=True))
    assert any(name.endswith("bias") for name, _ in kept.named_parameters())


# Pooling.


def test_max_pooling_of_every_kind_becomes_average_pooling() -> None:
    config = CONFIG.change(max_pool="average")
    x = torch.rand(2, 8, 7, 7)
    same = converted(MaxPool2dSame(3, 2), config)
    assert type(same) is AvgPool2dSame
    torch.testing.assert_close(same(x), AvgPool2dSame(3, 2)(x))
    assert same(x).shape == MaxPool2dSame(3, 2)(x).shape
    torch.testing.assert_close(converted(nn.MaxPool2d(3, 2, 1), config)(x), F.avg_pool2d(x, 3, 2, 1))
    torch.testing.assert_close(converted(nn.MaxPool1d(2), config)(x[0]), F.avg_pool1d(x[0], 2))
    dilated = nn.MaxPool2d(3, dilation=2)
    assert converted(dilated, CONFIG) is dilated
    with pytest.raises(UnsupportedModuleError, match="dilated"):
        converted(dilated, config)
    model = bcosify(timm.create_model("nasnetalarge", device="meta"), BcosConfig.v2())
    assert not [name for name, m in model.named_modules() if isinstance(m, nn.MaxPool2d)]


def test_global_pooling_keeps_its_output_size() -> None:
    pool = timm_layers.SelectAdaptivePool2d(output_size=2, pool_type="avg", flatten=True)
    x = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(BcosPool2d.from_pool(pool)(x), pool(x))
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Linear(32, 5)).double().eval()
    image = real_image(8, 2, torch.float64)
    expected = plain(normalized(image, CFG)).detach()
    model = bcosify(plain, PRESERVE)
    assert type(model[2]) is BcosLinearClassifier, "a classifier of 2 × 2 positions cannot act per position"
    torch.testing.assert_close(model(image).detach(), expected)
    single = nn.Sequential(
        nn.Conv2d(3, 8, 1), timm_layers.SelectAdaptivePool2d(pool_type="avg", flatten=True), nn.Linear(8, 5)
    )
    assert type(bcosify(single, PRESERVE)[2]) is BcosConvClassifier


# What is kept without a row, and what is refused.


class Scaled(nn.Module):
    """A residual block with a scale, as many have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.inner(x)


class Hidden(nn.Module):
    """A container that convolves by a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.kernel = nn.Parameter(torch.rand(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.conv2d(x, self.kernel))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias)


class WithNorm(nn.Linear):
    """A variety of a ruled type that also is a container."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class FrozenNorm(nn.Module):
    """A frozen batch norm, whose buffers shift and scale, with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.register_buffer("weight", torch.ones(8, 1, 1))
        self.register_buffer("bias", torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x * self.weight + self.bias)


class GeM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class CosineHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(x), F.normalize(self.weight))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own weight": (lambda: network(Hidden()), r"1: no rule for .*Hidden; pass rules=RULES \| \{Hidden: rule\}"),
    "weight standardization": (lambda: network(Standardized(8, 8, 1)), "1: no rule for .*Standardized"),
    "container of a ruled type": (lambda: network(WithNorm()), "1: no rule for .*WithNorm"),
    "GeM": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), GeM(), nn.Linear(8, 5)), "1: no rule for .*GeM"),
    "cosine head": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8), CosineHead()), "2: no rule for"),
    "log-softmax": (lambda: network().append(nn.LogSoftmax(1)), "4: .*LogSoftmax gives log-probabilities.*Identity"),
    "softmax": (lambda: network().append(nn.Softmax(1)), "Softmax follows the classifier.*Identity"),
    "sigmoid of logits": (lambda: network().append(nn.Sigmoid()), "Sigmoid follows the classifier"),
    "torch's layer": (lambda: network(nn.TransformerEncoderLayer(8, 2)), "1: .*EncoderLayer computes outside"),
    "frozen norm": (lambda: network(FrozenNorm()), "1: no rule for .*FrozenNorm"),
    "complete": (lambda: network(nn.ModuleList([nn.LPPool2d(2, 2)])), "1.0: no rule for .*LPPool2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_can_be_right_for_is_refused(name: str) -> None:
    build, line = REFUSED[name]
    model = build()
    before = {path: (type(m), id(m)) for path, m in model.named_modules()}
    with pytest.raises(UnsupportedModuleError, match=line):
        bcosify(model, CONFIG)
    assert {path: (type(m), id(m)) for path, m in model.named_modules()} == before


def test_containers_with_scales_are_kept_and_rules_can_be_given() -> None:
    x = real_image(8, 2, torch.float64)
    model = network(Scaled()).double().eval()
    expected = model(normalized(x, CFG)).detach()
    model = bcosify(model, PRESERVE)
    assert type(model[1].inner) is BcosConv2d
    torch.testing.assert_close(model(x).detach(), expected)
    assert_exact(model, x, 1e-10)
    kept = bcosify(network(Hidden()).double().eval(), CONFIG, rules=RULES | {Hidden: keep})
    assert_exact(kept, x, 1e-10)


def test_sigmoid_gates_are_kept() -> None:
    gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
    assert type(bcosify(network(gate), CONFIG)[1][1]) is nn.Sigmoid


@pytest.mark.parametrize("version", [torchvision.transforms.Normalize, torchvision.transforms.v2.Normalize])
def test_models_that_normalize_themselves(version: type[nn.Module]) -> None:
    inner = network().double().eval()
    x = real_image(8, 2, torch.float64)
    expected = inner(normalized(x, CFG)).detach()
    model = bcosify(nn.Sequential(version(**CFG), inner).eval(), BcosConfig.finetune(b=1, bias=True))
    torch.testing.assert_close(model(x).detach(), expected)
    assert_exact(model, x, 1e-10)
    assert [type(m) for m in model.modules() if isinstance(m, BcosStem | ImageReader)] == [ImageReader]
