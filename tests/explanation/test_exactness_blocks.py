"""Blocks of many kinds: `check` gives the right verdict, `explain` sums up or warns, and both name a place."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_bcos
from tests.helpers import exactness_blocks as blocks

Function = Callable[[Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


class Behind(nn.Module):
    """A convolution, the block, a classifier; nothing in it is constant but the block's."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.block = Block(function)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.conv(x))
        return self.head(y.mean((2, 3)) if y.ndim == 4 else y)


class Before(nn.Module):
    """Changes the image before its first layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function, self.conv, self.head = function, nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.function(x))).mean((2, 3)))


def build(function: Function, kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    config = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.5,), std=(0.5,))
    rules = timm_bcos.RULES | {Block: timm_bcos.keep, Before: timm_bcos.keep}
    return timm_bcos.bcosify(kind(function).double(), config, rules=rules).eval()


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


EXACT = [(Behind, name) for name in blocks.EXACT] + [(Before, name) for name in blocks.READS_EXACT]
INEXACT = [(Behind, name) for name in blocks.INEXACT] + [(Before, name) for name in blocks.READS_INEXACT]


def function_of(kind: type[nn.Module], name: str) -> Function:
    tables = (blocks.EXACT, blocks.INEXACT) if kind is Behind else (blocks.READS_EXACT, blocks.READS_INEXACT)
    return (tables[0] | tables[1])[name]


@pytest.mark.parametrize(("kind", "name"), EXACT)
def test_exact_blocks(kind: type[nn.Module], name: str) -> None:
    model, x = build(function_of(kind, name), kind), images()
    verdict = timm_bcos.check(model, x)
    assert verdict.exact, verdict
    with warnings.catch_warnings():
        warnings.simplefilter("error", timm_bcos.InexactWarning)
        found = timm_bcos.explain(model, x)
    assert found.completeness_error.max() < 1e-9
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(x), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("kind", "name"), INEXACT)
def test_inexact_blocks(kind: type[nn.Module], name: str) -> None:
    model, x = build(function_of(kind, name), kind), images()
    verdict = timm_bcos.check(model, x)
    assert not verdict.exact
    assert verdict.violations and verdict.breaks_at is not None
    with pytest.warns(timm_bcos.InexactWarning):
        timm_bcos.explain(model, x)


@pytest.mark.parametrize(
    "name", ["recurrence from a zero state", "o[i].copy_(2 * z[i])", "gru", "addcmul C", "where C"]
)
def test_weights_are_those_of_each_image_alone(name: str) -> None:
    model, x = build(blocks.EXACT[name], Behind), images(3)
    batch = timm_bcos.explain(model, x, 1)
    for i in range(3):
        alone = timm_bcos.explain(model, x[i : i + 1], 1)
        torch.testing.assert_close(batch[i].weights, alone.weights)
        torch.testing.assert_close(batch[i].bias, alone.bias)


def test_a_dead_model_is_said_to_be_one() -> None:
    verdict = timm_bcos.check(build(lambda z: z * 0, Behind), images())
    assert not verdict.exact
    assert any("its output is 0 for every image" in str(violation) for violation in verdict.violations)
    assert verdict.breaks_at == "block"


def test_check_without_images_measures_a_batch() -> None:
    model = build(lambda z: z * z.mean(0, keepdim=True).sigmoid(), Behind)
    model.pretrained_cfg = dict(input_size=(3, 12, 12))
    verdict = timm_bcos.check(model)
    assert not verdict.exact
    assert any(violation.kind == "images" for violation in verdict.violations), verdict
    assert verdict.breaks_at == "block"


def test_constants_of_tiny_size_go_to_the_right_image() -> None:
    """Positions before images: what the layout does not tell is found image by image."""
    steps = 1e-7 * torch.arange(144, dtype=torch.float64)[:, None, None]

    def function(z: Tensor) -> Tensor:
        tokens = z.flatten(2).permute(2, 0, 1)  # (L, N, C), L a multiple of N
        return (tokens * (1 + tokens.detach().mean(0, keepdim=True)) + steps).permute(1, 2, 0).unflatten(2, (12, 12))

    model, x = build(function, Behind), images()
    batch, alone = timm_bcos.explain(model, x, 1), timm_bcos.explain(model, x[:1], 1)
    torch.testing.assert_close(batch.bias[0], alone.bias[0], rtol=1e-9, atol=0)
    assert batch.completeness_error.max() < 1e-10


@pytest.mark.parametrize("name", blocks.SPELLINGS)
def test_spellings_of_one_function_have_one_explanation(name: str) -> None:
    one, other = (timm_bcos.explain(build(function, Behind), images(), 1) for function in blocks.SPELLINGS[name])
    scale = other.weights.abs().max()
    assert (one.weights - other.weights).abs().max() < 1e-9 * scale
    assert (one.bias - other.bias).abs().max() < 1e-9


STANDARDIZED: dict[str, Function] = {
    "std": lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-5),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
}


@pytest.mark.parametrize("name", STANDARDIZED)
def test_standardized_images_are_read_exactly_in_float32(name: str) -> None:
    model, x = build(STANDARDIZED[name], Before).float(), images().float()
    assert timm_bcos.check(model, x).exact
    with warnings.catch_warnings():
        warnings.simplefilter("error", timm_bcos.InexactWarning)
        assert timm_bcos.explain(model, x).completeness_error.max() < 1e-4


CULPRITS: dict[str, Function] = {
    "sigmoid": lambda z: z.mean((2, 3)).sigmoid(),
    "torch.no_grad": torch.no_grad()(lambda z: z * 2),
}


@pytest.mark.parametrize("name", CULPRITS)
def test_errors_name_what_left_the_path(name: str) -> None:
    with pytest.raises(timm_bcos.TargetError, match=f"ends in {name}"):
        timm_bcos.explain(build(CULPRITS[name], Behind), images())
