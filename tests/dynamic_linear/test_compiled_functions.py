"""Functions and modules that `torch.compile` has made are explained as they were written."""

import copy
import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos


def written(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z) + 0.3


class Model(nn.Module):
    """A plain function between two layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.fc, self.function = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.conv(x)).mean((2, 3)))


def converted(function: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm_bcos.bcosify(Model(function), timm_bcos.BcosConfig(mean=(0.0,), std=(1.0,))).double().eval()


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance  # type: ignore[attr-defined]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_function_in_a_forward_pass(backend: str, images: Tensor) -> None:
    plain, compiled = converted(written), converted(torch.compile(written, backend=backend))
    compiled.load_state_dict(plain.state_dict())
    expected, found = timm_bcos.explain(plain, images, 1), timm_bcos.explain(compiled, images, 1)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.bias, expected.bias)
    assert timm_bcos.check(compiled, images).exact
    assert stance() == "default"


def test_compiled_layers_and_what_is_inside_them() -> None:
    model = timm.create_model("bcos_resnet18", num_classes=5).eval()
    x = torch.rand(2, 3, 64, 64)
    compiled = copy.deepcopy(model)
    compiled.layer1 = torch.compile(compiled.layer1, backend="eager")
    compiled.layer2.compile(backend="eager")
    for plain_name, name in {"layer1": "layer1", "layer1.0": "layer1._orig_mod.0", "layer2.0": "layer2.0"}.items():
        expected = timm_bcos.explain(model, x, 1, layer=plain_name, position=(0, 0))
        found = timm_bcos.explain(compiled, x, 1, layer=name, position=(0, 0))
        assert torch.equal(found.weights, expected.weights), name


def test_the_stance_of_the_compiler_is_given_back_by_the_last_of_several_threads(images: Tensor) -> None:
    """Each thread waits inside its forward pass until the other is there, and the first leaves before the second."""
    both, first_is_done = threading.Barrier(2), threading.Event()
    found: dict[Any, Any] = {}

    def waiting(is_first: bool) -> Any:
        calls: list[int] = []

        def function(z: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 1:
                both.wait(60)
                if not is_first:
                    first_is_done.wait(60)
                    found["stance inside"] = stance()
            return z

        return function

    def run(is_first: bool) -> None:
        found[is_first] = timm_bcos.explain(converted(waiting(is_first)), images, 1)
        if is_first:
            first_is_done.set()

    torch.compile(written, backend="eager")  # loads the compiler
    threads = [threading.Thread(target=run, args=(is_first,)) for is_first in (True, False)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert found["stance inside"] == "force_eager"
    assert stance() == "default"
    assert torch.equal(found[True].weights, found[False].weights)
