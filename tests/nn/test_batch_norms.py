"""What timm, torch and others do to batch norms, done to uncentered ones: freezing, averaging, synchronizing."""

import copy
import os
import socket
from collections.abc import Callable

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.utils import freeze, unfreeze
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from tests.helpers.literal import uncentered_batch_norm
from timm_bcos import BcosConfig, ModelStateError, UncenteredBatchNorm2d, UnsupportedModuleError, bcosify, explain
from timm_bcos.nn.norms import UncenteredBatchNorm1d, UncenteredBatchNormAct2d

ARCHITECTURES = {
    "norms": dict(arch="test_resnet"),
    "norms with activations": dict(arch="resnetv2_18"),
    "gates": dict(arch="test_efficientnet", bias="reference"),
}
NAMES = [*ARCHITECTURES, "norms of vectors"]
SYNCHRONIZE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": convert_sync_batchnorm,
}


def network(name: str) -> nn.Module:
    """With running statistics that are not those of the beginning, in training mode."""
    if name == "norms of vectors":
        layers = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4)]
        model = bcosify(nn.Sequential(*layers), BcosConfig(mean=(0.5,), std=(0.5,)))
    else:
        # without a logit bias, beside which the weak signal of untrained layers would be lost in rounding
        model = timm.create_model("bcosify", num_classes=4, logit_bias=0.0, **ARCHITECTURES[name])
    model.train()(images())
    return model


def images() -> Tensor:
    return torch.rand(3, 3, 64, 64)


def own_norms(model: nn.Module) -> dict[str, type]:
    kinds = UncenteredBatchNorm1d | UncenteredBatchNorm2d
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_found_by_whoever_looks_for_batch_norms(name: str) -> None:
    model = network(name)
    found = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert found == own_norms(model).keys() != set()
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        assert norm.affine and norm.track_running_stats
        assert not norm.running_mean.any() and not norm.bias.any()
    kept = ("weight", "running_var", "num_batches_tracked")
    keys = model.state_dict().keys()
    assert all(f"{n}.{key}" in keys for n in found for key in kept)
    assert not any(f"{n}.{key}" in keys for n in found for key in ("bias", "running_mean"))
    assert not any(parameter_name == f"{n}.bias" for n in found for parameter_name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frozen_networks_stay_as_they_are_while_others_train(name: str) -> None:
    model = network(name).eval()
    x = images()
    expected = model(x).detach()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert explain(model.eval(), x).completeness_error.max() < 1e-4


def test_statistics_go_on_where_freezing_leaves_them_out() -> None:
    model = network("norms")
    before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("running_var")}
    freeze(model, include_bn_running_stats=False)
    model.train()(images())
    assert not any(torch.equal(value, before[key]) for key, value in model.named_buffers() if key in before)


@pytest.mark.parametrize("name", NAMES)
def test_unfrozen_networks_are_the_ones_that_were_frozen(name: str) -> None:
    model = network(name)
    frozen, x = copy.deepcopy(model), images()
    freeze(frozen)
    unfreeze(frozen)
    y = frozen(x)  # before anything else is called
    torch.testing.assert_close(y, model(x))
    assert own_norms(frozen).keys() == own_norms(model).keys()
    y.sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in frozen.parameters())
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # which timm begins anew
            torch.testing.assert_close(frozen.state_dict()[key], value)


def test_a_part_is_frozen_alone() -> None:
    model = network("norms")
    freeze(model, ["conv1", "bn1", "layer1"])
    before = {key: value.clone() for key, value in model.named_buffers() if key.endswith("running_var")}
    model.train()(images())
    after = dict(model.named_buffers())
    stays = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert stays == {key for key in before if key.startswith(("conv1", "bn1", "layer1"))}


def test_weights_of_a_frozen_network_load() -> None:
    model = network("norms").eval()
    frozen = copy.deepcopy(model)
    freeze(frozen)
    fresh = timm.create_model("bcosify", num_classes=4, logit_bias=0.0, arch="test_resnet").eval()
    fresh.load_state_dict(frozen.state_dict())
    x = images()
    torch.testing.assert_close(fresh(x), model(x))


def test_a_centered_norms_weights_do_not_load() -> None:
    plain = nn.BatchNorm2d(3)
    plain.running_mean.fill_(1.0)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"running_mean"'):
        UncenteredBatchNorm2d(3).load_state_dict(plain.state_dict())


