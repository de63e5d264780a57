"""Importing this module registers our models with timm: the papers' models, fine-tuned ones, and `bcosify`.

`import timm` imports it, possibly in the middle of importing another module of this package. So it imports what builds
models and loads weights only in the functions that do so.
"""

import copy
import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    load_model_config_from_hf,
    model_entrypoint,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from .._compat import private
from ..conversion.config import BcosConfig
from ..errors import CheckpointError, NotFineTunedWarning, TargetError
from ..files import first_line
from ..weights.catalog import EMBEDDED, PUBLISHED, hub_addresses
from .architectures import ARCHITECTURES, FINETUNED, SECOND_PAPER, Architecture

if TYPE_CHECKING:
    from ..weights.formats import StateDict

PAPER_CFG = dict(
    paper_name="B-cos Networks: Alignment is All We Need for Interpretability",
    paper_ids="arXiv:2205.10268",
    origin_url="https://github.com/moboehle/B-cos",
)
SECOND_PAPER_CFG = dict(
    paper_name="B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers",
    paper_ids="arXiv:2306.10898",
    origin_url="https://github.com/B-cos/B-cos-v2",
)
FINETUNED_CFG = dict(
    paper_name="B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
    paper_ids="arXiv:2411.00715",
    origin_url="https://github.com/shrebox/B-cosification",
)
UNNORMALIZED = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GEOMETRY = ("input_size", "pool_size", "first_conv", "classifier", "fixed_input_size", "min_input_size")


def _cfg(network: Architecture, paper: dict[str, str]) -> dict[str, Any]:
    """A pretrained cfg: the architecture's geometry, images in [0, 1] without normalization."""
    plain = resolve_pretrained_cfg(network.arch).to_dict() if isinstance(network.arch, str) else {}
    geometry = {key: plain[key] for key in GEOMETRY if plain.get(key) is not None}
    ours = dict(num_classes=1000, crop_pct=0.875, interpolation="bilinear", license="apache-2.0", **UNNORMALIZED)
    return {**geometry, **ours, **paper, **network.cfg}


def _cfgs() -> dict[str, Any]:
    """By name and tag; networks without published weights have one without a tag."""
    cfgs: dict[str, Any] = {"bcosify": _cfg(Architecture("resnet50", BcosConfig()), PAPER_CFG)}
    hub = {tagged: dict(hf_hub_id=address) for tagged, address in hub_addresses().items()}
    for name, network in ARCHITECTURES.items():
        cfg = _cfg(network, _paper(name))
        crop = cfg["input_size"][-1]
        weights = {f"{name}.{published.tag}": published.cfg(crop) for published in PUBLISHED.get(name, ())}
        weights |= {tagged: own for tagged, own in EMBEDDED.items() if tagged.partition(".")[0] == name}
        cfgs |= {tagged: cfg | found | hub.get(tagged, {}) for tagged, found in (weights or {name: {}}).items()}
    return cfgs


def _paper(name: str) -> dict[str, str]:
    return FINETUNED_CFG if name in FINETUNED else SECOND_PAPER_CFG if name in SECOND_PAPER else PAPER_CFG


def _create(
    name: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, object] | None = None,
    pretrained_cfg_overlay: dict[str, object] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    from ..weights.formats import convert_official_weights
    from ..weights.pretrained import load_pretrained

    network = ARCHITECTURES[name]
    changes, kwargs = BcosConfig.split(kwargs)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    config = network.tagged.get(cfg.get("tag") or "", network.config).change(**changes)

    def build(**model_kwargs: object) -> nn.Module:
        model = network.build(config, **model_kwargs)
        if pretrained:  # timm's own loading verifies no hash, and knows nothing of encoded images
            load_pretrained(model, cfg, convert_official_weights, cache_dir, changes)
        return model

    return build_model_with_cfg(build, name, False, pretrained_cfg=cfg, feature_cfg=dict(network.feature_cfg), **kwargs)


BACKBONE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")  # of timm's create_model
HEAD_CFG = ("num_classes", "classifier", "global_pool")  # what a backbone's cfg does not say
WEIGHT_SOURCES = ("file", "url", "state_dict", "hf_hub_id")


