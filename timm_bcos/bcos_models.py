"""The networks that timm learns from this package, as a table; importing this module registers them.

Papers: B-cos Networks (CVPR 2022), https://arxiv.org/abs/2205.10268. Each family is timm's own architecture, converted
by the same engine as a user's model (`timm_bcos.convert`), so every timm feature keeps working. Differs from the
official code in that Inception's auxiliary head is optional, as in timm (`aux_logits=True`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor, nn

from .bcos_cnn import Cnn9
from .bcos_densenet import restore_stem_width
from .config import BcosConfig
from .convert import bcosify as convert
from .layers import BcosConv2d, BcosLinear, BcosStem

PAPER: dict[str, Any] = dict(
    paper_name="B-cos Networks: Alignment is All We Need for Interpretability",
    paper_ids="arXiv:2205.10268",
    origin_url="https://github.com/moboehle/B-cos",
)
UNNORMALISED: dict[str, Any] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Network:
    """One registered network.

    Attributes:
        arch: timm's architecture, or a class.
        config: Its conversion.
        prepare: What the family changes in the plain architecture first.
        feature_cfg: How timm's `features_only` takes it apart.
        cfg: What its pretrained cfg says beyond the architecture's own.
    """

    arch: str | type[nn.Module]
    config: BcosConfig
    prepare: Callable[[Any], None] | None = None
    feature_cfg: dict[str, Any] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)

    def build(self, config: BcosConfig, **kwargs: Any) -> nn.Module:
        """The converted network with fresh weights; kwargs are the architecture's."""
        model = self.arch(**kwargs) if isinstance(self.arch, type) else model_entrypoint(self.arch)(**kwargs)
        if self.prepare is not None:
            self.prepare(model)
        model = convert(model, config)
        for module in model.modules():
            if isinstance(module, BcosConv2d | BcosLinear):
                module.reset_parameters()
        return model


def _fully_convolutional(vgg: Any) -> None:
    """VGG's first fully connected layer as a 7×7 convolution with padding 3, at whatever resolution."""
    vgg.pre_logits.fc1.padding = (3, 3)
    vgg.pre_logits.input_kernel_size = 1


FLAT: dict[str, Any] = dict(flatten_sequential=True)
CNN9_LOG_T = {1.0: -3, 1.25: -3, 1.5: -2, 1.75: 1, 2.0: 2, 2.25: 2, 2.5: 3}
CNN9_CFG: dict[str, Any] = dict(
    input_size=(3, 32, 32), pool_size=(8, 8), num_classes=10, crop_pct=1.0, first_conv="features.0", classifier="fc"
)


def _cnn9(b: float) -> Network:
    config = BcosConfig.paper(
        b=b, gamma=10 ** (1.5 * b - 1.75), temperature=10 ** CNN9_LOG_T[b], logit_bias=math.log(0.1 / 0.9)
    )
    return Network(Cnn9, config, feature_cfg=dict(out_indices=(0, 1, 2), **FLAT), cfg=CNN9_CFG)


NETWORKS: dict[str, Network] = {
    **{
        f"bcos_densenet{size}": Network(
            f"densenet{size}",
            BcosConfig.paper(gamma_scale=100, temperature=1e-3),
            partial(restore_stem_width, width=stem_width),
            FLAT,
        )
        for size, stem_width in {121: 64, 161: 96, 169: 64, 201: 64}.items()
    },
    **{
        f"bcos_resnet{size}": Network(f"resnet{size}", BcosConfig.paper(gamma_scale=100, temperature=10))
        for size in (18, 34, 50, 101, 152)
    },
    **{
        f"bcos_vgg{size}": Network(
            f"vgg{size}", BcosConfig.paper(gamma_scale=1000, temperature=0.1), _fully_convolutional, FLAT
        )
        for size in (11, 13, 16, 19)
    },
    "bcos_inception_v3": Network("inception_v3", BcosConfig.paper(gamma_scale=200)),
    "bcos_cnn9": _cnn9(2.0),
    **{f"bcos_cnn9_b{round(100 * b)}": _cnn9(b) for b in CNN9_LOG_T},
}


