"""Libraries that take B-cos layers for linear ones: PEFT, torchao, thop."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from tests.processes import run_python
from timm_bcos import BcosConv2d, BcosError, BcosLinear, InputError, ModelStateError
from timm_bcos.conversion.positions import PositionedQkv
from timm_bcos.nn.heads import BcosConvClassifier, BcosLinearClassifier

VIT: dict[str, Any] = dict(
    arch="vit_tiny_patch16_224", img_size=64, num_classes=4, embed_dim=24, num_heads=2, depth=2
)  # fmt: skip
Layer = BcosConv2d | BcosLinear


def vision_transformer(**kwargs: Any) -> nn.Module:
    return enliven(timm.create_model("bcosify", **VIT, **kwargs), real_image(64, 2))


def randomize(model: nn.Module, scale: float = 0.3) -> None:
    """Adapters as if trained: PEFT's begin as updates of zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def adapt(model: nn.Module, kind: str = "LoraConfig", targets: object = "all-linear", **kwargs: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(r=kwargs.pop("r", 2), target_modules=targets, **kwargs)
    adapted = peft.get_peft_model(model, config).eval()
    randomize(adapted)
    return adapted


LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (BcosLinear(6, 8), (3, 5, 6)),
    "linear-free": (BcosLinear(6, 8, b=1.25, normalize_weight=False, bias=True), (3, 6)),
    "linear-maxout": (BcosLinear(6, 4, max_out=2, gamma=3), (3, 6)),
    "conv": (BcosConv2d(4, 8, 3, padding=1), (2, 4, 7, 6)),
    "conv-1x1": (BcosConv2d(4, 8, 1), (2, 4, 7, 6)),
    "conv-maxout": (BcosConv2d(4, 4, (3, 1), 2, b=1.5, max_out=2), (2, 4, 9, 9)),
    "conv-grouped": (BcosConv2d(4, 8, 3, groups=2), (2, 4, 7, 6)),
    "conv-depthwise": (BcosConv2d(4, 4, 3, stride=2, groups=4, antialias=True), (2, 4, 8, 8)),
    "conv-head": (BcosConvClassifier(4, 5, temperature=0.3, logit_bias=-1.0), (2, 4, 7, 6)),
    "linear-head": (BcosLinearClassifier(4, 5, temperature=0.3, logit_bias=-1.0), (2, 4)),
}


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_an_adapter_changes_the_weight_and_merges_into_it(kind: str, name: str) -> None:
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x, before = torch.randn(shape), layer.weight.detach().clone()
    adapted = adapt(nn.Sequential(copy.deepcopy(layer)), kind, ["0"], r=2)
    y = adapted(x)
    update = adapted.base_model.model[0].get_delta_weight("default")
    literal = copy.deepcopy(layer).eval()
    literal.weight = nn.Parameter(before + update.detach())
    torch.testing.assert_close(y, literal(x))
    assert (y - layer.eval()(x)).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), layer(x))
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), y)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(x), y)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is type(layer)
    torch.testing.assert_close(merged(x), y)


