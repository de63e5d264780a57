"""The models of the papers as a table: timm's architecture, its conversion, and the paper's other changes.

Papers: B-cos Networks (CVPR 2022), https://arxiv.org/abs/2205.10268, names `bcos_*`; B-cos Alignment for Inherently
Interpretable CNNs and Vision Transformers (TPAMI 2024), https://arxiv.org/abs/2306.10898, names `bcosv2_*`. Differs
from the official code in that Inception's auxiliary head is optional, as in timm (`aux_logits=True`). `FINETUNED` are
converted pretrained models (B-cosification, NeurIPS 2024, https://arxiv.org/abs/2411.00715) whose weights come with
this package.

`import timm` imports this module, possibly while another module of this package is being imported. So functions import
what builds models when they are called.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ..conversion.config import BcosConfig

__all__ = ["ARCHITECTURES", "FINETUNED", "SECOND_PAPER", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """One registered model.

    Attributes:
        arch: Name of timm's architecture, or a function that builds the plain model.
        config: Config of the conversion.
        kwargs: Default arguments of the architecture.
        prepare: Function that changes the plain model before the conversion; or None.
        finish: Function that changes the converted model; or None.
        feature_cfg: timm's configuration of `features_only`.
        cfg: Entries of the pretrained cfg in addition to the architecture's own.
        tagged: Configs of weights that were trained with another config, by their tag.
    """

    arch: str | Callable[..., nn.Module]
    config: BcosConfig
    kwargs: dict[str, object] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] | None = None
    finish: Callable[[nn.Module], None] | None = None
    feature_cfg: dict[str, object] = field(default_factory=dict)
    cfg: dict[str, object] = field(default_factory=dict)
    tagged: dict[str, BcosConfig] = field(default_factory=dict)

    def build(self, config: BcosConfig, **kwargs: object) -> nn.Module:
        """Build the converted model with random weights.

        Args:
            config: Config of the conversion.
            kwargs: Arguments of the architecture.
        """
        from timm.models import model_entrypoint

        from ..conversion.converted import bcosify
        from ..nn.base import BcosLayer

        build: Any = model_entrypoint(self.arch) if isinstance(self.arch, str) else self.arch
        model = build(**{**self.kwargs, **kwargs})
        if config.mean == self.config.mean:
            config = _for_channels(config, model.in_chans)
        if self.prepare is not None:
            self.prepare(model)
        model = bcosify(model, config)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BcosLayer)]
        for layer in layers:
            layer.reset_parameters()
        if self.finish is not None:
            self.finish(model)
        return model


def _for_channels(config: BcosConfig, channels: int) -> BcosConfig:
    """The config for images of another number of channels: each gets the average mean and standard deviation."""
    if config.mean is None or config.std is None or len(config.mean) == channels:
        return config
    return config.change(mean=(sum(config.mean) / len(config.mean),), std=(sum(config.std) / len(config.std),))


def cnn9(**kwargs: Any) -> nn.Module:
    """The first paper's CNN for CIFAR-10."""
    from .cifar import Cnn9

    return Cnn9(**kwargs)


def cifar_resnet(**kwargs: Any) -> nn.Module:
    """A ResNet for images of 32 × 32 pixels."""
    from .cifar import CifarResNet

    return CifarResNet(**kwargs)


def simple_vit(**kwargs: Any) -> nn.Module:
    """A simple ViT (https://arxiv.org/abs/2205.01580), optionally with a convolutional stem."""
    from .vit import simple_vit

    return simple_vit(**kwargs)


def _flatten_patches(model: nn.Module) -> None:
    from .vit import flatten_patches

    flatten_patches(model)


def _restore_stem_width(model: nn.Module, width: int) -> None:
    from .densenet import restore_stem_width

    restore_stem_width(model, width)


def _fully_convolutional(vgg: Any) -> None:
    """VGG's first fully connected layer as a 7×7 convolution with padding 3, which takes maps of any size."""
    vgg.pre_logits.fc1.padding = (3, 3)
    vgg.pre_logits.input_kernel_size = 1


FLAT: dict[str, object] = dict(flatten_sequential=True)
STEM_WIDTH = {121: 64, 161: 96, 169: 64, 201: 64}  # of DenseNets

CNN9_LOG_T = {1.0: -3, 1.25: -3, 1.5: -2, 1.75: 1, 2.0: 2, 2.25: 2, 2.5: 3}
CNN9_CFG: dict[str, object] = dict(
    input_size=(3, 32, 32), pool_size=(8, 8), num_classes=10, crop_pct=1.0, first_conv="features.0", classifier="fc"
)


def _cnn9(b: float) -> Architecture:
    config = BcosConfig.paper(
        b=b, gamma=10 ** (1.5 * b - 1.75), temperature=10 ** CNN9_LOG_T[b], logit_bias=math.log(0.1 / 0.9)
    )
    return Architecture(cnn9, config, feature_cfg=dict(out_indices=(0, 1, 2), **FLAT), cfg=CNN9_CFG)