def _cfg(network: Network) -> dict[str, Any]:
    """A pretrained cfg: the architecture's geometry, images in [0, 1] without normalisation."""
    keep = ("input_size", "pool_size", "first_conv", "classifier", "fixed_input_size", "min_input_size")
    plain = {} if isinstance(network.arch, type) else resolve_pretrained_cfg(network.arch).to_dict()
    geometry = {key: plain[key] for key in keep if plain.get(key) is not None}
    ours = dict(num_classes=1000, crop_pct=0.875, interpolation="bilinear", license="apache-2.0", **UNNORMALISED)
    return {**geometry, **ours, **PAPER, **network.cfg}


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    network = NETWORKS[name]
    changes, kwargs = BcosConfig.split(kwargs)
    config = network.config.change(**changes)

    def build(**model_kwargs: Any) -> nn.Module:
        return network.build(config, **model_kwargs)

    return build_model_with_cfg(build, name, pretrained, feature_cfg=dict(network.feature_cfg), **kwargs)


WEIGHT_SOURCES = ("file", "url", "state_dict", "hf_hub_id")


def _create_converted(
    pretrained: bool = False,
    arch: str = "resnet50",
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model('bcosify', arch=...)`: any timm model, converted.

    `pretrained=True` starts from the architecture's own weights; where the cfg or its overlay names a weight source,
    that is loaded after the conversion instead, be it converted weights or plain ones.
    """
    changes, kwargs = BcosConfig.split(kwargs)
    config = BcosConfig.finetune(**changes)
    arch_name, tag = split_model_name_tag(arch)
    plain_cfg = resolve_pretrained_cfg(arch_name, pretrained_cfg=tag or None).to_dict()
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    sources = {key: value for key in WEIGHT_SOURCES if (value := {**given, **(pretrained_cfg_overlay or {})}.get(key))}
    no_weights = dict.fromkeys((*WEIGHT_SOURCES, "hf_hub_filename", "tag"), None)
    cfg = {**plain_cfg, **no_weights, "architecture": "bcosify", "custom_load": False, **UNNORMALISED, **given}

    def build(**model_kwargs: Any) -> nn.Module:
        own_weights = pretrained and not sources
        plain = model_entrypoint(arch_name)(
            pretrained=own_weights, pretrained_cfg=tag or None, cache_dir=cache_dir, **model_kwargs
        )
        return convert(plain, config)

    return build_model_with_cfg(
        build, "bcosify", pretrained and bool(sources), pretrained_cfg=cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay, pretrained_filter_fn=convert_plain_weights,
        feature_cfg=dict(feature_cls="getter", out_indices=None), cache_dir=cache_dir, **kwargs,
    )  # fmt: skip


def convert_plain_weights(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the weights of a plain network into those of its conversion; converted ones pass unchanged.

    Args:
        state_dict: From timm's architecture, or from the converted network.
        model: The converted network.

    Returns:
        A state dict that `model` loads.
    """
    stems = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, BcosStem)}
    own = model.state_dict()
    if all(key not in state_dict or state_dict[key].shape == own[key].shape for key in stems):
        return state_dict
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BcosConv2d | BcosLinear)}
    units = {f"{name}.weight": m.max_out for name, m in layers.items() if m.max_out > 1}
    converted = {}
    for key, value in state_dict.items():
        if key not in own:
            continue  # biases and running means that the conversion dropped
        if key in stems:
            value = torch.cat([value, -value], 1) / 2
        if key in units:
            value = value.repeat_interleave(units[key], 0)
        if value.ndim == 2 and own[key].ndim == 4:  # a linear classifier that now votes per position
            value = value[:, :, None, None]
        converted[key] = value
    return converted


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """timm registers functions, under their names."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_converted(pretrained, **kwargs) if name == "bcosify" else _create(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = _create_converted.__doc__ if name == "bcosify" else f"{NETWORKS[name].arch} as a B-cos network."
    return entry


_cfgs: dict[str, Any] = {name: _cfg(network) for name, network in NETWORKS.items()}
default_cfgs = generate_default_cfgs(_cfgs | {"bcosify": _cfg(Network("resnet50", BcosConfig()))})
ENTRY_POINTS = {name: register_model(_entry_point(name)) for name in (*NETWORKS, "bcosify")}
