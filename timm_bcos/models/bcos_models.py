"""What timm learns from this package by importing this module: the papers' networks, fine-tuned ones, and `bcosify`."""

from collections.abc import Callable
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from ..conversion.config import BcosConfig
from ..conversion.converted import bcosify as convert
from ..weights.catalogue import PUBLISHED, hub_addresses
from ..weights.embedded import EMBEDDED
from ..weights.formats import convert_official_weights, convert_plain_weights
from ..weights.pretrained import load_pretrained
from .networks import FINETUNED, NETWORKS, SECOND_PAPER, Network

PAPER_CFG: dict[str, Any] = dict(
    paper_name="B-cos Networks: Alignment is All We Need for Interpretability",
    paper_ids="arXiv:2205.10268",
    origin_url="https://github.com/moboehle/B-cos",
)
SECOND_PAPER_CFG: dict[str, Any] = dict(
    paper_name="B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers",
    paper_ids="arXiv:2306.10898",
    origin_url="https://github.com/B-cos/B-cos-v2",
)
FINETUNED_CFG: dict[str, Any] = dict(
    paper_name="B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
    paper_ids="arXiv:2411.00715",
    origin_url="https://github.com/shrebox/B-cosification",
)
UNNORMALISED: dict[str, Any] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GEOMETRY = ("input_size", "pool_size", "first_conv", "classifier", "fixed_input_size", "min_input_size")


def _cfg(network: Network, paper: dict[str, Any]) -> dict[str, Any]:
    """A pretrained cfg: the architecture's geometry, images in [0, 1] without normalisation."""
    plain = {} if isinstance(network.arch, type) else resolve_pretrained_cfg(network.arch).to_dict()
    geometry = {key: plain[key] for key in GEOMETRY if plain.get(key) is not None}
    ours = dict(num_classes=1000, crop_pct=0.875, interpolation="bilinear", license="apache-2.0", **UNNORMALISED)
    return {**geometry, **ours, **paper, **network.cfg}


def _cfgs() -> dict[str, Any]:
    """By name and tag; networks without published weights have one without a tag."""
    cfgs: dict[str, Any] = {"bcosify": _cfg(Network("resnet50", BcosConfig()), PAPER_CFG)}
    hub = {tagged: dict(hf_hub_id=address) for tagged, address in hub_addresses().items()}
    for name, network in NETWORKS.items():
        cfg = _cfg(network, _paper(name))
        crop = cfg["input_size"][-1]
        weights = {f"{name}.{published.tag}": published.cfg(crop) for published in PUBLISHED.get(name, ())}
        weights |= {tagged: own for tagged, own in EMBEDDED.items() if tagged.partition(".")[0] == name}
        cfgs |= {tagged: cfg | found | hub.get(tagged, {}) for tagged, found in (weights or {name: {}}).items()}
    return cfgs


def _paper(name: str) -> dict[str, Any]:
    return FINETUNED_CFG if name in FINETUNED else SECOND_PAPER_CFG if name in SECOND_PAPER else PAPER_CFG


def _create(
    name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    network = NETWORKS[name]
    changes, kwargs = BcosConfig.split(kwargs)
    config = network.config.change(**changes)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()

    def build(**model_kwargs: Any) -> nn.Module:
        model = network.build(config, **model_kwargs)
        if pretrained:  # timm's own loading verifies no hash, and knows nothing of encoded images
            load_pretrained(model, cfg, convert_official_weights, cache_dir)
        return model

    return build_model_with_cfg(build, name, False, pretrained_cfg=cfg, feature_cfg=dict(network.feature_cfg), **kwargs)


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
    overlay = pretrained_cfg_overlay or {}
    has_source = any({**given, **overlay}.get(key) for key in WEIGHT_SOURCES)
    no_weights = dict.fromkeys((*WEIGHT_SOURCES, "hf_hub_filename", "tag"), None)
    cfg = {**plain_cfg, **no_weights, "architecture": "bcosify", "custom_load": False, **UNNORMALISED, **given}
    cfg = resolve_pretrained_cfg("bcosify", cfg, overlay).to_dict()

    def build(**model_kwargs: Any) -> nn.Module:
        own_weights = pretrained and not has_source
        plain = model_entrypoint(arch_name)(
            pretrained=own_weights, pretrained_cfg=tag or None, cache_dir=cache_dir, **model_kwargs
        )
        model = convert(plain, config)
        if pretrained and has_source:
            load_pretrained(model, cfg, convert_plain_weights, cache_dir)
        return model

    return build_model_with_cfg(
        build, "bcosify", False, pretrained_cfg=cfg, feature_cfg=dict(feature_cls="getter", out_indices=None), **kwargs
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """timm registers functions, under their names."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_converted(pretrained, **kwargs) if name == "bcosify" else _create(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = _create_converted.__doc__ if name == "bcosify" else _describe(NETWORKS[name])
    return entry


def _describe(network: Network) -> str:
    arch = network.arch.__name__ if isinstance(network.arch, type) else network.arch
    return f"{arch} as a B-cos network. Keywords: timm's, and those of `timm_bcos.BcosConfig`."


default_cfgs = generate_default_cfgs(_cfgs())
ENTRY_POINTS = {name: register_model(_entry_point(name)) for name in (*NETWORKS, "bcosify")}
