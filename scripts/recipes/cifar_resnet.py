"""Register a model of one's own in timm, so that its scripts know it, and `bcosify` too: the ResNets for CIFAR-10.

train.py imports this file by `--device-modules cifar_resnet` (PYTHONPATH says where it is), and then takes
`--model cifar_resnet20` as well as `--model bcosify --model-kwargs arch=cifar_resnet20`.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_bcos.models.cifar import CifarResNet

CFG = dict(
    url="", num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation="bilinear",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), first_conv="conv1", classifier="linear",
)  # fmt: skip
default_cfgs = generate_default_cfgs({"cifar_resnet20": CFG, "cifar_resnet56": CFG})


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, "cifar_resnet56", pretrained, depth=56, **kwargs)
