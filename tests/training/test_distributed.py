"""How torch and timm train: DDP, FSDP2, moving averages, shared memory, every optimizer."""

import os
from pathlib import Path

import pytest
import timm.optim
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from timm_bcos import BcosConv2d, BcosLinear, UncenteredBatchNorm2d

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


def _work(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model, x = network(), images().chunk(2)[rank]
    if kind == "DDP":
        train(DistributedDataParallel(model), x)
    else:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        train(fully_shard(model), x)
    state = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in model.state_dict().items()}
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.destroy_process_group()
    os._exit(0)  # without the interpreter's shutdown, in which FSDP2 of plain layers aborts now and then, too


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_as_one_does(kind: str, tmp_path: Path) -> None:
    multiprocessing.spawn(_work, (kind, str(tmp_path)), 2)
    alone = network()
    train(alone, images())
    found, start = torch.load(tmp_path / "state.pt"), network().state_dict()
    for name, value in alone.state_dict().items():
        assert not torch.allclose(value, start[name], atol=1e-3)
        torch.testing.assert_close(found[name], value)


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
