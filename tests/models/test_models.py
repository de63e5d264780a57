import copy
import functools
import math
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

import timm_bcos
from tests.helpers import ROOT, assert_exact, enliven, load_script, normalized, real_image, timm_vits_trace
from tests.helpers.slow import slow_but_for
from tests.processes import run_python
from timm_bcos import CheckpointError, InputError, NotFineTunedWarning, TargetError
from timm_bcos.models.architectures import ARCHITECTURES
from timm_bcos.models.bcos_models import ENTRY_POINTS
from timm_bcos.models.cifar import CifarResNet
from timm_bcos.models.loading import load_model
from timm_bcos.models.vit import sincos_positions
from timm_bcos.nn.layers import BcosConv2d
from timm_bcos.nn.stems import BcosStem
from timm_bcos.weights.catalog import EMBEDDED, PUBLISHED

CNNS = [
    "bcos_cnn9", "bcos_resnet18", "bcos_densenet121", "bcos_vgg11", "bcos_inception_v3", "bcosify",
    "bcosv2_resnet18", "bcosv2_vgg11_bn", "bcosv2_convnext_tiny", "bcos_efficientnet_lite0", "bcos_cifar_resnet20",
]  # fmt: skip
VITS = ["bcosv2_vit_tiny_patch16_224", "bcosv2_vitc_tiny_patch1_14"]
SMALL = CNNS + VITS
MILLION = 10**6


def size_for(name: str) -> int:
    return {"bcos_inception_v3": 96, "bcos_cnn9": 32, "bcos_cifar_resnet20": 32}.get(name, 64)


# what makes them shallower or narrower
CUT: dict[str, dict[str, object]] = {
    "bcos_densenet121": dict(block_config=(2, 2, 2, 2), temperature=0.05),  # of a logit, half precision is 1 % off
    "bcos_resnet18": dict(layers=(1, 1, 1, 1)),
    "bcos_vgg11": dict(mlp_ratio=0.05),
    "bcosify": dict(arch="resnet18", layers=(2, 1, 1, 1)),
    "bcosv2_convnext_tiny": dict(depths=(1, 1, 2, 1)),
    "bcosv2_resnet18": dict(layers=(1, 1, 1, 1)),
    "bcosv2_vgg11_bn": dict(mlp_ratio=0.05),
    "bcosv2_vit_tiny_patch16_224": dict(depth=3, img_size=64),
    "bcosv2_vitc_tiny_patch1_14": dict(depth=3, img_size=64),
}


def small(name: str, **kwargs: object) -> nn.Module:
    return timm.create_model(name, **(dict(num_classes=5) | CUT.get(name, {}) | kwargs))


@pytest.mark.parametrize("name", SMALL)
def test_one_network_of_each_family_is_exact(name: str) -> None:
    size = size_for(name) if size_for(name) == 32 else 96
    check_sums(small(name, num_classes=10, **(dict(img_size=size) if "vit" in name else {})), real_image(size))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_registered_network_is_exact(name: str) -> None:
    size = 299 if "inception" in name else 32 if "cnn9" in name or "cifar" in name else 96
    kwargs = dict(img_size=size) if "vit" in name else dict(mlp_ratio=0.05) if "vgg" in name else {}
    check_sums(timm.create_model(name, num_classes=10, **kwargs), real_image(size))


def check_sums(model: nn.Module, x: Tensor) -> None:
    """Σ contributions + bias = logit, to rounding, in float64; in float32 for all but the slowest."""
    enliven(model.eval(), x)
    if sum(p.numel() for p in model.parameters()) < 55 * MILLION:
        assert_exact(model, x, 1e-4)
    assert_exact(model.double(), x.double(), 1e-10)


TABLE_B1 = {20: 6.8, 22: 8.0, 24: 9.4, 26: 10.8, 28: 12.4, 30: 14.0, 32: 15.8}


