"""A network of one's own for timm's scripts, and so for `bcosify`: the ResNets of arXiv 1512.03385, sec. 4.2.

timm knows a model once its function is registered. train.py imports this file by `--device-modules cifar_resnet`, and
then takes `--model cifar_resnet20` as well as `--model bcosify --model-kwargs arch=cifar_resnet20`.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions; where the size changes, the shortcut subsamples and pads channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3, **_: Any) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, 64, in_chans
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, depth)
        self.layer2 = self._stage(16, 32, 2, depth)
        self.layer3 = self._stage(32, 64, 2, depth)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, depth: int) -> nn.Sequential:
        others = [Block(outputs, outputs, 1) for _ in range((depth - 2) // 6 - 1)]
        return nn.Sequential(Block(inputs, outputs, stride), *others)

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


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