@pytest.mark.parametrize("options", [{}, dict(use_effective_conv2d=True)])
@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "LoraConfig"])
def test_unmerged_adapters_are_explained_exactly(kind: str, options: dict[str, Any]) -> None:
    if kind == "LoraConfig" and options:
        pytest.skip("an option of LoHa and LoKr")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = timm_bcos.bcosify(network, timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,)))
    adapted, x = adapt(model, kind, ["1"], **options), torch.rand(2, 3, 12, 12)
    explanation = timm_bcos.explain(adapted, x)
    assert explanation.violations == () and explanation.completeness_error.max() < 1e-5
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(explanation.weights, timm_bcos.explain(merged, x).weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("effective", [False, True])
def test_the_update_of_loha_is_that_of_peft(effective: bool) -> None:
    loha = pytest.importorskip("peft.tuners.loha")
    adapted = adapt(nn.Sequential(BcosConv2d(4, 8, 3)), "LoHaConfig", ["0"], use_effective_conv2d=effective)
    layer: Any = adapted.base_model.model[0]
    expected = loha.Conv2d.get_delta_weight(layer, "default")
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    if effective:
        return  # PEFT 0.21's own gradient by hada_w1_a is that of a product with hada_t2 and hada_w2_b
    parameters = [p for name, p in layer.named_parameters() if "hada" in name]
    direction = torch.randn(expected.shape)
    ours = torch.autograd.grad((layer.get_delta_weight("default") * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    torch.testing.assert_close(ours, theirs)


def test_lora_of_a_vision_transformer_trains_is_exact_and_merges() -> None:
    peft = pytest.importorskip("peft")
    model, x = vision_transformer(positions="attention"), real_image(64, 2)
    assert any(isinstance(module, PositionedQkv) for module in model.modules())
    options = dict(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["qkv", "fc1", "patch_embed.proj"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.testing.assert_close(adapted.eval()(x), model.eval()(x))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(adapted.train()(x), torch.tensor([0, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = adapted.eval()(x)
    verdict = timm_bcos.check(adapted.base_model.model.eval(), x)
    assert verdict.exact, verdict
    explanation = timm_bcos.explain(adapted.base_model.model, x)
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(x), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(timm_bcos.explain(merged, x).weights, explanation.weights, rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_lora_that_is_saved_and_loaded(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, x = vision_transformer(), real_image(64)
    plain = copy.deepcopy(model)
    adapted = adapt(model)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(loaded(x), adapted(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(x), adapted(x), rtol=1e-4, atol=1e-4)


def test_two_adapters_add_up() -> None:
    peft = pytest.importorskip("peft")
    layer, x = BcosConv2d(4, 8, 3, max_out=2), torch.randn(2, 4, 7, 7)
    adapted = adapt(nn.Sequential(layer), targets=["0"])
    adapted.add_adapter("other", peft.LoraConfig(r=3, target_modules=["0"]))
    adapted.base_model.set_adapter(["default", "other"])
    randomize(adapted)
    wrapped = adapted.base_model.model[0]
    literal = copy.deepcopy(layer)
    update = sum(wrapped.get_delta_weight(name) for name in ("default", "other"))
    literal.weight = nn.Parameter((layer.weight + update).detach())
    torch.testing.assert_close(adapted(x), literal(x))


def test_dropout_leaves_out_inputs_of_the_update() -> None:
    layer, x = BcosLinear(6, 8), torch.eye(6)
    adapted = adapt(nn.Sequential(layer), targets=["0"], lora_dropout=0.5)
    wrapped = adapted.base_model.model[0].train()
    update, dropped = wrapped.get_delta_weight("default"), wrapped._update("default")
    kept = (dropped != 0).all(0)
    assert 0 < kept.sum() < 6 and not dropped[:, ~kept].any()
    torch.testing.assert_close(dropped[:, kept], 2 * update[:, kept])
    wrapped.eval()
    torch.testing.assert_close(wrapped._update("default"), update)
    assert adapted(x).shape == (6, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_dora=True), "DoRA has no meaning for B-cos layers"),
        (dict(lora_bias=True), "lora_bias=True: B-cos layers have no bias"),
    ],
)
def test_variants_of_lora_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapt(nn.Sequential(BcosLinear(4, 4)), targets=["0"], **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("IA3Config", dict(feedforward_modules=[])), ("VeraConfig", dict(r=2)), ("OFTConfig", dict(oft_block_size=2))],
)
def test_other_adapters_are_not_merged(kind: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        nn.Sequential(BcosLinear(4, 4)), getattr(peft, kind)(target_modules=["0"], **options)
    ).eval()
    before = adapted(torch.ones(1, 4))
    for merge in (adapted.merge_and_unload, adapted.base_model.merge_adapter):
        with pytest.raises(ModelStateError, match=r"0: .* adds to the response of a BcosLinear.*use LoRA"):
            merge()
    torch.testing.assert_close(adapted(torch.ones(1, 4)), before)


BYPASSING = [
    ("HRAConfig", dict(r=2), BcosLinear(4, 4)),
    ("HRAConfig", dict(r=2), BcosConv2d(4, 4, 1)),
    ("ShiraConfig", dict(r=1), BcosLinear(4, 4)),
    ("BOFTConfig", dict(boft_block_size=2), BcosConv2d(4, 4, 1)),
    ("OFTConfig", dict(oft_block_size=2), BcosConv2d(4, 4, 3)),
]


@pytest.mark.parametrize(("kind", "options", "layer"), BYPASSING)
def test_adapters_that_compute_as_plain_layers_do_are_refused(kind: str, options: dict[str, Any], layer: Layer) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(layer)
    with pytest.raises(InputError, match=rf"0: .*the weight of a {type(layer).__name__} as if.*LoRA"):
        peft.get_peft_model(model, getattr(peft, kind)(target_modules=["0"], **options))
    assert model[0] is layer and layer.weight.requires_grad


AROUND: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": dict(target_r=2, init_r=2, total_step=5),
    "DeloraConfig": dict(r=2),
    "GraloraConfig": dict(r=2, gralora_k=2),
    "IA3Config": dict(feedforward_modules=["0"]),
    "OFTConfig": dict(oft_block_size=2),
    "OSFConfig": dict(),
    "RandLoraConfig": dict(r=2),
    "RoadConfig": dict(group_size=4),
    "VeraConfig": dict(r=2),
    "WaveFTConfig": dict(n_frequency=4),
}


@pytest.mark.parametrize("kind", AROUND)
def test_adapters_around_the_layer_begin_at_its_response(kind: str) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, kind):
        pytest.skip(f"this version of PEFT has no {kind}")
    layer, x = BcosLinear(8, 8), torch.randn(3, 8)
    model = nn.Sequential(copy.deepcopy(layer))
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["0"], **AROUND[kind])).eval()
    calls: list[Tensor] = []
    adapted.base_model.model[0].get_base_layer().register_forward_hook(lambda *args: calls.append(args[-1]))
    torch.testing.assert_close(adapted(x), layer(x))
    assert calls
    randomize(adapted, 0.1)
    assert (adapted(x) - layer(x)).abs().max() > 1e-3


def test_plain_layers_are_as_peft_has_them() -> None:
    lora = pytest.importorskip("peft").tuners.lora
    adapted = adapt(nn.Sequential(nn.Linear(4, 4), BcosLinear(4, 4)), targets=["0", "1"])
    assert type(adapted.base_model.model[0]) is lora.Linear
    dora = adapt(nn.Sequential(nn.Linear(4, 4)), targets=["0"], use_dora=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(dora(x), dora.merge_and_unload()(x))


ORDER = """
import {first}
import {second}
import torch, peft
from torch import nn
from timm_bcos import BcosLinear
adapted = peft.get_peft_model(nn.Sequential(BcosLinear(4, 4)), peft.LoraConfig(target_modules=["0"]))
print(type(adapted.base_model.model[0]).__name__)
"""


@pytest.mark.parametrize(("first", "second"), [("peft", "timm_bcos"), ("timm_bcos", "peft")])
def test_the_order_of_imports_does_not_matter(first: str, second: str) -> None:
    pytest.importorskip("peft")
    code = ORDER.format(first=first, second=second)
    status, output = run_python(code)
    assert status == 0 and "BcosLoraLinear\n" in output, output


def test_an_unknown_version_is_a_warning() -> None:
    from timm_bcos.integrations.registration import register_when_imported

    def register() -> None:
        raise AttributeError("no such table")

    with pytest.warns(UserWarning, match=r"does not know this version of json \(no such table\)"):
        register_when_imported("json", register)


def test_float8_training_is_refused() -> None:
    float8 = pytest.importorskip("torchao.float8")
    model = vision_transformer()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ModelStateError, match=r"blocks\.0\.attn\.qkv: float8 training would replace a BcosLinear"):
        float8.convert_to_float8_training(model)
    assert [type(module) for module in model.modules()] == kinds
    mixed = nn.Sequential(nn.Linear(16, 16), BcosLinear(16, 16))
    float8.convert_to_float8_training(mixed, module_filter_fn=lambda m, name: not isinstance(m, BcosLinear))
    assert [type(module).__name__ for module in mixed] == ["Float8Linear", "BcosLinear"]


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_of_a_fused_network(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = vision_transformer(), real_image(64, 2)
    with pytest.raises(ModelStateError, match=r"qkv: a BcosLinear normalizes its weight.*timm_bcos\.fuse\(model\)"):
        quantization.quantize_(model, getattr(quantization, config)())
    assert type(model.blocks[0].attn.qkv.weight) is nn.Parameter  # type: ignore[union-attr,index]
    logits, fast = model(x).detach(), timm_bcos.fuse(model)
    quantization.quantize_(fast, getattr(quantization, config)())
    assert type(fast.blocks[0].attn.qkv.weight) is not nn.Parameter  # type: ignore[union-attr,index]
    found = fast(x)
    assert 0 < (found - logits).abs().max() < 0.1 * (logits.max() - logits.min())


def test_quantization_that_makes_plain_layers_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    config = qat.QATConfig(quantization.Int8DynamicActivationInt4WeightConfig(group_size=8), step="prepare") if hasattr(
        quantization, "Int8DynamicActivationInt4WeightConfig"
    ) else qat.QATConfig(
        activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=qat.IntxFakeQuantizeConfig(torch.int8, group_size=8), step="prepare",
    )  # fmt: skip
    fused = BcosLinear(8, 8).eval().fuse()
    with pytest.raises(BcosError, match=r"torchao would replace a BcosLinear by a \w+"):
        quantization.quantize_(nn.Sequential(fused), config)


def _count_nothing(module: nn.Module, inputs: object, output: object) -> None:
    """For modules that are not the layers in question."""


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0", "vit_tiny_patch16_224"])
def test_thop_counts_what_it_counts_of_the_plain_network(arch: str) -> None:
    thop = pytest.importorskip("thop")
    plain = timm.create_model(arch, num_classes=10).eval()
    model = timm.create_model("bcosify", arch=arch, num_classes=10, b=2).eval()
    x = torch.rand(1, 3, 224, 224)
    kinds = {type(module) for network in (plain, model) for module in network.modules()}
    others = {kind: _count_nothing for kind in kinds if "Norm" in kind.__name__ or "Pool" in kind.__name__}
    expected, found = (thop.profile(m, (x,), custom_ops=others, verbose=False)[0] for m in (plain, model))
    stem = next(m for m in model.modules() if isinstance(m, BcosConv2d))
    twice = stem.weight.numel() // 2 * (112 * 112 if arch != "vit_tiny_patch16_224" else 14 * 14)  # six channels
    classifier = 10 * 48 * plain.num_features if arch != "vit_tiny_patch16_224" else 0  # at 7 × 7 positions, not 1
    assert found == expected + twice + classifier


def literal_multiply_adds(layer: Layer, positions: int) -> float:
    return float(positions * layer.weight.numel())


@pytest.mark.parametrize("name", list(LAYERS))
def test_multiply_adds_of_layers(name: str) -> None:
    thop = pytest.importorskip("thop")
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    x: Tensor = torch.rand(shape)
    y = layer(x)
    rows = y if y.ndim == 4 else x if isinstance(layer, BcosConv2d) else x.movedim(-1, 1)
    positions = len(rows) * rows.shape[2:].numel()
    assert thop.profile(nn.Sequential(layer), (x,), verbose=False)[0] == literal_multiply_adds(layer, positions)
