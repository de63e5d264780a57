"""torchvision's models convert as timm's do: one of each model file, made small where its builder allows."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import swin_transformer as swin
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.vision_transformer import VisionTransformer

import timm_bcos
from tests.helpers import enliven, normalized, real_image
from timm_bcos import BcosConfig, BcosError, UnsupportedModuleError, bcosify
from timm_bcos.conversion.inspection import image_statistics
from timm_bcos.conversion.replacements.attention import BcosAttention
from timm_bcos.nn.heads import BcosConvClassifier, BcosLinearClassifier
from timm_bcos.nn.stems import BcosStem, ImageReader

PRESERVE = BcosConfig.finetune(b=1, bias=True)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def with_small_head(builder: Callable[..., nn.Module], features: int, first: int) -> nn.Module:
    """AlexNet and VGG with three narrow linear layers instead of a hundred million weights."""
    with torch.device("meta"):
        model = builder(num_classes=7)
        model.classifier[first] = nn.Linear(4 * features, 32)
        model.classifier[first + 3] = nn.Linear(32, 32)
        model.classifier[6] = nn.Linear(32, 7)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
    return model


models = torchvision.models


def vit() -> nn.Module:
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)
    model.heads.head.reset_parameters()  # which starts at 0
    return model


def swin_v2() -> nn.Module:
    return models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [8, 8], num_classes=7, block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )  # fmt: skip


UNTRAINED = dict(num_classes=7, init_weights=False, transform_input=True)
# builder and image size
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (lambda: with_small_head(models.alexnet, 256, 1), 64),
    "convnext": (lambda: models.ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=7), 32),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 16, num_classes=7), 32),
    "efficientnet": (lambda: models.efficientnet_b0(num_classes=7), 32),
    "googlenet": (lambda: models.googlenet(aux_logits=True, **UNTRAINED), 64),
    "inception": (lambda: models.inception_v3(aux_logits=False, **UNTRAINED), 80),
    "maxvit": (lambda: MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=7), 32),
    "mnasnet": (lambda: models.mnasnet0_5(num_classes=7), 32),
    "mobilenetv2": (lambda: models.mobilenet_v2(num_classes=7, width_mult=0.25), 32),
    "mobilenetv3": (lambda: models.mobilenet_v3_small(num_classes=7), 32),
    "regnet": (lambda: models.regnet_y_400mf(num_classes=7), 32),
    "resnet": (lambda: models.resnet18(num_classes=7), 32),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(num_classes=7), 32),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=7), 32),
    "swin": (lambda: models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=7), 64),
    "swin_v2": (swin_v2, 64),
    "vgg": (lambda: with_small_head(models.vgg11, 512, 0), 32),
    "vgg_bn": (lambda: with_small_head(models.vgg11_bn, 512, 0), 32),
    "vit": (vit, 32),
}


def plain_and_image(name: str, batch: int = 2) -> tuple[nn.Module, Tensor]:
    builder, size = ARCHITECTURES[name]
    x = real_image(size, batch, torch.float64)
    return enliven(builder().double(), normalized(x, IMAGENET)), x


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_function_is_preserved_and_exact(name: str) -> None:
    model, x = plain_and_image(name)
    with torch.no_grad():
        expected = model(normalized(x, IMAGENET))
        converted = bcosify(model, PRESERVE)
        torch.testing.assert_close(converted(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert timm_bcos.explain(converted, x).completeness_error.max() <= 1e-10
    with torch.no_grad():
        found = converted.float()(x.float())
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bcos_conversion_is_exact_and_trains(name: str) -> None:
    builder, size = ARCHITECTURES[name]
    x = real_image(size, 2, torch.float64)
    gamma = 8.0 if name in ("squeezenet", "vgg") else 1.0  # without norms the signal of an untrained model fades
    model = enliven(bcosify(builder().double(), BcosConfig(gamma=gamma)), x)
    verdict = timm_bcos.check(model, x)
    assert verdict.exact, verdict
    assert verdict.image_share == verdict.image_share, "there is a signal"
    heads = [m for m in model.modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    assert len(heads) == (3 if name == "googlenet" else 1)
    plain = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert {*map(id, plain)} <= {*map(id, gates(model))}
    outputs = model.train()(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().sum() for output in outputs).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


def gates(model: nn.Module) -> list[nn.Module]:
    squeezes = [m for m in model.modules() if isinstance(m, torchvision.ops.SqueezeExcitation)]
    return [inner for squeeze in squeezes for inner in squeeze.modules()]


@pytest.mark.parametrize("name", ["resnet", "inception", "swin", "vit"])
def test_converted_models_copy_pickle_and_take_the_encoding(name: str) -> None:
    model, x = plain_and_image(name, 1)
    model = bcosify(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
        assert type(twin) is type(model)
    torch.testing.assert_close(model(timm_bcos.encode_image(x, 3)), expected)
    assert isinstance(model, timm_bcos.conversion.converted.BcosModel)


def test_what_reads_the_image() -> None:
    """The first convolution; a reader where the model splits the colors itself, as with Inception's weights."""
    assert type(bcosify(models.resnet18()).conv1) is BcosStem
    assert type(bcosify(models.googlenet(aux_logits=False, **UNTRAINED)).image_reader) is ImageReader
    plain = models.googlenet(aux_logits=False, init_weights=False)
    assert type(bcosify(plain).conv1.conv) is BcosStem


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_window_attention_calls_its_projections(name: str) -> None:
    """torchvision's own attention would use the B-cos layer's weight as that of a linear one."""
    model, x = plain_and_image(name, 1)
    attention = bcosify(model).features[1][1].attn
    assert (attention.qkv.b, attention.proj.b) == (1.0, 2.0)
    seen = []
    attention.proj.register_forward_hook(lambda module, args, output: seen.append(output.abs().max().item()))
    model(x)
    assert seen and seen[0] > 0


