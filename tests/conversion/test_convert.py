import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import assert_exact, enliven, normalized, real_image
from timm_bcos import RULES, BcosConfig, BcosConv2d, BcosError, BcosLinear, UnsupportedModuleError, bcosify, keep
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.nn.heads import BcosConvClassifier, BcosLinearClassifier
from timm_bcos.nn.stems import BcosStem

PRESERVE = BcosConfig.finetune(b=1, bias=True)
# architecture and image size
PLAIN = {
    "resnet50": 96,
    "densenet121": 96,
    "convnext_tiny": 96,
    "vit_small_patch16_224": 96,
    "tf_efficientnet_lite0": 96,
}
# one for each thing that the seven files can do
KINDS = {
    **dict.fromkeys(("vgg11", "vgg11_bn", "resnet26t", "seresnet50", "ecaresnet26t", "resnet50_gn"), 64),
    **dict.fromkeys(("resnetblur18", "efficientnet_b0", "mixnet_s", "efficientnet_cc_b0_4e"), 64),
    **dict.fromkeys(("test_efficientnet_evos", "test_efficientnet_gn", "convnextv2_atto", "convnext_tiny_hnf"), 64),
    **dict.fromkeys(("test_vit", "test_vit2", "test_vit3"), 160),
    "inception_v3": 139,
    "vit_dwee_patch16_reg1_gap_256": 64,
}
# arguments that make them shallower or narrower; a stage of two blocks has an identity beside its second
RESNET: dict[str, object] = dict(layers=(2, 1, 1, 1))
SMALLER: dict[str, dict[str, object]] = {
    "convnext_tiny": dict(depths=(1, 1, 1, 1)),
    "convnext_tiny_hnf": dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)),
    "convnextv2_atto": dict(depths=(1, 1, 1, 1)),
    "densenet121": dict(block_config=(2, 2, 2, 2)),
    "ecaresnet26t": RESNET,
    "resnet26t": RESNET,
    "resnet50": RESNET,
    "resnet50_gn": RESNET,
    "resnetblur18": RESNET,
    "seresnet50": RESNET,
    "vgg11": dict(mlp_ratio=0.02),
    "vgg11_bn": dict(mlp_ratio=0.02),
    "vit_dwee_patch16_reg1_gap_256": dict(depth=2, img_size=64),
    "vit_small_patch16_224": dict(depth=2, img_size=96),
}


def plain_and_image(name: str, size: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = timm.create_model(name, **SMALLER.get(name, {})).to(dtype)
    x = real_image(size, 2, dtype)
    return enliven(model, normalized(x, model.pretrained_cfg)), x


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", PLAIN)
def test_function_is_preserved(name: str) -> None:
    model, x = plain_and_image(name, PLAIN[name], torch.float32)
    with torch.no_grad():
        expected = model(normalized(x, model.pretrained_cfg))
        converted = bcosify(model, PRESERVE)
        assert relative_error(converted(x), expected) <= 1e-4
        assert relative_error(converted(timm_bcos.encode_image(x, 3)), expected) <= 1e-4
    assert_exact(converted, x, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_block_is_preserved_and_exact(name: str) -> None:
    model, x = plain_and_image(name, KINDS[name], torch.float64)
    with torch.no_grad():
        expected = model(normalized(x, model.pretrained_cfg))
    converted = bcosify(model, PRESERVE)
    with torch.no_grad():
        assert relative_error(converted(x), expected) <= 1e-10
    verdict = timm_bcos.check(converted, x)
    assert verdict.exact, verdict


@pytest.mark.parametrize(
    "config",
    [BcosConfig(), BcosConfig(b=1.5, bias=True), BcosConfig.v2(), BcosConfig.paper(gamma_scale=100)],
    ids=["finetune", "b1.5", "v2", "paper"],
)
@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("test_convnext", 64), ("test_vit", 160), ("test_efficientnet", 64)]
)
def test_presets_are_exact_and_train(name: str, size: int, config: BcosConfig) -> None:
    x = real_image(size, 2, torch.float64)
    model = bcosify(timm.create_model(name).double(), config.change(temperature=1e-3))
    for module in model.modules():
        if isinstance(module, BcosConv2d | BcosLinear) and config.normalize_weight:
            module.reset_parameters()
    assert_exact(enliven(model, x), x, 1e-10)
    model.train()
    model(x).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_parameters_are_adopted_and_roles_assigned() -> None:
    model = timm.create_model("resnet18")
    weight, norm = model.layer1[0].conv1.weight, model.bn1.weight
    converted = bcosify(model, BcosConfig())
    assert converted is model
    assert isinstance(model, BcosModel)
    assert isinstance(model, timm.models.ResNet)
    assert model.layer1[0].conv1.weight is weight
    assert model.bn1.weight is norm
    assert type(model.conv1) is BcosStem
    assert type(model.fc) is BcosConvClassifier
    assert model.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)
    assert timm.data.resolve_model_data_config(model)["std"] == (1.0, 1.0, 1.0)
    assert all(p.requires_grad for p in model.parameters())