def test_lightnings_way_of_freezing() -> None:
    """Its `BaseFinetuning.freeze` sets `track_running_stats` of every `_BatchNorm`."""
    norm, x = UncenteredBatchNorm2d(3, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    norm.track_running_stats = False
    y = norm(x)
    assert torch.equal(norm.running_var, torch.ones(3, dtype=torch.float64)) and norm.num_batches_tracked == 0
    variance = x.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(y, uncentered_batch_norm(x, norm.weight.detach(), variance, norm.eps))


def test_statistics_of_averaged_weights() -> None:
    model = network("norms")
    batches = [images(), images()]
    seen: list[Tensor] = []
    with torch.no_grad():
        model.conv1.register_forward_hook(lambda _, __, y: seen.append(y.var((0, 2, 3), unbiased=False)))
        update_bn(batches, model)
    torch.testing.assert_close(model.bn1.running_var, torch.stack(seen).mean(0))
    assert model.bn1.momentum == 0.1 and model.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", SYNCHRONIZE)
def test_synchronized_networks_stay_uncentered(by: str, name: str) -> None:
    model, x = network(name), images()
    shared = SYNCHRONIZE[by](copy.deepcopy(model))
    torch.testing.assert_close(shared(x), model(x))
    norms = [m for m in shared.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == len(own_norms(model)) and all(norm.is_synchronized for norm in norms)
    assert shared.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(shared.eval()(x), model.eval()(x))


def test_a_plain_network_that_is_synchronized_is_converted_to_one() -> None:
    plain = convert_sync_batchnorm(timm.create_model("resnetv2_18", num_classes=4))
    model = bcosify(plain, BcosConfig(mean=(0.5,), std=(0.5,)))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert {type(norm) for norm in norms} == {UncenteredBatchNormAct2d}
    assert all(norm.is_synchronized for norm in norms)


def test_split_norms_are_refused_before_they_are_trained() -> None:
    split = convert_splitbn_model(network("norms"))
    with pytest.raises(UnsupportedModuleError, match=r"SplitBatchNorm2d subtracts the means .*--split-bn"):
        split(images())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["norms", "gates", "norms of vectors"])
def test_norms_are_trained_in_torchscript(name: str) -> None:
    model, x = network(name), images()
    scripted = torch.jit.script(copy.deepcopy(model))
    y, expected = scripted(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()
    for one, other in zip(scripted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-4)
    for one, other in zip(scripted.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_norms_that_belong_to_the_network_stay_centered() -> None:
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=4, b=1, bias=True).train()
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert set(kinds.values()) == {nn.BatchNorm2d}
    model(images())
    assert kinds == {name: type(m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return int(connection.getsockname()[1])


def one_of_two(rank: int, port: int) -> None:
    """A process that holds half of a batch: its norm must answer as one norm of the whole batch does."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    x = x.requires_grad_()
    alone = UncenteredBatchNorm2d(3, dtype=torch.float64)
    nn.init.uniform_(alone.weight, 0.5, 2)
    shared = UncenteredBatchNorm2d.from_batch_norm(convert_sync_batchnorm(copy.deepcopy(alone)))
    (alone(x) * upstream).sum().backward()
    part = slice(3 * rank, 3 + rank)  # three images and one
    own = x.detach()[part].clone().requires_grad_()
    y = shared(own)
    (y * upstream[part]).sum().backward()
    torch.testing.assert_close(y, alone(x)[part])
    torch.testing.assert_close(own.grad, x.grad[part])
    dist.all_reduce(shared.weight.grad)
    torch.testing.assert_close(shared.weight.grad, alone.weight.grad)
    torch.testing.assert_close(shared.running_var, 0.9 + 0.1 * x.detach().var((0, 2, 3), unbiased=False))
    dist.destroy_process_group()


def test_two_processes_share_their_statistics() -> None:
    start_processes(one_of_two, (free_port(),), nprocs=2, start_method="spawn")


@pytest.mark.parametrize("kind", [UncenteredBatchNorm1d, UncenteredBatchNorm2d, UncenteredBatchNormAct2d])
def test_a_bias_that_tools_assign_is_0_or_refused(kind: type) -> None:
    """PEFT and others copy the bias of a module onto the one that they put in its place."""
    norm = kind(4)
    norm.bias = norm.bias
    norm.bias = None
    norm.bias = nn.Parameter(torch.zeros(4))
    assert not norm.bias.any() and [name for name, _ in norm.named_parameters()] == ["weight"]
    with pytest.raises(ModelStateError, match=rf"{kind.__name__} adds no bias"):
        norm.bias = nn.Parameter(torch.ones(4))


def test_norms_that_peft_has_tuned_are_merged() -> None:
    peft = pytest.importorskip("peft")
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=3).eval()
    x = torch.rand(2, 3, 32, 32)
    adapted = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["bn1"])).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    y = adapted(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y)
