"""Explaining touches nothing that anybody else can see: other threads, other models, what follows an exception."""

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos.dynamic_linear import mode as mode_module


def converted(bias: bool = True) -> nn.Module:
    """Norms with shifts, biases, position embeddings: constants of every kind."""
    x = real_image(160, 1)
    model = timm.create_model("bcosify", arch="test_vit", bias=bias)
    return enliven(model, x).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return converted()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return real_image(160, 3)


def tensors_of(explanation: timm_bcos.Explanation) -> dict[str, Tensor]:
    return {name: getattr(explanation, name) for name in ("logits", "weights", "bias", "constant_bias")}


def assert_same(found: timm_bcos.Explanation, expected: timm_bcos.Explanation) -> None:
    for name, value in tensors_of(expected).items():
        assert torch.equal(getattr(found, name), value), name


def state(model: nn.Module) -> list[Any]:
    """What a user of the model could notice."""
    parameters = [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return [parameters, modules, torch.is_grad_enabled(), len(torch.overrides._get_current_function_mode_stack())]


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """All at once: each waits until the others are ready."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def test_eight_threads_explain_one_model(model: nn.Module, images: Tensor) -> None:
    before = state(model)
    targets = list(range(8))
    layers = [None, "blocks.1.mlp.fc2"] * 4
    expected = [timm_bcos.explain(model, images, t, layer=layer) for t, layer in zip(targets, layers, strict=True)]
    jobs = [
        lambda t=t, layer=layer: timm_bcos.explain(model, images, t, layer=layer)
        for t, layer in zip(targets, layers, strict=True)
    ]
    for _ in range(3):
        for found, wanted in zip(in_threads(jobs), expected, strict=True):
            assert_same(found, wanted)
    assert state(model) == before


def test_explaining_beside_inference_and_training(model: nn.Module, images: Tensor) -> None:
    """One thread explains, one infers with gradients, one trains a copy, and one uses explanation mode as it is."""
    learner = copy.deepcopy(model).train()
    twin = copy.deepcopy(learner)

    def explain() -> list[timm_bcos.Explanation]:
        return [timm_bcos.explain(model, images, i) for i in range(6)]

    def infer() -> list[Tensor]:
        inputs = [images.clone().requires_grad_() for _ in range(6)]
        return [torch.autograd.grad(model(x).square().sum(), x)[0] for x in inputs]

    def train(network: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
        return network.state_dict()

    def rows() -> list[Tensor]:
        found = []
        for i in range(6):
            x = timm_bcos.encode_image(images, 3).requires_grad_()
            with timm_bcos.explanation_mode(model):
                found.append(torch.autograd.grad(model(x)[:, i].sum(), x)[0])
        return found

    before = state(model)
    explained, inferred, trained, linear = in_threads([explain, infer, lambda: train(learner), rows])
    for found, wanted in zip(explained, explain(), strict=True):
        assert_same(found, wanted)
    assert all(map(torch.equal, inferred, infer()))
    assert all(map(torch.equal, linear, rows()))
    for name, value in train(twin).items():
        assert torch.equal(trained[name], value), name
    assert state(model) == before


class Explains(nn.Module):
    """A layer that explains another network while its own is explained."""

    def __init__(self, other: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.others = [other]
        self.images = images
        self.found: list[timm_bcos.Explanation] = []

    def forward(self, x: Tensor) -> Tensor:
        self.found.append(timm_bcos.explain(self.others[0], self.images))
        return x


def test_explanations_nest(model: nn.Module, images: Tensor) -> None:
    inner = enliven(timm.create_model("bcos_cnn9"), real_image(32, 2))
    outer = copy.deepcopy(model)
    expected, expected_inner = timm_bcos.explain(outer, images), timm_bcos.explain(inner, real_image(32, 2))
    outer.norm = nn.Sequential(outer.norm, Explains(inner, real_image(32, 2))).eval()
    assert_same(timm_bcos.explain(outer, images), expected)
    assert_same(outer.norm[1].found[0], expected_inner)
    with timm_bcos.explanation_mode(model):
        assert_same(timm_bcos.explain(inner, real_image(32, 2)), expected_inner)


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("here"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["patch_embed.norm", "blocks.0.ls1", "blocks.1.mlp.act", "norm", "head_drop"])
@pytest.mark.parametrize("layer", [None, "blocks.1.mlp.fc1"])
def test_an_exception_leaves_everything_as_it_was(
    model: nn.Module, images: Tensor, place: str, error: BaseException, layer: str | None
) -> None:
    broken = copy.deepcopy(model)
    parent, _, name = place.rpartition(".")
    setattr(broken.get_submodule(parent), name, Fails(error).eval())
    before = state(broken)
    if layer is not None and place in ("norm", "head_drop"):
        layer = None  # these come after it, and fail all the same
    with pytest.raises(type(error)):
        timm_bcos.explain(broken, images, layer=layer)
    assert state(broken) == before
    assert mode_module._ACTIVE.get() is None


def test_exceptions_in_the_backward_pass(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(model)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", interrupted)
        with pytest.raises(KeyboardInterrupt):
            timm_bcos.explain(model, images)
    assert state(model) == before
    assert mode_module._ACTIVE.get() is None


def test_compiled_and_checkpointed_networks(model: nn.Module, images: Tensor) -> None:
    """Both are explained as written, by clones: the caller's modules stay compiled and go on checkpointing."""
    expected = timm_bcos.explain(model, images)
    network = copy.deepcopy(model)
    network.set_grad_checkpointing()
    for block in network.blocks:
        block.compile(backend="eager")
    compiled = torch.compile(network, backend="eager")
    before = state(network)
    assert_same(timm_bcos.explain(network, images), expected)
    assert_same(timm_bcos.explain(compiled, images), expected)
    assert state(network) == before
    assert network.grad_checkpointing is True


class Shared(nn.Module):
    """One activation that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.again = self.conv2
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.again(self.conv2(self.act(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def test_reused_modules_are_told_apart_by_name(images: Tensor) -> None:
    config = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))
    model = timm_bcos.bcosify(Shared(), config).eval()
    first, second = (timm_bcos.explain(model, images, 0, layer=name, position=(3, 3)) for name in ("conv2", "again"))
    z = model.act(model.conv1(images))
    torch.testing.assert_close(first.logits, model.conv2(z)[:, :, 3, 3].detach())
    torch.testing.assert_close(second.logits, model.conv2(model.conv2(z))[:, :, 3, 3].detach())
    with pytest.raises(timm_bcos.TargetError, match="layer 'act' runs 2 times"):
        timm_bcos.explain(model, images, layer="act")


@pytest.mark.parametrize(
    ("arch", "layer", "channels"),
    [("test_convnext", "stages.0.blocks.0.mlp.fc1", None), ("swin_tiny_patch4_window7_224", "patch_embed.proj", 96)],
)
def test_units_of_layers_of_another_format(arch: str, layer: str, channels: int | None) -> None:
    """ConvNeXt's MLPs compute in NHWC within an NCHW network, Swin's patch embedding the other way round."""
    model = timm.create_model("bcosify", arch=arch).eval()
    x = real_image(224 if "swin" in arch else 96)
    explanation = timm_bcos.explain(model, x, 1, layer=layer)
    module = model.get_submodule(layer)
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(x)
    handle.remove()
    units = channels or module.out_features
    assert explanation.logits.shape == (1, units)
    unit = outputs[0][..., 1] if channels is None else outputs[0][:, 1]
    torch.testing.assert_close(explanation.logit[0], unit.max().detach())


def test_wrong_targets(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(timm_bcos.TargetError, match="target='cat': give an int"):
        timm_bcos.explain(model, images, "cat")
    for target in (True, [True, False, True], 1.5, [1, [2]], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(timm_bcos.TargetError, match="give an int, or one int for each of the 3 images"):
            timm_bcos.explain(model, images, target)
    with pytest.raises(timm_bcos.InputError, match="expected a model first, then images, got Tensor"):
        timm_bcos.explain(images, model)  # type: ignore[arg-type]
    with pytest.raises(timm_bcos.InputError, match="expected a model first"):
        timm_bcos.check(None)  # type: ignore[arg-type]
    with pytest.raises(timm_bcos.TargetError, match="layer='' is the model itself"):
        timm_bcos.explain(model, images, layer="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timm_bcos.explain(model, images, [1, 2, 3]).target.tolist() == [1, 2, 3]


def test_neurons_on_maps_need_both_coordinates() -> None:
    model, x = timm.create_model("bcos_cnn9").eval(), real_image(32)
    assert timm_bcos.explain(model, x, 0, layer="features.2", position=(1, 2)).position.tolist() == [[1, 2]]
    for position in (3, True, (1, 2, 3), "middle"):
        with pytest.raises(timm_bcos.TargetError, match=r"give \(row, column\)"):
            timm_bcos.explain(model, x, 0, layer="features.2", position=position)


def test_only_explanations_of_one_kind_are_stacked() -> None:
    model, x = timm.create_model("bcos_cnn9").eval(), real_image(32)
    logit, neuron = timm_bcos.explain(model, x, 0), timm_bcos.explain(model, x, 0, layer="features.2")
    stacked = timm_bcos.Explanation.stack([logit, timm_bcos.explain(model, x, 1)])
    assert stacked.target.tolist() == [0, 1]
    with pytest.raises(timm_bcos.InputError, match=r"different outputs: .*features\.2"):
        timm_bcos.Explanation.stack([logit, neuron])
    with pytest.raises(timm_bcos.InputError, match="no explanations"):
        timm_bcos.Explanation.stack([])
