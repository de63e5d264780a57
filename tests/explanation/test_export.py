"""The network, and its explanation, in torch's and ONNX's formats."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

import timm_bcos
from tests.helpers import enliven, real_image
from tests.helpers.slow import slow_but_for
from timm_bcos import InputError

KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("bcos_cnn9", {}, 32),
    ("bcosify", dict(arch="test_resnet", b=1.5), 64),
    ("bcosify", dict(arch="test_efficientnet"), 64),
    ("bcosify", dict(arch="test_vit"), 160),
]
IDS = [kwargs.get("arch", name) for name, kwargs, _ in KINDS]


def create(name: str, kwargs: dict[str, Any], size: int = 32) -> nn.Module:
    return enliven(timm.create_model(name, num_classes=5, **kwargs), real_image(size, 2))


def batch(size: int) -> Tensor:
    return torch.cat([real_image(size, 3), real_image(size, 2).flip(-1)])


@pytest.mark.parametrize(("name", "kwargs", "size"), KINDS, ids=IDS)
def test_torch_export_with_any_batch_size(name: str, kwargs: dict[str, Any], size: int) -> None:
    model, x = create(name, kwargs, size), batch(size)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("kind", slow_but_for(["test_efficientnet"], IDS))
def test_torch_compile_without_a_graph_break(kind: str) -> None:
    name, kwargs, size = KINDS[IDS.index(kind)]
    model, x = create(name, kwargs, size), batch(size)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # fullgraph refuses graph breaks
    torch.testing.assert_close(compiled(x), model(x))
    explanation = timm_bcos.explain(compiled, x, 1)  # as the network was before
    torch.testing.assert_close(explanation.weights, timm_bcos.explain(model, x, 1).weights)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", slow_but_for(["test_vit"], IDS))
def test_onnx_with_any_batch_size(kind: str, tmp_path: Path) -> None:
    name, kwargs, size = KINDS[IDS.index(kind)]
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, path = create(name, kwargs, size), batch(size), tmp_path / "model.onnx"
    torch.onnx.export(model, (x[:2],), path, dynamo=True, dynamic_shapes=({0: Dim("batch", min=1)},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", slow_but_for(["bcos_cnn9", "test_vit"], IDS))
def test_exported_explanations(kind: str) -> None:
    name, kwargs, size = KINDS[IDS.index(kind)]
    model, x = create(name, kwargs, size), batch(size)
    learning = [p.requires_grad for p in model.parameters()]
    program = timm_bcos.export_explainer(model, x[:2])
    assert [p.requires_grad for p in model.parameters()] == learning
    predicted = program.module()(x, torch.full((len(x),), -1))
    chosen = program.module()(x[:1], torch.tensor([3]))
    for found, expected in ((predicted, timm_bcos.explain(model, x)), (chosen, timm_bcos.explain(model, x[:1], 3))):
        for a, b in zip(found, (expected.logits, expected.weights, expected.contribution_map), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_saved_explainer_needs_torch_alone(tmp_path: Path) -> None:
    model, x = create("bcos_cnn9", {}), batch(32)
    torch.export.save(timm_bcos.export_explainer(model, x[:2]), tmp_path / "explainer.pt2")
    torch.save((x, timm_bcos.explain(model, x, 1).weights), tmp_path / "expected.pt")
    code = """
import sys, torch
x, expected = torch.load("expected.pt")
logits, weights, contributions = torch.export.load("explainer.pt2").module()(x, torch.ones(len(x), dtype=torch.int64))
assert torch.allclose(weights, expected), (weights - expected).abs().max()
assert "timm" not in sys.modules and "timm_bcos" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(timm_bcos.ModelStateError, match="eval"):
        timm_bcos.export_explainer(timm.create_model("bcos_cnn9"), torch.rand(2, 3, 32, 32))


def test_one_example_image_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2"):
        timm_bcos.export_explainer(create("bcos_cnn9", {}), real_image(32))
