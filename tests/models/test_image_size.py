"""Models that are made for images of another size than their pretrained weights."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import enliven, real_image
from timm_bcos import ModelStateError
from timm_bcos.nn.module_utils import image_size

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": dict(depth=1, embed_dim=12, num_heads=2),
    "swin_tiny_patch4_window7_224": dict(depths=(1, 1), embed_dim=12, num_heads=(1, 2), window_size=4),
    "coatnet_0_224": {},
    "visformer_tiny": {},
    "mixer_s32_224": {},
}


@pytest.mark.parametrize("arch", list(SMALL))
@pytest.mark.parametrize("size", [64, (64, 128)])
def test_the_size_that_a_model_was_created_with(arch: str, size: Any) -> None:
    model = timm.create_model(arch, img_size=size, num_classes=4, **SMALL[arch])
    assert image_size(model) == ((64, 64) if size == 64 else size)


def test_sizes_of_other_models() -> None:
    assert image_size(timm.create_model("test_resnet")) == (160, 160)
    assert image_size(nn.Sequential(nn.Conv2d(3, 4, 3))) == (224, 224)


def transformer(size: int) -> nn.Module:
    options = dict(img_size=size, num_classes=4, **SMALL["vit_tiny_patch16_224"])
    return enliven(timm.create_model("bcosify", arch="vit_tiny_patch16_224", **options), real_image(size, 2))


def test_fuse_sees_images_of_the_model_s_size() -> None:
    model = transformer(64)
    x = real_image(64, 2)
    torch.testing.assert_close(timm_bcos.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
    any_model: Any = model
    any_model.set_input_size((96, 96))
    assert image_size(model) == (96, 96)
    x = real_image(96, 2)
    torch.testing.assert_close(timm_bcos.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)


class OfOneSize(nn.Module):
    """A network that takes images of 32 × 32 pixels and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 30 * 30, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


def test_fuse_takes_images_for_a_network_that_does_not_say_its_size() -> None:
    x = real_image(32, 2)
    config = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))
    model = enliven(timm_bcos.bcosify(OfOneSize(), config), x)
    with pytest.raises(ModelStateError, match=r"OfOneSize does not run on images of 224 × 224.*fuse\(model, x\)"):
        timm_bcos.fuse(model)
    fused = timm_bcos.fuse(model, x)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(fused.norm).__name__ == "FoldedNorm"