@pytest.mark.parametrize("growth_rate", TABLE_B1)
def test_parameter_counts_of_table_b1(growth_rate: int) -> None:
    model = timm.create_model("bcos_densenet121", growth_rate=growth_rate, max_out=2, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == TABLE_B1[growth_rate]


def test_parameter_count_without_max_out() -> None:
    model = timm.create_model("bcos_densenet121", max_out=1, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 7.9


def test_paper_networks_have_no_norm_activation_or_bias() -> None:
    gone = (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    for name in ("bcos_densenet121", "bcos_resnet50", "bcos_vgg11", "bcos_inception_v3"):
        model = timm.create_model(name, device="meta")
        assert not [m for m in model.modules() if isinstance(m, gone)]
        assert all(parameter.endswith("weight") for parameter, _ in model.named_parameters())
        assert all(m.b == 2 and m.max_out == 2 for m in model.modules() if isinstance(m, BcosConv2d))


def test_scales_of_the_papers() -> None:
    conv = timm.create_model("bcos_resnet18", device="meta").layer2[0].conv1
    assert conv.gamma == pytest.approx(100 / (64 * 9) ** 0.5)
    assert timm.create_model("bcos_vgg11", device="meta").pre_logits.fc1.padding == (3, 3)
    cnn = timm.create_model("bcos_cnn9_b150", device="meta")
    assert cnn.features[0].gamma == pytest.approx(10**0.5)
    assert (cnn.fc.temperature, cnn.fc.b) == (pytest.approx(1e-2), 1.5)
    assert cnn.fc.logit_bias == pytest.approx(torch.tensor(0.1 / 0.9).log().item())
    assert timm.create_model("bcos_resnet18", gamma=3.0, b=1.5, device="meta").layer2[0].conv1.gamma == 3.0


def tagged_names() -> list[str]:
    return [f"{name}.{weights.tag}" for name in PUBLISHED for weights in PUBLISHED[name]] + list(EMBEDDED)


@functools.cache
def parameter_names(name: str) -> set[str]:
    return set(timm.create_model(name, device="meta").state_dict())


def test_cfgs() -> None:
    for name in [*tagged_names(), *ENTRY_POINTS]:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.mean == (0.0, 0.0, 0.0), name
        assert cfg.std == (1.0, 1.0, 1.0), name
        assert cfg.license, name
        assert cfg.paper_ids, name
        assert cfg.origin_url, name
        keys = parameter_names(name.partition(".")[0])
        assert {f"{cfg.first_conv}.weight", f"{cfg.classifier}.weight"} <= keys, name
    assert timm.get_pretrained_cfg("bcos_inception_v3").input_size == (3, 299, 299)
    assert timm.data.resolve_model_data_config(timm.create_model("bcos_cnn9", device="meta"))["input_size"] == (
        3,
        32,
        32,
    )


def test_published_weights_are_listed_and_described() -> None:
    listed = timm.list_pretrained("bcos*")
    assert set(listed) == set(tagged_names())
    assert timm.get_pretrained_cfg("bcosv2_resnet50").tag == "mpi_in1k"
    for name, size, resize in (("bcosv2_resnet50", 224, 256), ("bcosv2_resnet50.mpi_long_in1k", 224, 232),
                               ("bcosv2_convnext_base", 224, 232), ("bcos_inception_v3", 299, 320)):  # fmt: skip
        model = timm.create_model(name, device="meta")
        data = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**data)
        assert (transform.transforms[0].size, data["input_size"][-1]) == (resize, size)
        assert data["interpolation"] == "bilinear"
    long = timm.get_pretrained_cfg("bcosv2_resnet50.mpi_long_in1k")
    assert "79.5" in long.description and "non-commercial" in long.notes[0] and long.license == "other"


def test_position_embedding_is_the_literal_one() -> None:
    found = sincos_positions(torch.zeros(1, 6, 8), 2, 3).unflatten(0, (2, 3))
    for y in range(2):
        for x in range(3):
            angles = [(p, f) for p in (x, y) for f in (1.0, 1e-4)]
            expected = [g(p * f) for axis in (0, 2) for g in (math.sin, math.cos) for p, f in angles[axis : axis + 2]]
            torch.testing.assert_close(found[y, x], torch.tensor(expected))


@pytest.mark.parametrize("name", VITS)
def test_transformers_change_their_input_size(name: str) -> None:
    """Position embeddings are those of the new grid, so the network equals one built for it."""
    model = small(name).eval()
    fresh = small(name, img_size=(96, 64)).eval()
    fresh.load_state_dict(model.state_dict())
    dynamic = small(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 96, 64)
    with pytest.raises((AssertionError, RuntimeError), match=r"height \(96\)|must match"):
        model(x)
    model.set_input_size((96, 64))
    torch.testing.assert_close(model(x), fresh(x))
    torch.testing.assert_close(dynamic(x), fresh(x))


def test_patch_size_changes_keep_the_stem_b_cos() -> None:
    model = timm.create_model("bcosify", arch="vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    model.set_input_size(patch_size=8)
    assert type(model.patch_embed.proj) is BcosStem
    assert model.patch_embed.proj.weight.shape[1:] == (6, 8, 8)
    assert model.explain(real_image(64)).completeness_error.max() < 1e-4


def test_bcosify_takes_the_data_settings_of_the_architecture() -> None:
    model = timm.create_model("bcosify", arch="tf_efficientnet_lite0", device="meta")
    config = timm.data.resolve_model_data_config(model)
    plain = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == (
        plain.input_size,
        plain.interpolation,
        plain.crop_pct,
    )
    assert config["mean"] == (0.0, 0.0, 0.0)
    assert model.pretrained_cfg["architecture"] == "bcosify"


def test_bcosify_loads_plain_and_converted_weights(tmp_path: object) -> None:
    x = real_image(64)
    plain = timm.create_model("resnet18", num_classes=7).eval()
    arguments = dict(arch="resnet18", num_classes=7, b=1, bias=True, pretrained=True)
    overlay = dict(state_dict=plain.state_dict(), num_classes=7)
    from_plain = timm.create_model("bcosify", **arguments, pretrained_cfg_overlay=overlay).eval()
    expected = timm_bcos.bcosify(plain, timm_bcos.BcosConfig.finetune(b=1, bias=True))(x)
    torch.testing.assert_close(from_plain(x), expected)
    overlay = dict(state_dict=from_plain.state_dict(), num_classes=7)
    torch.testing.assert_close(
        timm.create_model("bcosify", **arguments, pretrained_cfg_overlay=overlay).eval()(x), expected
    )


PRESERVING: dict[str, object] = dict(b=1, bias=True)


def test_bcosify_takes_an_architecture_from_a_folder(tmp_path: Path) -> None:
    """Weights, arguments and normalization come from the folder's config; what is given beside them wins."""
    plain = timm.create_model("test_resnet", num_classes=7, act_layer="silu").eval()
    plain.pretrained_cfg = {**plain.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    timm.models.save_for_hf(plain, tmp_path, model_args=dict(act_layer="silu"), safe_serialization=True)
    x = real_image(64)
    expected = plain(normalized(x, plain.pretrained_cfg))
    model = timm.create_model("bcosify", arch=f"local-dir:{tmp_path}", pretrained=True, **PRESERVING).eval()
    torch.testing.assert_close(model(x), expected)
    assert model.pretrained_cfg["mean"] == (0.0, 0.0, 0.0) and isinstance(model.layer1[0].act1, nn.SiLU)
    loaded = load_model(f"local-dir:{tmp_path}").eval()
    torch.testing.assert_close(loaded(x), expected)
    assert timm.create_model("bcosify", arch=f"local-dir:{tmp_path}", num_classes=3)(x).shape == (1, 3)
    with pytest.raises(CheckpointError, match="cannot read the config of local-dir:"):
        timm.create_model("bcosify", arch=f"local-dir:{tmp_path}/nothing")


def test_architecture_arguments_that_a_config_field_shadows() -> None:
    """`bias` is a field of BcosConfig, and an argument of the architecture."""

    @register_model
    def shadowed_network(
        pretrained: bool = False, *, bias: str = "none", num_classes: int = 5, **_: object
    ) -> nn.Module:
        network = timm.create_model("test_resnet", num_classes=num_classes)
        network.told = bias
        return network

    model = timm.create_model("bcosify", arch="shadowed_network", bias=True, arch_kwargs=dict(bias="conv"), **UNIT)
    assert (model.told, model.bcos_config.bias) == ("conv", True)
    norm = dict(norm_layer="layernorm2d")
    assert isinstance(timm.create_model("bcosify", arch="test_resnet", arch_kwargs=norm).bn1, timm.layers.LayerNorm2d)


UNIT: dict[str, object] = dict(mean=(0.0,), std=(1.0,))


def test_cifar_models_refuse_other_depths_and_formats() -> None:
    with pytest.raises(InputError, match=r"depth=21: .*6n \+ 2"):
        CifarResNet(depth=21)
    with pytest.raises(InputError, match=r"'NHWC'.*NCHW"):
        CifarResNet().forward_intermediates(torch.rand(1, 3, 32, 32), output_fmt="NHWC")


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(TargetError, match=r"no model 'zzzzz'; see `timm-bcos models` or timm\.list_models\(\)"):
        timm.create_model("bcosify", arch="zzzzz")
    with pytest.raises(TargetError, match=r"no model 'resnet_50'; close names: .*resnet50"):
        timm.create_model("bcosify", arch="resnet_50")
    with pytest.raises(TargetError, match=r"'resnet18\.nope'.*tags of resnet18: .*a1_in1k"):
        timm.create_model("bcosify", arch="resnet18.nope")
    with pytest.raises(TargetError, match="hf-hub:org/name"):
        timm.create_model("bcosify", arch="org/name")
    for arch in ("bcos_resnet18", "bcosify", "bcos_efficientnet_lite0.clothes"):
        with pytest.raises(TargetError, match=r"is a B-cos model already: create it as such"):
            timm.create_model("bcosify", arch=arch, b=1.5)


def test_pretrained_networks_tell_that_they_must_be_fine_tuned(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    arch = f"local-dir:{tmp_path}"
    for given in ({}, dict(b=1), dict(bias=True), dict(b=1, bias=True, antialias=True)):
        with pytest.warns(NotFineTunedWarning, match=r"fine-tune it, or pass b=1, bias=True") as caught:
            timm.create_model("bcosify", arch=arch, pretrained=True, **given)
        assert len([w for w in caught if issubclass(w.category, NotFineTunedWarning)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotFineTunedWarning)
        timm.create_model("bcosify", arch=arch, pretrained=True, **PRESERVING)
        model = timm.create_model("bcosify", arch=arch)
        overlay = dict(state_dict=model.state_dict())
        timm.create_model("bcosify", arch=arch, pretrained=True, pretrained_cfg_overlay=overlay)
        load_model(arch)


@pytest.mark.parametrize("name", SMALL)
def test_behaves_as_a_timm_model(name: str) -> None:
    model, x = small(name).eval(), real_image(size_for(name), 2)
    expected = model(x)
    assert expected.shape == (2, 5)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), expected)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    fresh = small(name).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    torch.testing.assert_close(small(name, num_classes=0).eval()(x).shape, pooled.shape)


@pytest.mark.parametrize("name", CNNS)
def test_pooling_options(name: str) -> None:
    x = real_image(size_for(name))
    assert small(name, global_pool="max").eval()(x).shape == (1, 5)
    assert small(name, num_classes=0, global_pool="").eval()(x).ndim == 4
    if name != "bcos_cifar_resnet20":  # which classifies what has been pooled
        assert small(name, global_pool="").eval()(x).ndim == 4  # a map of logits


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name: str) -> None:
    model = small(name, features_only=True).eval()
    maps = model(real_image(size_for(name)))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_image_channels(name: str, channels: int) -> None:
    model = small(name, in_chans=channels).eval()
    assert model.in_chans == channels
    x = torch.rand(1, channels, size_for(name), size_for(name))
    explanation = model.explain(x)
    assert explanation.weights.shape[1] == 2 * channels


@pytest.mark.parametrize("name", ["bcos_cnn9", "bcos_densenet121", "bcosify", "bcosv2_convnext_tiny", VITS[0]])
def test_grad_checkpointing_changes_nothing(name: str) -> None:
    model, x = small(name).double().train(), real_image(size_for(name), 2, torch.float64)
    gradients, explained = [], []
    for enable in (False, True):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(enable)
        twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
        explained.append(twin.eval().explain(x))
        flags = {m.grad_checkpointing for m in twin.modules() if hasattr(m, "grad_checkpointing")}
        assert flags == {enable}
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    torch.testing.assert_close(explained[1].weights, explained[0].weights)
    torch.testing.assert_close(explained[1].bias, explained[0].bias)


@pytest.mark.parametrize("name", slow_but_for([name for name in SMALL if name != "bcos_inception_v3"], SMALL))
@pytest.mark.filterwarnings("ignore")
def test_script_trace_and_export(name: str) -> None:
    """TorchScript where timm's architecture scripts (its DenseNet and ours: yes), torch.fx and torch.export."""
    model, x = small(name).eval(), real_image(size_for(name))
    expected = model(x).detach()
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    if "vgg" not in name and (name not in VITS or timm_vits_trace()):  # timm's VGG branches on the size of its input
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    assert isinstance(model, timm_bcos.conversion.converted.BcosModel)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_and_autocast(name: str) -> None:
    model, x = small(name).double().eval(), real_image(size_for(name), 2, torch.float64)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), model(x))
    model, x = model.float(), x.float()
    expected = model(x).detach()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), torch.no_grad():
            logits = model.eval()(x)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bcos_cnn9", "bcos_resnet18", "bcosify"])