V2 = BcosConfig.v2()
RESNET_V2: dict[str, object] = dict(zero_init_last=False)
CONVNEXT_V2: dict[str, object] = dict(conv_mlp=True, conv_bias=False, head_norm_first=True)
CONVNEXT_NORMS = {"": "layernorm2d", "_bnu": "batchnorm2d"}

WIDTH_HEADS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16)}
CONV_STEMS = {
    "tiny": (24, 48, 96, 192),
    "small": (48, 96, 192, 384),
    "base": (64, 128, 128, 256, 256, 512),
    "large": (64, 128, 128, 256, 256, 512),
}


def _vit(size: str, stem: tuple[int, ...] = ()) -> Architecture:
    """A simple ViT; a convolutional stem replaces one block."""
    width, heads = WIDTH_HEADS[size]
    depth = (14 if size == "large" else 12) - bool(stem)
    kwargs: dict[str, object] = dict(
        patch_size=1 if stem else 16, embed_dim=width, depth=depth, num_heads=heads, qkv_bias=False,
        class_token=False, global_pool="avg", pos_embed="none", norm_layer=nn.LayerNorm, stem_widths=stem,
    )  # fmt: skip
    first_conv = "patch_embed.backbone.0.conv" if stem else "patch_embed.proj"
    cfg = dict(input_size=(3, 224, 224), fixed_input_size=True, first_conv=first_conv, classifier="head")
    getter = dict(out_indices=3, feature_cls="getter")
    return Architecture(simple_vit, V2, kwargs, finish=_flatten_patches, feature_cfg=getter, cfg=cfg)


PAPER: dict[str, Architecture] = {
    **{
        f"bcos_densenet{size}": Architecture(
            f"densenet{size}",
            BcosConfig.paper(gamma_scale=100, temperature=1e-3),
            prepare=partial(_restore_stem_width, width=width),
            feature_cfg=FLAT,
        )
        for size, width in STEM_WIDTH.items()
    },
    **{
        f"bcos_resnet{size}": Architecture(f"resnet{size}", BcosConfig.paper(gamma_scale=100, temperature=10))
        for size in (18, 34, 50, 101, 152)
    },
    **{
        f"bcos_vgg{size}": Architecture(
            f"vgg{size}",
            BcosConfig.paper(gamma_scale=1000, temperature=0.1),
            prepare=_fully_convolutional,
            feature_cfg=FLAT,
        )
        for size in (11, 13, 16, 19)
    },
    "bcos_inception_v3": Architecture("inception_v3", BcosConfig.paper(gamma_scale=200)),
    "bcos_cnn9": _cnn9(2.0),
    **{f"bcos_cnn9_b{round(100 * b)}": _cnn9(b) for b in CNN9_LOG_T},
}

SECOND_PAPER: dict[str, Architecture] = {
    **{
        f"bcosv2_{arch}": Architecture(arch, V2, RESNET_V2)
        for arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")
    },
    **{
        f"bcosv2_densenet{size}": Architecture(
            f"densenet{size}", V2, prepare=partial(_restore_stem_width, width=width), feature_cfg=FLAT
        )
        for size, width in STEM_WIDTH.items()
    },
    "bcosv2_vgg11_bn": Architecture("vgg11_bn", V2, prepare=_fully_convolutional, feature_cfg=FLAT),
    **{
        f"bcosv2_convnext_{size}{suffix}": Architecture(
            f"convnext_{size}",
            V2,
            CONVNEXT_V2 | dict(norm_layer=norm),
            feature_cfg=dict(out_indices=(0, 1, 2, 3), **FLAT),
        )
        for size in ("tiny", "base")
        for suffix, norm in CONVNEXT_NORMS.items()
    },
    **{f"bcosv2_vit_{size}_patch16_224": _vit(size) for size in WIDTH_HEADS},
    **{f"bcosv2_vitc_{size}_patch1_14": _vit(size, CONV_STEMS[size]) for size in WIDTH_HEADS},
}

CIFAR_CFG: dict[str, object] = dict(
    input_size=(3, 32, 32), pool_size=(8, 8), num_classes=10, crop_pct=1.0, first_conv="conv1", classifier="linear"
)
IMAGENET_STEM: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

FINETUNED: dict[str, Architecture] = {
    "bcos_efficientnet_lite0": Architecture(
        "tf_efficientnet_lite0",
        BcosConfig.finetune(b=1.25, bias="reference", stem="encoded", probability="softmax"),
        feature_cfg=FLAT,
        cfg=dict(interpolation="bicubic"),
        tagged=dict(
            clothing=BcosConfig.finetune(bias="reference", stem="encoded", antialias=True, logit_bias=-2.2),
        ),
    ),
    "bcos_cifar_resnet20": Architecture(
        cifar_resnet,
        BcosConfig.finetune(logit_bias=-2.2, classify_positions="never", **IMAGENET_STEM),
        feature_cfg=dict(out_indices=(0, 1, 2)),
        cfg=CIFAR_CFG,
    ),
}

ARCHITECTURES = PAPER | SECOND_PAPER | FINETUNED