MASKS = {
    "none": {},
    "causal": dict(attn_mask=torch.ones(5, 5).triu(1).bool()),
    "additive": dict(attn_mask=torch.linspace(-2, 0, 25, dtype=torch.float64).reshape(5, 5)),
    "by head": dict(attn_mask=torch.linspace(-2, 0, 100, dtype=torch.float64).reshape(4, 5, 5)),
    "padding": dict(key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
    "per head weights": dict(average_attn_weights=False),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_torchs(mask: str, batch_first: bool) -> None:
    plain = nn.MultiheadAttention(6, 2, batch_first=batch_first).double().eval()
    nn.init.normal_(plain.in_proj_bias)
    nn.init.normal_(plain.out_proj.bias)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleList([copy.deepcopy(plain)]), nn.Linear(4, 4))
    attention = bcosify(network, PRESERVE.change(mean=(0.0,), std=(1.0,)))[1][0]
    assert isinstance(attention, BcosAttention)
    x = torch.rand(2, 5, 6, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    for query, key, value in ((x, x, x), (x, x.flip(-1), x.roll(1, -1))):
        for found, expected in zip(
            attention(query, key, value, **MASKS[mask]), plain(query, key, value, **MASKS[mask]), strict=True
        ):
            torch.testing.assert_close(found, expected)
    one = torch.rand(5, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(one, one, one), plain(one, one, one))
    assert attention(x, x, x, need_weights=False)[1] is None
    nn.init.zeros_(attention.in_proj.weight)
    attention.load_state_dict(plain.state_dict())
    torch.testing.assert_close(attention.in_proj.weight, plain.in_proj_weight)


@pytest.mark.parametrize(
    "kwargs", [dict(kdim=3), dict(add_zero_attn=True), dict(add_bias_kv=True)], ids=lambda kwargs: next(iter(kwargs))
)
def test_unusual_attention_is_refused(kwargs: dict[str, int]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleList([nn.MultiheadAttention(6, 2, **kwargs)]), nn.Linear(4, 4))
    with pytest.raises(UnsupportedModuleError, match=r"1\.0: .*MultiheadAttention .*write a rule"):
        bcosify(network, BcosConfig(mean=(0.0,), std=(1.0,)))


def test_statistics_come_from_the_weights() -> None:
    with torch.device("meta"):
        assert image_statistics(models.resnet18(num_classes=3)) == (IMAGENET["mean"], IMAGENET["std"])
        assert image_statistics(models.efficientnet_b0()) == (IMAGENET["mean"], IMAGENET["std"])
        assert image_statistics(models.efficientnet_v2_l(num_classes=5)) == ((0.5,) * 3, (0.5,) * 3)
        narrow = models.efficientnet_b0()
        narrow.features[8][0] = nn.Conv2d(320, 1280, 1)  # with a bias: of no weights' size
    assert image_statistics(narrow) == (None, None)
    with pytest.raises(BcosError, match=r"pass BcosConfig\(mean="):
        bcosify(narrow)


def test_functional_activations_go_where_they_can() -> None:
    model = bcosify(models.googlenet(aux_logits=False, init_weights=False), BcosConfig.v2()).eval()
    maps = []
    model.conv2.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        model(real_image(64))
    assert maps[0].min() < 0
    with pytest.raises(UnsupportedModuleError, match=r"\(root\): .*DenseNet applies a ReLU"):
        bcosify(models.DenseNet(8, (2, 2), 16), BcosConfig.v2())
