"""How torch and timm train: DDP, FSDP2, moving averages, shared memory, every optimizer."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import enliven, four_photos, real_image
from timm_bcos import (
    BcosConfig,
    BcosConv2d,
    BcosLinear,
    ExplanationDistillationTask,
    GuidedClassificationTask,
    ModelStateError,
    UncenteredBatchNorm2d,
    bcosify,
    dynamic_weights,
)
from timm_bcos.distributed import distributed_map, process_group

STEPS = 3


def network(norm: bool = False) -> nn.Sequential:
    """Small, of every kind of layer; a batch norm would see other batches in two processes."""
    torch.manual_seed(0)
    layers = [BcosConv2d(3, 6, 3, padding=1), BcosConv2d(6, 6, 3, groups=6, b=1.5), BcosConv2d(6, 4, 1, max_out=2)]
    norms = [UncenteredBatchNorm2d(6)] if norm else []
    return nn.Sequential(layers[0], *norms, *layers[1:], nn.Flatten(), BcosLinear(4 * 4 * 4, 2)).double()


def images() -> Tensor:
    return torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, x: Tensor, whole: nn.Module | None = None) -> None:
    """A few steps; in evaluation mode in between, as training with validation is."""
    optimizer = torch.optim.AdamW((whole or model).parameters(), 0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        model.train()


def guided(norm: bool) -> GuidedClassificationTask:
    """A task with a loss on W(x) of a converted model, whose norms are synchronized if they use batches."""
    torch.manual_seed(0)
    model = enliven(
        bcosify(timm.create_model("test_resnet", num_classes=3), BcosConfig.finetune(b=1.5)), real_image(32)
    )
    return GuidedClassificationTask(nn.SyncBatchNorm.convert_sync_batchnorm(model).double()).train(norm)


def distilled(norm: bool) -> ExplanationDistillationTask:
    return ExplanationDistillationTask(guided(norm).trainable_module, guided(False).trainable_module).train(norm)


def explained_gradients(task: nn.Module, rank: slice) -> dict[str, Tensor]:
    """Gradients of the parameters, by a batch of four photos or two of them."""
    x, labels = four_photos(32).double()[rank], torch.tensor([0, 2, 1, 0])[rank]
    regions = ([[0, 0, 20, 16]] * 4)[rank]
    arguments = (regions,) if isinstance(task, GuidedClassificationTask) else ()
    task(x, labels, *arguments)["loss"].backward()
    return {name.rpartition("module.")[2]: p.grad for name, p in task.trainable_module.named_parameters()}


def compiled(norm: bool) -> GuidedClassificationTask:
    """Of which torch compiles the evaluation."""
    task = guided(norm)
    task.compile(backend="eager")
    return task


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return bcosify(timm.create_model("test_vit", num_classes=3, img_size=32), BcosConfig.finetune(b=1.5))


def losses(model: nn.Module, x: Tensor, labels: Tensor) -> list[float]:
    """Of each step of a training."""
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


EXPLAINED = {
    f"{kind.__name__}, {'synchronized norms' if norm else 'running statistics'}": (kind, norm)
    for kind, norm in ((guided, False), (guided, True), (distilled, False), (distilled, True), (compiled, False))
}


def _work(rank: int, folder: str) -> None:
    """All that two processes compute in this module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, (kind, norm) in EXPLAINED.items():
        task = kind(norm)
        task.prepare_distributed()
        found[name] = explained_gradients(task, slice(2 * rank, 2 * rank + 2))
    for kind in ("DDP", "FSDP2"):
        model, x = network(), images().chunk(2)[rank]
        if kind == "DDP":
            train(DistributedDataParallel(model), x)
        else:
            for layer in model:
                if list(layer.parameters()):
                    fully_shard(layer)
            train(fully_shard(model), x)
        state = model.state_dict()
        found[kind] = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state.items()}
    whole, own = transformer(), slice(2 * rank, 2 * rank + 2)
    for block in whole.blocks:
        fully_shard(block)
    found["losses"] = torch.tensor(losses(fully_shard(whole), four_photos(32)[own], torch.tensor([0, 2, 1, 0])[own]))
    with process_group() as processes:
        found["shared"] = [str(processes), *distributed_map(lambda items: ((rank, item) for item in items), range(3))]
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # without the interpreter's shutdown, in which FSDP2 of plain layers aborts now and then, too


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has computed."""
    folder = tmp_path_factory.mktemp("distributed")
    multiprocessing.spawn(_work, (str(folder),), 2)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@needs_gloo
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_as_one_does(kind: str, found: list[dict[str, Any]]) -> None:
    alone = network()
    train(alone, images())
    start = network().state_dict()
    for name, value in alone.state_dict().items():
        assert not torch.allclose(value, start[name], atol=1e-3)
        torch.testing.assert_close(found[0][kind][name], value)


@needs_gloo
def test_work_is_shared_in_a_group_that_is_open(found: list[dict[str, Any]]) -> None:
    items = [(0, 0), (1, 1), (0, 2)]
    assert [one["shared"] for one in found] == [[f"process {rank} of 2", *items] for rank in range(2)]


@needs_gloo
def test_sharded_model(found: list[dict[str, Any]]) -> None:
    """FSDP2 of a converted transformer; the mean of the processes' losses is that of the joint batch."""
    alone = torch.tensor(losses(transformer(), four_photos(32), torch.tensor([0, 2, 1, 0])))
    assert alone[-1] < alone[0] - 0.01
    torch.testing.assert_close((found[0]["losses"] + found[1]["losses"]) / 2, alone, rtol=1e-4, atol=1e-5)