def test_training_under_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = small(name).train(), real_image(size_for(name), 2)
    with torch.autocast("cpu", dtype):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), torch.full((2, 5), 0.2))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_networks_answer_in_half_precision(name: str) -> None:
    """On the meta device, where timm's tests ask this, and where there is no autocast."""
    model = small(name, device="meta").eval().to(torch.bfloat16)
    x = torch.empty(1, 3, size_for(name), size_for(name), device="meta", dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("bcos_resnet18", no_such_argument=1)
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("bcosify", no_such_argument=1)


def test_inception_auxiliary_head() -> None:
    model = timm.create_model("bcos_inception_v3", aux_logits=True, num_classes=7).train()
    logits, auxiliary = model(real_image(299, 2))
    assert logits.shape == auxiliary.shape == (2, 7)
    assert model.AuxLogits.fc.logit_bias == model.fc.logit_bias
    assert model.eval().explain(real_image(299)).logits.shape == (1, 7)


def test_import_leaves_timm_alone_and_is_light() -> None:
    """Nothing heavy comes along, and timm's own models and modules stay as they were."""
    code = (
        "import sys, timm; before, modules = set(timm.list_models()), set(timm.list_modules()); import timm_bcos;"
        "new = set(timm.list_models()) - before; assert before <= set(timm.list_models());"
        "assert all(n.startswith('bcos') for n in new) and len(new) > 20, new;"
        "assert set(timm.list_modules()) - modules == {'bcos_models'};"
        "assert not {'matplotlib', 'typer', 'captum'} & set(sys.modules)"
    )
    assert run_python(code) == (0, "")
    assert timm.list_models("bcos_densenet*") == [f"bcos_densenet{size}" for size in (121, 161, 169, 201)]


def test_torch_hub() -> None:
    root = str(ROOT)
    model = torch.hub.load(root, "bcos_densenet121", source="local", num_classes=3)
    assert model.num_classes == 3
    sys.path.insert(0, root)
    try:
        import hubconf

        offered = {name for name in vars(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    finally:
        sys.path.remove(root)
    assert offered == set(ENTRY_POINTS)


def test_model_zoo_is_current() -> None:
    model_table = load_script("model_table")
    assert load_script("markdown_blocks").block(model_table.PAGE, model_table.NAME) == model_table.table()


# New classifiers.


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("bcos_efficientnet_lite0", {}),
        ("bcos_resnet18", {}),
        ("bcosv2_resnet18", {}),
        ("bcosify", dict(arch="test_resnet", b=2)),
    ],
)
def test_new_classifiers_start_at_the_probability_of_their_classes(name: str, kwargs: dict[str, Any]) -> None:
    for model in (timm.create_model(name, num_classes=3, **kwargs), timm.create_model(name, **kwargs)):
        model.reset_classifier(3)
        assert model.get_classifier().logit_bias == pytest.approx(math.log(1 / 2))
        assert model.bcos_config.probability == "sigmoid"
    chosen = timm.create_model(name, num_classes=3, logit_bias=-1.5, probability="softmax", **kwargs)
    assert chosen.get_classifier().logit_bias == -1.5 and chosen.bcos_config.probability == "softmax"


def test_published_classifiers_keep_their_logit_bias() -> None:
    for name, bias in (("bcos_efficientnet_lite0.clothing", -2.2), ("bcos_resnet18", math.log(0.01 / 0.99))):
        model: Any = timm.create_model(name)
        again: Any = timm.create_model(name, num_classes=model.num_classes)
        assert model.get_classifier().logit_bias == again.get_classifier().logit_bias == pytest.approx(bias)


def test_classifiers_with_a_bias_learn_their_own() -> None:
    kept: Any = timm.create_model("bcosify", arch="test_resnet", b=1, bias=True, num_classes=3)
    assert kept.get_classifier().logit_bias == 0 and kept.bcos_config.probability == "softmax"


def test_classifiers_may_stay_linear() -> None:
    model: Any = timm.create_model("bcosv2_resnet18", linear=("fc",), num_classes=3).eval()
    head = model.get_classifier()
    assert (head.b, head.max_out, head.normalize_weight) == (1, 1, False)
    x = torch.rand(2, 3, 64, 64)
    features = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model(x), features @ head.weight.flatten(1).T + head.logit_bias)