def test_attention_projections_stay_linear() -> None:
    model = bcosify(timm.create_model("test_vit"), BcosConfig())
    attention = model.blocks[0].attn
    assert (attention.qkv.b, attention.qkv.bias, attention.proj.b) == (1.0, None, 2.0)
    assert type(model.head) is BcosLinearClassifier


def test_classifier_moves_before_pooling_only_where_allowed() -> None:
    assert type(bcosify(timm.create_model("test_convnext"), BcosConfig()).head.fc) is BcosLinearClassifier
    assert type(bcosify(timm.create_model("test_convnext"), BcosConfig.v2()).head.fc) is BcosConvClassifier
    assert type(bcosify(timm.create_model("resnet18", global_pool="max"), BcosConfig()).fc) is BcosLinearClassifier
    never = BcosConfig(classify_positions="never")
    assert type(bcosify(timm.create_model("resnet18"), never).fc) is BcosLinearClassifier


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_unsupported_modules_are_all_listed_and_nothing_changes() -> None:
    model = timm.create_model("resnet18")
    model.layer2[1].act2 = Unknown()
    model.layer4[0].act1 = Unknown()
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModuleError) as caught:
        bcosify(model)
    assert len(caught.value.problems) == 2
    for text in ("layer2.1.act2", "layer4.0.act1", "Unknown", "RULES | {Unknown: rule}", "the model is unchanged"):
        assert text in str(caught.value)
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert model.pretrained_cfg["mean"] != (0.0, 0.0, 0.0)
    bcosify(model, rules=RULES | {Unknown: keep})


class Own(nn.Module):
    """A user's model, with a shared convolution, that is no timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.shared
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.again(self.shared(x).relu()).relu()
        return self.fc(x.mean((2, 3)))


def test_own_model() -> None:
    model, x = Own().double().eval(), real_image(16, 2, torch.float64)
    with pytest.raises(BcosError, match=r"BcosConfig\(mean="):
        bcosify(copy.deepcopy(model))
    cfg = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    expected = model(normalized(x, cfg)).detach()
    converted = bcosify(model, BcosConfig.finetune(b=1, bias=True, **cfg))
    torch.testing.assert_close(converted(x).detach(), expected)
    assert converted.shared is converted.again
    assert isinstance(converted.shared, BcosConv2d)
    assert_exact(converted, x, 1e-10)


def test_root_can_be_replaced() -> None:
    stem = bcosify(nn.Conv2d(3, 4, 3), BcosConfig.v2())
    assert isinstance(stem, BcosStem) and isinstance(stem, BcosModel)


def test_models_without_a_convolution_read_through_a_reader() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).double().eval()
    x, cfg = real_image(8, 2, torch.float64), dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    expected = plain(normalized(x, cfg)).detach()
    model = bcosify(plain, BcosConfig.finetune(b=1, bias=True, **cfg))
    torch.testing.assert_close(model(x).detach(), expected)
    assert_exact(model, x, 1e-10)


def test_converting_again_only_converts_what_is_new() -> None:
    model = bcosify(timm.create_model("resnet18"), BcosConfig())
    modules = {name: id(m) for name, m in model.named_modules()}
    assert {name: id(m) for name, m in bcosify(model, BcosConfig()).named_modules()} == modules


@pytest.mark.parametrize(
    ("name", "config"),
    [("resnet18", BcosConfig.v2()), ("test_vit", BcosConfig.v2()), ("test_convnext", BcosConfig(logit_bias=None))],
)
def test_converted_models_copy_pickle_and_reset(name: str, config: BcosConfig) -> None:
    model = bcosify(timm.create_model(name, num_classes=7), config).eval()
    x = real_image(160 if "vit" in name else 64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
        assert type(twin) is type(model)
        assert twin.bcos_config == config
    model.reset_classifier(0)
    features = model(x)
    assert features.ndim == 2
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features)
    model.reset_classifier(4)
    assert isinstance(model.get_classifier(), BcosConvClassifier | BcosLinearClassifier)
    assert model.get_classifier().logit_bias == pytest.approx(-torch.tensor(3.0).log().item())
    assert model(x).shape == (1, 4)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), features)


def test_bad_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm='none'.*keep, uncentered, remove"):
        BcosConfig(norm="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="b >= 1"):
        BcosConfig(b=0)
    with pytest.raises(ValueError, match="needs normalize_weight=True"):
        BcosConfig(max_out=2)
