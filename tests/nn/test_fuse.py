"""`fuse`: a network for inference that computes the same, from weights that are computed once."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos import BcosConfig, BcosConv2d, BcosLinear, ModelStateError, UncenteredBatchNorm2d, bcosify, fuse
from timm_bcos.conversion.fusing import norm_scale

# name, keywords, image size, norms that stay
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "resnet": ("bcosv2_resnet18", dict(layers=(1, 1, 1, 1)), 64, 0),
    "densenet": ("bcosv2_densenet121", dict(block_config=(2, 2, 2, 2)), 64, 1),  # the stem's, which pooling reads
    "convnext": ("bcosv2_convnext_tiny_bnu", dict(depths=(1, 1, 1, 1)), 64, 1),
    "layer norm": ("bcosv2_convnext_tiny", dict(depths=(1, 1, 1, 1)), 64, 0),
    "transformer": ("bcosv2_vitc_tiny_patch1_14", dict(depth=2), 224, 0),
    "MaxOut": ("bcos_resnet18", dict(layers=(1, 1, 1, 1)), 64, 0),
    "MaxOut and norms": ("bcosify", dict(arch="test_resnet", max_out=2, normalize_weight=True), 64, 0),
    "B = 1.5": ("bcosify", dict(arch="test_resnet", b=1.5), 64, 0),
    "B = 1, biases": ("bcosify", dict(arch="test_resnet", b=1, bias=True), 64, None),
    "groups": ("bcosify", dict(arch="test_efficientnet"), 64, 0),
    "fine-tuned": ("bcos_cifar_resnet20", {}, 32, 0),
}  # type: ignore[dict-item]


def network(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """With norms of either sign."""
    name, kwargs, size, _ = ARCHITECTURES[kind]
    torch.manual_seed(0)
    x = real_image(size, 2, dtype=torch.float64)
    model = enliven(timm.create_model(name, num_classes=5, **kwargs).double(), x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, UncenteredBatchNorm2d):
                module.weight.mul_(torch.randn_like(module.weight))
    return model.to(dtype), x.to(dtype)


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, UncenteredBatchNorm2d) for m in model.modules())


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_logits_and_explanations(kind: str) -> None:
    model, x = network(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    with torch.no_grad():
        assert distance(fused(x), model(x)) < 1e-12
    expected, found = timm_bcos.explain(model, x, 1), timm_bcos.explain(fused, x, 1)
    assert distance(found.weights, expected.weights) < 1e-10
    assert distance(found.bias + 1, expected.bias + 1) < 1e-10
    assert not found.violations and found.completeness_error.max() < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    left = ARCHITECTURES[kind][3]
    assert left is None or norms(fused) == left


@pytest.mark.parametrize("kind", ["resnet", "densenet", "transformer", "MaxOut"])
def test_in_float32(kind: str) -> None:
    model, x = network(kind, torch.float32)
    with torch.no_grad():
        assert distance(fuse(model)(x), model(x)) < 1e-5


# Layers against slow twins.

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(padding=1),
    "groups": dict(groups=2, stride=2, padding=1),
    "dilated": dict(dilation=2, padding=2),
    "reflect": dict(padding=1, padding_mode="reflect"),
    "same": dict(pad_same=True, stride=2),
    "bias": dict(bias=True),
    "MaxOut": dict(max_out=3),
    "MaxOut, groups": dict(max_out=2, groups=2, bias=True),
    "free rows": dict(normalize_weight=False, gamma=0.7),
}


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_take_scales_over(kind: str, b: float) -> None:
    layer = BcosConv2d(4, 6, 3, b=b, **{"gamma": 1.3, **CONVOLUTIONS[kind]}).double().eval()
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x, before, after = torch.rand(2, 4, 9, 9).double(), torch.randn(4).double(), torch.randn(6).double()
    expected = after[:, None, None] * layer(before[:, None, None] * x)
    assert distance(layer.folded(after, before)(x), expected) < 1e-12
    assert distance(layer.folded()(x), layer(x)) < 1e-12


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("kwargs", [{}, dict(max_out=2), dict(normalize_weight=False), dict(bias=True)])
def test_linear_layers(b: float, kwargs: dict[str, Any]) -> None:
    layer = BcosLinear(7, 5, b=b, gamma=0.8, **kwargs).double().eval()
    nn.init.normal_(layer.weight)
    x = torch.randn(3, 4, 7).double()
    assert distance(layer.folded()(x), layer(x)) < 1e-12


def test_the_scale_of_a_norm_is_what_it_does() -> None:
    norm = UncenteredBatchNorm2d(3).double().eval()
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.1, 3)
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(x * norm_scale(norm)[:, None, None], norm(x))


# What must not be folded.


class Crossed(nn.Module):
    """Two convolutions and norms, and somebody who reads what lies between them."""

    def __init__(self, read: Callable[["Crossed", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(self.read(self, y, self.norm(y)))


READS: dict[str, tuple[Callable[[Crossed, Tensor, Tensor], Tensor], int]] = {
    "only the norm": (lambda m, y, z: m.next(z), 0),
    "a sum reads the convolution": (lambda m, y, z: m.next(z + y), 1),
    "a cat reads the convolution": (lambda m, y, z: m.next(torch.cat([y[:, :4], z[:, 4:]], 1)), 1),
    "a method reads the convolution": (lambda m, y, z: m.next(z * y.mean((2, 3), keepdim=True).detach().exp()), 1),
    "the norm runs twice": (lambda m, y, z: m.next(m.norm(z)), 1),
    "the convolution runs twice": (lambda m, y, z: m.next(m.next(m.norm(m.next(z)))), 1),
}


@pytest.mark.parametrize("kind", READS)
def test_what_others_read_stays(kind: str) -> None:
    read, left = READS[kind]
    torch.manual_seed(0)
    x = real_image(32, 2, dtype=torch.float64)
    model = enliven(bcosify(Crossed(read).double(), BcosConfig.v2()).double(), x)
    fused = fuse(model)
    with torch.no_grad():
        assert distance(fused(x), model(x)) < 1e-12
    assert norms(fused) == left


def test_modules_that_somebody_watches_stay() -> None:
    model, x = network("resnet")
    seen: list[Tensor] = []
    block = model.layer1[0]
    for layer in (block.conv1, block.conv2):
        layer.register_forward_hook(lambda m, args, output: seen.append(output))
    fused = fuse(model)
    seen.clear()
    model(x), fused(x)
    assert norms(fused) == 2
    for found, expected in zip(seen[2:], seen[:2], strict=True):
        torch.testing.assert_close(found, expected)


# As an object.


def test_refusals() -> None:
    model, _ = network("resnet")
    fused = fuse(model)
    with pytest.raises(ModelStateError, match=r"has been fused for inference: train the one"):
        fused.train()
    assert not any(module.training for module in fused.modules())
    with pytest.raises(ModelStateError, match=r"has been fused for inference: train the one"):
        fused.layer1.train()
    fused.eval()
    with pytest.raises(ModelStateError, match="has been fused before"):
        fuse(fused)
    with pytest.raises(ModelStateError, match="is in training mode"):
        fuse(model.train())
    with pytest.raises(ModelStateError, match="ResNet is no B-cos model"):
        fuse(timm.create_model("resnet18").eval())
    assert not any(p.requires_grad for p in fused.parameters())


@torch.no_grad()
def test_formats() -> None:
    model, x = network("resnet", torch.float32)
    fused = fuse(model)
    expected = model(x)
    for same in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert distance(same(x), expected) < 1e-5
        torch.testing.assert_close(timm_bcos.explain(same, x).weights, timm_bcos.explain(model, x).weights)
    assert distance(torch.export.export(fused, (x,)).module()(x), expected) < 1e-5
    assert distance(torch.jit.trace(fused, x)(x), expected) < 1e-5
    assert distance(torch.jit.script(fused)(x), expected) < 1e-5
    assert distance(torch.fx.symbolic_trace(fused)(x), expected) < 1e-5
    torch._dynamo.reset()
    assert distance(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), expected) < 1e-5
    last = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    assert distance(last(x.to(memory_format=torch.channels_last)), expected) < 1e-5
    assert distance(fused.double()(x.double()).float(), expected) < 1e-5


def test_exporting_to_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for kind in ("densenet", "B = 1.5"):
        model, x = network(kind, torch.float32)
        fused = fuse(model)
        torch.onnx.export(fused, (x,), tmp_path / "x.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), fused(x).detach(), rtol=1e-3, atol=1e-4)


def test_explainers_of_fused_networks_export() -> None:
    model, x = network("fine-tuned", torch.float32)
    program = timm_bcos.export_explainer(fuse(model), x)
    logits, weights, _ = program.module()(x, torch.tensor([1, 2]))
    expected = timm_bcos.explain(model, x, torch.tensor([1, 2]))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-3, atol=1e-5)