def _create_converted(
    pretrained: bool = False,
    arch: str = "resnet50",
    arch_kwargs: dict[str, object] | None = None,
    pretrained_cfg: str | dict[str, object] | None = None,
    pretrained_cfg_overlay: dict[str, object] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model('bcosify', arch=...)`: any timm model, converted.

    Args:
        pretrained: Start from the architecture's own weights; where the cfg or its overlay names a weight source, that
            is loaded after the conversion instead, be it converted weights or plain ones.
        arch: timm's name, 'hf-hub:ORG/NAME' or 'local-dir:PATH'.
        arch_kwargs: Arguments of the architecture. Those that no field of `BcosConfig` is called like can stand among
            the others; `arch_kwargs=dict(bias=...)` is for those that one is.
        pretrained_cfg: timm's.
        pretrained_cfg_overlay: timm's.
        cache_dir: Where downloads go.
        kwargs: Fields of `timm_bcos.BcosConfig`, and arguments of the architecture.

    Raises:
        TargetError: For an architecture that timm does not know, or that is a B-cos network already.
        CheckpointError: If the Hub or the directory has no such network.

    Examples:
        >>> timm.create_model("bcosify", arch="resnet50", pretrained=True, b=1, bias=True)  # computes the same
        >>> timm.create_model("bcosify", arch="swin_tiny_patch4_window7_224", features_only=True)  # timm's own maps
        >>> timm.create_model("bcosify", arch="test_resnet", arch_kwargs=dict(norm_layer="groupnorm"))
    """
    from ..conversion.converted import bcosify as convert
    from ..weights.pretrained import fill_backbone, load_pretrained

    changes, kwargs = BcosConfig.split(kwargs)
    config = BcosConfig.finetune(**changes)
    source = _find(arch, cache_dir)
    plain_cfg = _plain_cfg(arch, source)
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    overlay = pretrained_cfg_overlay or {}
    has_source = any({**given, **overlay}.get(key) for key in WEIGHT_SOURCES)
    own_weights = pretrained and not has_source
    no_weights = dict.fromkeys((*WEIGHT_SOURCES, "hf_hub_filename", "tag", "source"), None)
    cfg = {**plain_cfg, **no_weights, "architecture": "bcosify", "custom_load": False, **UNNORMALIZED, **given}
    cfg = resolve_pretrained_cfg("bcosify", cfg, overlay).to_dict()

    def build(**model_kwargs: object) -> nn.Module:
        arguments = {**model_kwargs, **source.remembered(), **(arch_kwargs or {})}
        entry = model_entrypoint(source.name)
        plain = entry(pretrained=own_weights, pretrained_cfg=source.cfg, cache_dir=cache_dir, **arguments)
        original = copy.deepcopy(plain) if config.bias == "reference" and has_source else None
        model = convert(plain, config)
        if pretrained and has_source:
            load_pretrained(model, cfg, partial(_convert_weights, original), cache_dir, changes)
        elif pretrained and any(plain_cfg.get(key) for key in WEIGHT_SOURCES):
            _warn_unless_preserved(arch, config)
        return model

    def build_whole(**model_kwargs: object) -> nn.Module:
        return build_model_with_cfg(build, "bcosify", False, pretrained_cfg=cfg, **{**source.kwargs, **model_kwargs})  # type: ignore[no-any-return]

    if not kwargs.get("features_only") or kwargs.get("feature_cls") == "fx":  # which traces the converted network
        return build_whole(**kwargs)
    entry = partial(model_entrypoint(source.name), pretrained=own_weights, cache_dir=cache_dir)
    arguments = {**source.kwargs, **kwargs, **source.remembered(), **(arch_kwargs or {})}
    backbone = convert(entry(pretrained_cfg=source.cfg, **arguments), config)
    if pretrained and has_source:
        fill_backbone(backbone, build_whole(**{k: v for k, v in kwargs.items() if k not in BACKBONE_ARGUMENTS}))
    backbone.pretrained_cfg = {key: value for key, value in cfg.items() if key not in HEAD_CFG}  # type: ignore[assignment]
    backbone.default_cfg = backbone.pretrained_cfg
    return backbone


def _convert_weights(original: nn.Module | None, state_dict: "StateDict", model: nn.Module) -> "StateDict":
    """Weights for a conversion of `original`, which takes them itself where reference activations are needed."""
    from ..conversion.inspection import reference_activations
    from ..weights.formats import convert_plain_weights

    converted = convert_plain_weights(state_dict, model)
    if original is None or converted is state_dict:
        return converted
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    original.load_state_dict({key: t for key, t in state_dict.items() if t.shape == shapes.get(key)}, strict=False)
    return converted | {f"{name}.act.shift": t for name, t in reference_activations(original).items()}


@dataclass(frozen=True)
class _Source:
    """Where a plain architecture comes from.

    Attributes:
        name: timm's.
        cfg: Its pretrained cfg, or the tag of one.
        kwargs: Arguments that the Hub's or the directory's config tells.
    """

    name: str
    cfg: dict[str, object] | str | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def remembered(self) -> dict[str, object]:
        """What timm wants to know of the network whose weights it loads, if it was saved with arguments."""
        return dict(pretrained_model_args=self.kwargs) if self.kwargs else {}


def architecture(name: str, cache_dir: str | Path | None = None) -> str:
    """timm's name of what `timm.create_model(name)` would create, from a Hub's or a directory's config too.

    Raises:
        TargetError: If timm does not know it.
        CheckpointError: If the Hub or the directory has no such network.
    """
    return _find(name, cache_dir).name


def _find(name: str, cache_dir: str | Path | None) -> _Source:
    try:
        kind, place = parse_model_name(name)
    except ValueError as error:
        raise TargetError(str(error)) from error
    if kind is None:
        arch, tag = split_model_name_tag(place)
        source = _Source(arch, tag or None)
    else:
        source = _read_config(name, kind, place, cache_dir)
    if not timm.is_model(source.name):
        near = difflib.get_close_matches(source.name, timm.list_models(), n=3)
        raise TargetError(f"timm knows no model {source.name!r}; close names: {', '.join(near) or 'none'}")
    return source


def _read_config(name: str, kind: str, place: str, cache_dir: str | Path | None) -> _Source:
    try:
        if kind == "hf-hub":
            cfg, arch, kwargs = load_model_config_from_hf(place, cache_dir=cache_dir)
        else:
            cfg, arch, kwargs = private.load_model_config_from_path(place)
    except Exception as error:  # the Hub's client, its HTTP library and the system each raise their own
        raise CheckpointError(f"cannot read the config of {name}: {first_line(error)}") from error
    return _Source(arch, cfg, dict(kwargs or {}))


def _plain_cfg(arch: str, source: _Source) -> dict[str, object]:
    """The pretrained cfg of a plain architecture."""
    if source.name in ENTRY_POINTS:
        raise TargetError(
            f"arch={arch!r} is a B-cos network already: create it as such, timm.create_model({arch!r}, ...), which "
            f"takes the fields of BcosConfig too"
        )
    try:
        cfg: dict[str, object] = resolve_pretrained_cfg(source.name, source.cfg).to_dict()
    except RuntimeError as error:  # a tag that does not exist
        known = timm.list_pretrained(f"{source.name}.*")
        tags = ", ".join(tagged.partition(".")[2] for tagged in known) or "none"
        raise TargetError(f"arch={arch!r}: {first_line(error)}; tags of {source.name}: {tags}") from error
    return cfg


def _warn_unless_preserved(arch: str, config: BcosConfig) -> None:
    if config.b == 1 and config.adds_bias and not config.antialias:
        return
    warnings.warn(
        f"bcosify: {arch} starts from its pretrained weights, but with b={config.b:g}, bias={config.bias} and "
        f"antialias={config.antialias} it is another function, whose predictions are not the pretrained ones: "
        f"fine-tune it, or pass b=1, bias=True, antialias=False, which computes the same",
        NotFineTunedWarning,
        stacklevel=2,
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """timm registers functions, under their names."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_converted(pretrained, **kwargs) if name == "bcosify" else _create(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = _create_converted.__doc__ if name == "bcosify" else _describe(ARCHITECTURES[name])
    return entry


def _describe(network: Architecture) -> str:
    arch = network.arch if isinstance(network.arch, str) else network.arch.__name__
    return f"{arch} as a B-cos model. Keywords: timm's, and those of `timm_bcos.BcosConfig`."


default_cfgs = generate_default_cfgs(_cfgs())
ENTRY_POINTS = {name: register_model(_entry_point(name)) for name in (*ARCHITECTURES, "bcosify")}
