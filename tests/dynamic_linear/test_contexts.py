"""Every public entry gives the same numbers, bitwise, whatever autograd's switches say and whoever calls it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from timm_bcos import explain

Numbers = list[Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("bcos_cifar_resnet20", pretrained=True).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def numbers(found: timm_bcos.Explanation) -> Numbers:
    return [found.weights, found.bias, found.logits, found.target, found.completeness_error]


class Wrapped(nn.Module):
    """A model inside a module of somebody else's, as Lightning's are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def _concepts(model: nn.Module, x: Tensor) -> Numbers:
    channels = 64
    concepts = timm_bcos.Concepts("layer3", torch.eye(channels)[:4])
    found = timm_bcos.explain_concepts(model, x, concepts, 3)
    return [found.shares, found.rest, found.other, *numbers(found.explanation)]


ENTRIES: dict[str, Callable[[nn.Module, Tensor], Numbers]] = {
    "explain": lambda m, x: numbers(explain(m, x)),
    "one class": lambda m, x: numbers(explain(m, x, 3)),
    "chunk": lambda m, x: numbers(explain(m, x, 3, chunk=2)),
    "layer": lambda m, x: numbers(explain(m, x, 3, layer="layer2")),
    "position": lambda m, x: numbers(explain(m, x, 3, layer="layer2", position=(2, 3))),
    "region": lambda m, x: numbers(explain(m, x, 3, layer="layer2", region=(4, 4, 20, 20))),
    "direction": lambda m, x: numbers(explain(m, x, torch.linspace(-1, 1, 10))),
    "targets": lambda m, x: [n for e in timm_bcos.explain_targets(m, x, top=2) for n in numbers(e)],
    "contrast": lambda m, x: numbers(timm_bcos.contrast(m, x, 3, 5)),
    "shift averaged": lambda m, x: numbers(explain(timm_bcos.ShiftAveraged(m, 2).eval(), x, 3)),
    "attribute": lambda m, x: [timm_bcos.attribute(m, x, 3, "bcos")],
    "check": lambda m, x: [torch.tensor([c.completeness_error, c.logit_shift]) for c in [timm_bcos.check(m, x)]],
}


@contextmanager
def _switched_off() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": _switched_off,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly detection": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_are_those_outside(entry: str, context: str, model: nn.Module, x: Tensor) -> None:
    expected = ENTRIES[entry](model, x)
    with CONTEXTS[context]():
        found = ENTRIES[entry](model, x)
    for number, other in zip(found, expected, strict=True):
        assert torch.equal(number, other)
    assert any(bool(number.any()) for number in found)


def test_decorated_functions(model: nn.Module, x: Tensor) -> None:
    expected = numbers(explain(model, x, 3))
    for decorator in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        for number, other in zip(decorator(lambda: numbers(explain(model, x, 3)))(), expected, strict=True):
            assert torch.equal(number, other)


@pytest.mark.parametrize("entry", ["explain", "contrast", "layer"])
def test_threads(entry: str, model: nn.Module, x: Tensor) -> None:
    expected, found = ENTRIES[entry](model, x), {}

    def run(i: int) -> None:
        with torch.no_grad() if i % 2 else nullcontext():
            found[i] = ENTRIES[entry](model, x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for numbers_of_thread in found.values():
        for number, other in zip(numbers_of_thread, expected, strict=True):
            torch.testing.assert_close(number, other, rtol=1e-6, atol=1e-6)
    assert len(found) == 3


class Explained(torch.utils.data.Dataset):
    """Explains in the workers of a loader, where no gradients are wanted."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return explain(self.model, self.x[index : index + 1], 3).weights[0]


def test_workers_of_a_loader(model: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(1)  # a forked worker inherits no pool of threads
    loader = torch.utils.data.DataLoader(Explained(model, x), batch_size=3, num_workers=1)
    (found,) = list(loader)
    torch.testing.assert_close(found, explain(model, x, 3).weights, rtol=1e-4, atol=1e-6)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "module": lambda m: Wrapped(m),
    "twice": lambda m: Wrapped(Wrapped(m)),
    "sequential": nn.Sequential,
    "DataParallel": lambda m: nn.DataParallel(m),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_explained_as_bare_ones(wrapper: str, model: nn.Module, x: Tensor) -> None:
    expected, found = explain(model, x), explain(WRAPPERS[wrapper](model).eval(), x)
    for number, other in zip(numbers(found), numbers(expected), strict=True):
        assert torch.equal(number, other)
    assert found.logit_bias == expected.logit_bias
    assert found.probability_kind == expected.probability_kind


def test_the_caller_s_tensors_stay_as_they_are(model: nn.Module, x: Tensor) -> None:
    image = x.clone().requires_grad_()
    explain(model, image)
    assert image.grad is None and torch.equal(image.detach(), x)
    assert all(p.grad is None for p in model.parameters())


def test_channels_last_and_half(model: nn.Module, x: Tensor) -> None:
    expected = explain(model, x, 3)
    found = explain(model, x.to(memory_format=torch.channels_last), 3)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)
    bfloat = timm.create_model("bcos_cifar_resnet20", pretrained=True).eval().bfloat16()
    half = explain(bfloat, x, 3)
    assert half.weights.dtype is torch.bfloat16
    cosine = torch.cosine_similarity(half.weights.float().flatten(1), expected.weights.flatten(1))
    assert cosine.min() > 0.9


def test_outputs_that_a_later_function_changes_in_place() -> None:
    """`layer=` explains what the layer returned, not what became of it."""
    config = timm_bcos.BcosConfig.finetune(b=1, bias=True)
    model = timm_bcos.bcosify(timm.create_model("resnet18", layers=(1, 1, 1, 1)), config).eval()
    x, seen = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    handle = model.layer1[0].bn2.register_forward_hook(lambda m, a, y: seen.update(y=y.detach().clone()))
    model(x)
    handle.remove()
    row, column = divmod(int(seen["y"][0, 3].argmin()), seen["y"].shape[-1])
    found = explain(model, x, 3, layer="layer1.0.bn2", position=(row, column))
    torch.testing.assert_close(found.logit[0], seen["y"][0, 3, row, column])
    assert found.completeness_error.max() < 1e-4
