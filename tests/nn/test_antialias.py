"""`antialias=True`: a low-pass filter in front of what samples."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import timm_bcos
from tests.helpers import assert_exact, enliven, real_image
from tests.helpers.literal import bcos_conv2d
from tests.helpers.slow import slow_but_for
from timm_bcos import BcosConfig, BcosConv2d, InputError, bcosify
from timm_bcos.conversion.blocks import antialiased_max_pool
from timm_bcos.hub.repository import save_model
from timm_bcos.nn.layers import LowPass2d
from timm_bcos.nn.stems import BcosStem

Double = torch.float64
# architecture and image size
ARCHITECTURES = {"test_resnet": 64, "test_efficientnet": 64, "resnet18": 64}


def network(name: str, dtype: torch.dtype = Double, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    x = real_image(ARCHITECTURES[name], 2, dtype)
    model = timm.create_model("bcosify", arch=name, num_classes=5, **{"antialias": True, **kwargs})
    return enliven(model.to(dtype), x), x


def filters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowPass2d)]


def literal_low_pass(x: Tensor) -> Tensor:
    """[1, 2, 1] / 4 along both sides, whose border pixels are mirrors."""
    out, (height, width) = torch.zeros_like(x), x.shape[-2:]
    for i in range(height):
        for j in range(width):
            for di, dj in [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]:
                k, m = height - 1 - abs(height - 1 - abs(i + di)), width - 1 - abs(width - 1 - abs(j + dj))
                out[..., i, j] += (2 - abs(di)) * (2 - abs(dj)) / 16 * x[..., k, m]
    return out


# Layers.


@pytest.mark.parametrize("unit", [dict(), dict(b=1.0), dict(b=1.5, gamma=3.0), dict(max_out=2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_layer_is_the_formula_of_the_filtered_input(unit: dict[str, Any], groups: int) -> None:
    layer = BcosConv2d(4, 4, 3, 2, padding=1, groups=groups, dtype=Double, antialias=True, **unit)
    x = torch.randn(2, 4, 6, 7, dtype=Double)
    settings = dict(b=2.0, max_out=1, gamma=1.0, normalize=True) | unit
    geometry = dict(stride=2, dilation=1, groups=groups)
    expected = bcos_conv2d(F.pad(literal_low_pass(x), [1] * 4), layer.weight.detach(), **geometry, **settings)
    torch.testing.assert_close(layer(x).detach(), expected)


def test_for_a_linear_layer_it_is_convolving_first() -> None:
    """Inside, where no border is mirrored."""
    layer = BcosConv2d(3, 4, 3, 2, dtype=Double, antialias=True, b=1.0)
    x = torch.randn(2, 3, 13, 13, dtype=Double)
    dense = F.conv2d(x, layer.weight / layer.weight.flatten(1).norm(dim=1)[:, None, None, None])
    torch.testing.assert_close(layer(x)[..., 1:-1, 1:-1], literal_low_pass(dense)[..., ::2, ::2][..., 1:-1, 1:-1])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("antialias", [False, True])
def test_checkerboards_are_gone(kernel: int, antialias: bool) -> None:
    layer = BcosConv2d(2, 4, kernel, 2, padding=kernel // 2, b=1.0, dtype=Double, antialias=antialias)
    x = torch.randn(1, 2, 16, 16, dtype=Double, requires_grad=True)
    layer(x).sum().backward()
    inside = x.grad[..., 4:-4, 4:-4]
    assert (inside.std((2, 3)) < 1e-12).all() == antialias


@pytest.mark.parametrize("size", [(8, 8), (7, 2)])
def test_the_highest_frequency_is_gone_up_to_the_borders(size: tuple[int, int]) -> None:
    rows, columns = (torch.tensor([1.0, -1.0]).repeat(4)[:side] for side in size)
    highest = (rows[:, None] * columns)[None, None].expand(1, 3, *size)
    layer = LowPass2d(3)
    torch.testing.assert_close(layer(highest), torch.zeros_like(highest))
    torch.testing.assert_close(layer(torch.ones(1, 3, *size)), torch.ones(1, 3, *size))


def test_a_side_of_one_pixel_has_no_frequency() -> None:
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(LowPass2d(3)(x), x)
    row = torch.tensor([1.0, 2.0, 6.0])[None, None, None]
    torch.testing.assert_close(LowPass2d()(row), torch.tensor([1.25, 2.75, 5.0])[None, None, None])


def test_only_strides_are_filtered() -> None:
    plain = BcosConv2d(3, 4, 3, antialias=True)
    assert plain.low_pass is None and not list(plain.children())
    strided = BcosConv2d(3, 4, 3, (2, 1), antialias=True)
    assert strided.low_pass.filt.shape == (3, 1, 3, 3)
    assert list(strided.state_dict()) == ["weight"]


@pytest.mark.parametrize("b", [1.0, 2.0])
@pytest.mark.parametrize("mean", [None, (0.4, 0.5, 0.6)])
def test_stems_filter_the_encoding(b: float, mean: tuple[float, ...] | None) -> None:
    std = None if mean is None else (0.2, 0.3, 0.2)
    stem = BcosStem(3, 4, 3, 2, padding=1, mean=mean, std=std, b=b, dtype=Double, antialias=True)
    plain = BcosStem(3, 4, 3, 2, padding=1, mean=mean, std=std, b=b, dtype=Double)
    plain.load_state_dict(stem.state_dict())
    x = torch.rand(2, 3, 9, 8, dtype=Double)
    for is_training in (False, True):
        torch.testing.assert_close(stem.train(is_training)(x), plain.eval()(literal_low_pass(x)))


def test_gradients() -> None:
    layer = BcosConv2d(4, 2, 3, 2, padding=1, groups=2, dtype=Double, antialias=True)
    x = torch.randn(2, 4, 5, 4, dtype=Double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: torch.func.functional_call(layer, {"weight": w}, v), (x, layer.weight))
    assert torch.autograd.gradgradcheck(layer, (x,))


# Max pooling.

POOLS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, stride=2),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=3, stride=2, dilation=2),
    dict(kernel_size=(3, 2), stride=(2, 2), padding=(1, 0)),
    dict(kernel_size=3, stride=2, ceil_mode=True),
    dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
    dict(kernel_size=2, stride=2, ceil_mode=True),
]


@pytest.mark.parametrize("settings", POOLS, ids=str)
def test_max_pools_keep_sizes_and_places(settings: dict[str, Any]) -> None:
    """Places are compared on a ramp, which a symmetric filter leaves as it is, away from borders."""
    pool = nn.MaxPool2d(**settings)
    new = antialiased_max_pool(pool)
    assert [type(m) for m in new][-2:] == [nn.MaxPool2d, LowPass2d]
    for height in range(5, 13):
        for width in (5, 8):
            x = torch.zeros(1, 2, height, width)
            assert new(x).shape == pool(x).shape, (height, width)
    x = torch.arange(20.0)[:, None].expand(1, 1, 20, 20)
    torch.testing.assert_close(new(x)[..., 2:-2, 2:-2], pool(x)[..., 2:-2, 2:-2])


@pytest.mark.parametrize(
    ("pool", "smallest"),
    [(nn.MaxPool2d(3, 2, 1), 1), (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 1), (nn.MaxPool2d(2, 2), 2)],
    ids=str,
)
def test_max_pools_of_small_maps(pool: nn.MaxPool2d, smallest: int) -> None:
    """Nothing is left to reflect at stride 1."""
    for size in range(smallest, 5):
        x = torch.randn(1, 2, size, size)
        assert antialiased_max_pool(pool)(x).shape == pool(x).shape


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 1, 1),
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, 2, return_indices=True),
        nn.MaxPool2d(2, 2, 1, ceil_mode=True),
        nn.MaxPool1d(2, 2),
        timm.layers.pool2d_same.MaxPool2dSame(3, 2),
    ],
    ids=str,
)
def test_other_max_pools_stay(pool: nn.Module) -> None:
    assert antialiased_max_pool(pool) is pool


# Networks.


@pytest.mark.parametrize("kwargs", [dict(), dict(b=1, bias=True), dict(b=1.5, stem="encoded")], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_are_exact_and_train(name: str, kwargs: dict[str, Any]) -> None:
    model, x = network(name, temperature=1e-2, **kwargs)
    assert_exact(model, x, 1e-10)
    assert timm_bcos.check(model, x).exact
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_pools_whose_last_windows_leave_the_map() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(8, 4, 3, 2))
    plain = nn.Sequential(*plain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    config = BcosConfig(antialias=True, mean=(0.5,), std=(0.3,), temperature=1e-2)
    x = real_image(16, 2, Double)
    model = enliven(bcosify(plain, config), x)
    assert filters(model) == ["2.2", "3.low_pass"]
    assert_exact(model, x, 1e-10)


def test_explanations_can_be_trained() -> None:
    model, x = network("resnet18")
    found, expected = timm_bcos.dynamic_weights(model, x, 1), timm_bcos.explain(model, x, 1)
    torch.testing.assert_close(found.weights, expected.weights)
    found.weights.square().sum().backward()
    assert model.layer2[0].conv1.weight.grad.isfinite().all()


def test_what_is_filtered() -> None:
    model, _ = network("resnet18")
    stages = [f"layer{i}.0.{name}.low_pass" for i in (2, 3, 4) for name in ("conv1", "downsample.0")]
    assert filters(model) == ["conv1.low_pass", "maxpool.1", *stages]
    assert filters(bcosify(timm.create_model("resnet18"), BcosConfig())) == []


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_patches_that_do_not_overlap_stay(name: str) -> None:
    assert filters(bcosify(timm.create_model(name), BcosConfig(antialias=True))) == []


def test_weight_standardization() -> None:
    model = bcosify(timm.create_model("nf_resnet26", num_classes=5), BcosConfig(antialias=True))
    assert "stem.conv.low_pass" in filters(model)


def test_averages_stay() -> None:
    model = bcosify(timm.create_model("resnet18"), BcosConfig.v2(antialias=True))
    assert type(model.maxpool) is nn.AvgPool2d


def test_state_dicts_are_the_same_but_for_what_they_say_of_filters() -> None:
    model, x = network("resnet18")
    plain = timm.create_model("bcosify", arch="resnet18", num_classes=5).double().eval()
    weights = model.state_dict()
    assert list(plain.state_dict()) == list(weights)
    with pytest.raises(timm_bcos.CheckpointError, match="antialias=True, while this model has antialias=False"):
        plain.load_state_dict(weights)
    del weights["bcos_settings"]
    plain.load_state_dict(weights)
    assert not torch.allclose(plain(x), model(x))


def test_a_plain_network_on_the_meta_device() -> None:
    plain = timm.create_model("test_resnet", device="meta")
    assert bcosify(plain, BcosConfig(antialias=True)).layer2[0].conv1.low_pass.filt.is_meta


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused(name: str) -> None:
    model, x = network(name)
    fused = timm_bcos.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(timm_bcos.explain(fused, x, 1).weights, timm_bcos.explain(model, x, 1).weights)
    assert filters(fused) == filters(model)


@pytest.mark.parametrize("name", slow_but_for(["test_resnet"], ARCHITECTURES))
def test_script_trace_and_export(name: str) -> None:
    model, x = network(name, torch.float32)
    expected = model(x).detach()
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=1)},))
    torch.testing.assert_close(program.module()(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_channels_last() -> None:
    model, x = network("resnet18")
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), model(x))


def test_images_as_small_as_one_pixel() -> None:
    model, _ = network("resnet18")
    x = torch.rand(2, 3, 1, 1, dtype=Double)
    assert model(x).isfinite().all()
    assert timm_bcos.explain(model, x).completeness_error.max() <= 1e-10


def test_copies_and_what_timm_loads_again(tmp_path: Path) -> None:
    settings = dict(arch="test_resnet", num_classes=5, antialias=True, temperature=1e-8)
    model, x = timm.create_model("bcosify", **settings).eval(), real_image(64, 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
    save_model(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.bcos_config == model.bcos_config
    torch.testing.assert_close(again(x), model(x))


def test_converting_again_changes_nothing() -> None:
    model, _ = network("resnet18")
    modules = {name: id(m) for name, m in model.named_modules()}
    assert {name: id(m) for name, m in bcosify(model).named_modules()} == modules


def test_a_bad_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"antialias='yes'.*True or False"):
        BcosConfig(antialias="yes")  # type: ignore[arg-type]
