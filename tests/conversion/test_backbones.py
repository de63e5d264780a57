"""timm's feature backbones, `features_only=True`, and models without pooling: converted, they give the same maps."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import timm_bcos
from tests.helpers import normalized, real_image
from timm_bcos import BcosConfig, bcosify
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.nn.heads import BcosConvClassifier, BcosLinearClassifier

PRESERVE = BcosConfig.finetune(b=1, bias=True)
# Of each of timm's classes for backbones, layers that keep their names and others, channels first and last.
ARCHITECTURES = {
    "list": ("test_resnet", {}),
    "list of flattened sequences": ("densenet121", dict(growth_rate=4, block_config=(1, 1, 1, 1))),
    "list, first layer within a block": ("test_efficientnet", {}),
    "list with a reader": ("dla46x_c", {}),
    "list, channels last": ("test_mambaout", {}),
    "hooks": ("efficientnet_lite0", dict(feature_cls="hook")),
    "hooks by architecture": ("mobilenetv3_small_050", dict(out_indices=(1, 3))),
    "dict": ("test_resnet", dict(feature_cls="dict")),
    "getter": ("test_vit", {}),
    "getter of some": ("test_vit", dict(out_indices=(-1,))),
    "getter of a model with maps": ("test_resnet", dict(feature_cls="getter", out_indices=2)),
    "channels last": ("swin_tiny_patch4_window7_224", dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))),
    "two layers read": ("ghostnet_050", {}),
    "splits the image": ("volo_d1_224", dict(features_only=True)),
}


def maps(found: object) -> list[torch.Tensor]:
    return list(found.values()) if isinstance(found, dict) else list(found)  # type: ignore[call-overload]


def plain(name: str) -> nn.Module:
    arch, kwargs = ARCHITECTURES[name]
    try:
        return timm.create_model(arch, **{"features_only": True, **kwargs}).eval()
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        pytest.skip(f"timm has no backbone of {arch}: {error}")


def image(model: nn.Module) -> torch.Tensor:
    cfg = model.pretrained_cfg
    return real_image(cfg["input_size"][-1] if cfg.get("fixed_input_size") else 96)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backbones_convert_and_give_the_same_maps(name: str) -> None:
    model = plain(name)
    x = image(model)
    with torch.no_grad():
        expected = maps(model(normalized(x, model.pretrained_cfg)))
        converted = bcosify(model, PRESERVE)
        found = maps(converted(x))
    assert isinstance(converted, BcosModel) and [m.shape for m in found] == [m.shape for m in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bcosify_gives_the_backbone_of_the_architecture(name: str) -> None:
    model = plain(name)
    arch, kwargs = ARCHITECTURES[name]
    x = image(model)
    with torch.no_grad():
        expected = maps(model(x))
    converted = timm.create_model("bcosify", arch=arch, **{"features_only": True, **kwargs}).eval()
    with torch.no_grad():
        found = converted(x)
    assert type(converted).__name__ == f"Bcos{type(model).__name__}" and isinstance(found, dict) == (name == "dict")
    assert [m.shape for m in maps(found)] == [m.shape for m in expected]
    assert converted.feature_info.channels() == model.feature_info.channels()
    assert converted.feature_info.reduction() == model.feature_info.reduction()
    assert converted.pretrained_cfg["mean"] == (0.0,) * 3 and "num_classes" not in converted.pretrained_cfg


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout", "densenet121"])
def test_backbones_of_trained_models(arch: str, tmp_path: Path) -> None:
    kwargs = dict(growth_rate=4, block_config=(1, 1, 1, 1)) if arch == "densenet121" else {}
    whole = timm.create_model("bcosify", arch=arch, num_classes=4, b=1.5, **kwargs).eval()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=4)
    backbone = timm.create_model(
        "bcosify", arch=arch, b=1.5, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4,
        **kwargs,
    ).eval()  # fmt: skip
    x = image(whole)
    last, expected = maps(backbone(x))[-1], whole.forward_features(x)
    if arch == "test_vit":
        expected = whole.forward_intermediates(x, indices=[backbone.feature_info.out_indices[-1]])[1][0]
    torch.testing.assert_close(last, expected)


def test_a_backbone_explains_a_unit() -> None:
    model = timm.create_model("bcosify", arch="test_mambaout", features_only=True).eval()
    x = real_image(96)
    last = nn.Sequential(model, Last()).eval()
    found = timm_bcos.explain(last, x, 1)
    assert found.completeness_error.max() < 1e-3


def test_no_layer_of_a_backbone_is_a_classifier() -> None:
    for arch in ("test_efficientnet", "mobilenetv3_small_050", "test_resnet", "test_vit"):
        model = timm.create_model("bcosify", arch=arch, features_only=True, logit_bias=-2.2)
        assert not [m for m in model.modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)], arch


class Last(nn.Module):
    def forward(self, found: list[torch.Tensor]) -> torch.Tensor:
        return found[-1].mean((1, 2))


@pytest.mark.parametrize("arch", ["test_convnext", "test_resnet", "davit_tiny", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_models_without_pooling_keep_their_shape(arch: str, num_classes: int) -> None:
    small = dict(depths=(1, 1, 1, 1)) if "tiny" in arch else {}
    model = timm.create_model(arch, num_classes=num_classes, global_pool="", **small).eval()
    x = image(model)
    try:
        expected = model(normalized(x, model.pretrained_cfg))
    except RuntimeError:
        pytest.skip("timm's own classifier reads no maps")
    converted = bcosify(model, PRESERVE)
    torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-4)
    created = timm.create_model("bcosify", arch=arch, num_classes=num_classes, global_pool="", **small).eval()
    assert created(x).shape == expected.shape