@needs_gloo
@pytest.mark.parametrize("name", EXPLAINED)
def test_losses_on_explanations_in_two_processes(name: str, found: list[dict[str, Any]]) -> None:
    """Gradients of each process are those of one process by the joint batch."""
    kind, norm = EXPLAINED[name]
    alone = explained_gradients(kind(norm), slice(0, 4))
    assert sum(bool(gradient.any()) for gradient in alone.values()) > len(alone) / 2
    for gradients in found:
        own = gradients[name]
        assert own.keys() == alone.keys()
        for parameter, gradient in alone.items():
            torch.testing.assert_close(own[parameter], gradient, rtol=1e-8, atol=1e-12)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.usefixtures("alone")
def test_options_of_distributed_data_parallel() -> None:
    alone = explained_gradients(guided(False), slice(0, 2))
    task = guided(False)
    task.prepare_distributed(find_unused_parameters=True)
    task.trainable_module.module.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    found = explained_gradients(task, slice(0, 2))
    assert found.pop("unused") is None
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)
    fixed = DistributedDataParallel(guided(False).trainable_module, static_graph=True)
    with pytest.raises(ModelStateError, match="static_graph=True"):
        dynamic_weights(fixed, four_photos(32).double())
    with pytest.raises(ModelStateError, match="FSDP2"):
        dynamic_weights(fully_shard(guided(False).trainable_module), four_photos(32).double())


def _change(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.neg_()


def test_weights_in_shared_memory() -> None:
    """Which another process changes: Hogwild."""
    model, x = network().share_memory().eval(), images()
    with torch.no_grad():
        before = model(x)
        process = multiprocessing.get_context("spawn").Process(target=_change, args=(model[0],))
        process.start()
        process.join()
        after = model(x)
    assert process.exitcode == 0 and not torch.allclose(after, before)
    same = network().eval()
    _change(same[0])
    torch.testing.assert_close(after, same(x).detach())


def test_moving_averages() -> None:
    """Evaluated while they move, by timm's own writes."""
    model, x = network(norm=True), images()
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            before = ema.module.eval()(x)
            ema.update(model, step)
            after, fresh = ema.module(x), network(norm=True).eval()
            fresh.load_state_dict(ema.module.state_dict())
            torch.testing.assert_close(after, fresh(x), rtol=0, atol=0)
        assert not torch.equal(after, before)


def optimizers() -> list[str]:
    """timm's that are installed, and torch's fused ones."""
    return [*timm.optim.list_optimizers(exclude_filters=["fused*", "bnb*"]), "sgd fused", "adam fused", "adamw fused"]


@pytest.mark.parametrize("name", optimizers())
def test_inference_sees_every_optimizers_steps(name: str) -> None:
    model, x = network(norm=True), images()
    name, _, fused = name.partition(" ")
    kwargs = dict(fused=True) if fused else {}
    optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=0.05, weight_decay=0.0, **kwargs)
    for _ in range(STEPS):
        with torch.no_grad():
            before = model.eval()(x)
        loss = model.train()(x).square().mean()
        optimizer.zero_grad()
        loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
        with torch.compiler.set_stance("force_eager"):  # Kron compiles its own steps, for minutes
            optimizer.step()
        fresh = network(norm=True)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            after = model.eval()(x)
            torch.testing.assert_close(after, fresh.eval()(x), rtol=0, atol=0)
        assert not torch.equal(after, before)
