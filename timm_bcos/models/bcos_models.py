"""Importing this module registers our models with timm: the papers' models, fine-tuned ones, and `bcosify`.

`import timm` imports it, possibly while another module of this package is being imported. So functions import what
builds models and loads weights when they are called.
"""

import copy
import difflib
import warnings
from collections.abc import Callable, Mapping
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
from ..weights.catalog import EMBEDDED, PUBLISHED, hub_addresses, imagenet_names
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


def _cfg(row: Architecture, paper: dict[str, str]) -> dict[str, Any]:
    """The pretrained cfg of a model: the architecture's geometry, and images in [0, 1] without normalization."""
    plain = resolve_pretrained_cfg(row.arch).to_dict() if isinstance(row.arch, str) else {}
    geometry = {key: plain[key] for key in GEOMETRY if plain.get(key) is not None}
    ours = dict(num_classes=1000, crop_pct=0.875, interpolation="bilinear", license="apache-2.0", **UNNORMALIZED)
    return {**geometry, **ours, **paper, **row.cfg}


def _cfgs() -> dict[str, Any]:
    """All pretrained cfgs by name and tag. Models without published weights have one without a tag."""
    cfgs: dict[str, Any] = {"bcosify": _cfg(Architecture("resnet50", BcosConfig()), PAPER_CFG)}
    hub = {tagged: dict(hf_hub_id=address) for tagged, address in hub_addresses().items()}
    for name, row in ARCHITECTURES.items():
        cfg = _cfg(row, _paper(name))
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
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    from ..weights.formats import convert_official_weights
    from ..weights.pretrained import load_pretrained

    row = ARCHITECTURES[name]
    changes, kwargs = BcosConfig.split(kwargs)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    if str(cfg.get("tag")).endswith("in1k"):
        cfg.setdefault("label_names", list(imagenet_names()))
    trained = config = row.tagged.get(cfg.get("tag") or "", row.config).change(**changes)
    if _has_new_classifier(kwargs, pretrained_cfg_overlay, resolve_pretrained_cfg(name, pretrained_cfg).num_classes):
        config = config.for_new_classifier(changes)
        cfg = {key: value for key, value in cfg.items() if key not in ("label_names", "label_descriptions")}

    def build(**model_kwargs: object) -> nn.Module:
        model = row.build(config, **model_kwargs)
        if pretrained:  # timm does not verify hashes and does not know encoded images
            load_pretrained(model, cfg, convert_official_weights, cache_dir, changes, trained)
        return model

    return build_model_with_cfg(build, name, False, pretrained_cfg=cfg, feature_cfg=dict(row.feature_cfg), **kwargs)


def _has_new_classifier(kwargs: dict[str, Any], overlay: dict[str, Any] | None, published: object) -> bool:
    """Whether the model has another number of classes than its published weights."""
    num_classes = kwargs.get("num_classes", (overlay or {}).get("num_classes"))
    return num_classes not in (None, 0, published)


BACKBONE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")  # of timm's create_model
HEAD_CFG = ("num_classes", "classifier", "global_pool")  # not in the cfg of a backbone
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
        pretrained: Whether to load the architecture's own weights before the conversion; or, if the cfg or its overlay
            names weights, those after the conversion, whether they are converted or plain.
        arch: timm's name of the architecture, 'hf-hub:ORG/NAME' or 'local-dir:PATH'.
        arch_kwargs: Arguments of the architecture that have the name of a field of `BcosConfig`, such as
            `arch_kwargs=dict(bias=...)`. All others can also be passed directly.
        pretrained_cfg: See `timm.create_model`.
        pretrained_cfg_overlay: See `timm.create_model`.
        cache_dir: Directory of downloads; None for the default.
        kwargs: Fields of `timm_bcos.BcosConfig`, and arguments of the architecture.

    Raises:
        TargetError: If timm does not know the architecture, or if it is a B-cos model already.
        CheckpointError: If the Hub or the directory has no such model.

    Examples:
        >>> timm.create_model("bcosify", arch="resnet50", pretrained=True, b=1, bias=True)  # computes the same
        >>> timm.create_model("bcosify", arch="swin_tiny_patch4_window7_224", features_only=True)  # timm's own maps
        >>> timm.create_model("bcosify", arch="test_resnet", arch_kwargs=dict(norm_layer="groupnorm"))
    """
    changes, kwargs = BcosConfig.split(kwargs)
    source = _find(arch, cache_dir)
    plain_cfg = _plain_cfg(arch, source)
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    overlay = pretrained_cfg_overlay or {}
    config = BcosConfig.finetune(**changes)
    if _has_new_classifier(kwargs, overlay, given.get("num_classes", plain_cfg.get("num_classes"))):
        config = config.for_new_classifier(changes)
    conversion = _Conversion(
        arch=arch,
        source=source,
        config=config,
        changes=changes,
        arch_kwargs=arch_kwargs or {},
        pretrained=pretrained,
        has_other_weights=_names_weights({**given, **overlay}),
        has_own_weights=_names_weights(plain_cfg),
        cfg=resolve_pretrained_cfg("bcosify", _converted_cfg(plain_cfg, given), overlay).to_dict(),
        cache_dir=cache_dir,
    )
    is_traced = kwargs.get("feature_cls") == "fx"  # timm traces the converted model
    return (
        conversion.backbone(**kwargs) if kwargs.get("features_only") and not is_traced else conversion.model(**kwargs)
    )


def _names_weights(cfg: dict[str, Any]) -> bool:
    return any(cfg.get(key) for key in WEIGHT_SOURCES)


def _converted_cfg(plain: dict[str, object], given: dict[str, object]) -> dict[str, object]:
    """The pretrained cfg of a plain model without its weights, and for images without normalization."""
    no_weights = dict.fromkeys((*WEIGHT_SOURCES, "hf_hub_filename", "tag", "source"), None)
    return {**plain, **no_weights, "architecture": "bcosify", "custom_load": False, **UNNORMALIZED, **given}


@dataclass(frozen=True)
class _Conversion:
    """A call of `timm.create_model('bcosify', arch=...)`.

    Attributes:
        arch: Name of the architecture, as given by the user.
        source: Source of the architecture and its weights.
        config: Config of the conversion.
        changes: Fields of the config that the user chose.
        arch_kwargs: Arguments of the architecture that are named like fields of `BcosConfig`.
        pretrained: Whether to load weights.
        has_other_weights: Whether the user named weights, which are loaded after the conversion.
        has_own_weights: Whether weights of the plain architecture are published.
        cfg: The pretrained cfg of the converted model.
        cache_dir: Directory of downloads.
    """

    arch: str
    source: "_Source"
    config: BcosConfig
    changes: Mapping[str, Any]
    arch_kwargs: dict[str, object]
    pretrained: bool
    has_other_weights: bool
    has_own_weights: bool
    cfg: dict[str, Any]
    cache_dir: str | Path | None

    def model(self, **kwargs: object) -> nn.Module:
        """The converted model."""
        arguments = {**self.source.kwargs, **kwargs}
        return build_model_with_cfg(self._build, "bcosify", False, pretrained_cfg=self.cfg, **arguments)

    def backbone(self, **kwargs: object) -> nn.Module:
        """The converted feature backbone that timm makes of the plain architecture."""
        from ..conversion.converted import bcosify
        from ..weights.pretrained import fill_backbone

        backbone: Any = bcosify(self._plain(**{**self.source.kwargs, **kwargs}), self.config)
        if self.pretrained and self.has_other_weights:
            whole = self.model(**{key: value for key, value in kwargs.items() if key not in BACKBONE_ARGUMENTS})
            fill_backbone(backbone, whole)
        backbone.pretrained_cfg = {key: value for key, value in self.cfg.items() if key not in HEAD_CFG}
        backbone.default_cfg = backbone.pretrained_cfg
        return backbone

    def _build(self, **kwargs: object) -> nn.Module:
        from ..conversion.converted import bcosify

        plain = self._plain(**kwargs)
        original = copy.deepcopy(plain) if self.config.bias == "reference" and self.has_other_weights else None
        model = bcosify(plain, self.config)
        if self.pretrained and self.has_other_weights:
            self._load_other_weights(model, original)
        elif self.pretrained and self.has_own_weights:
            _warn_unless_preserved(self.arch, self.config)
        return model

    def _plain(self, **kwargs: object) -> nn.Module:
        """The plain architecture, with its own weights unless others are loaded later."""
        entry = model_entrypoint(self.source.name)
        arguments = {**kwargs, **self.source.saved_arguments(), **self.arch_kwargs}
        own_weights = self.pretrained and not self.has_other_weights
        return entry(pretrained=own_weights, pretrained_cfg=self.source.cfg, cache_dir=self.cache_dir, **arguments)

    def _load_other_weights(self, model: nn.Module, original: nn.Module | None) -> None:
        from ..weights.pretrained import load_pretrained

        convert, trained = partial(_convert_weights, original), BcosConfig.finetune(**self.changes)
        load_pretrained(model, self.cfg, convert, self.cache_dir, self.changes, trained)


def _convert_weights(original: nn.Module | None, state_dict: "StateDict", model: nn.Module) -> "StateDict":
    """Convert weights. If `original`, the plain model, is given, it loads them to compute reference activations."""
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
    """Source of a plain architecture.

    Attributes:
        name: timm's name of the architecture.
        cfg: Pretrained cfg, or its tag.
        kwargs: Arguments in the config on the Hub or in the directory.
    """

    name: str
    cfg: dict[str, object] | str | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def saved_arguments(self) -> dict[str, object]:
        """timm's argument for the arguments that the model was saved with, if there are any."""
        return dict(pretrained_model_args=self.kwargs) if self.kwargs else {}


def architecture(name: str, cache_dir: str | Path | None = None) -> str:
    """timm's name of the architecture that `timm.create_model(name)` creates.

    Args:
        name: timm's name with or without a tag, 'hf-hub:ORG/NAME' or 'local-dir:PATH'.
        cache_dir: Directory of downloads; None for the default.

    Raises:
        TargetError: If timm does not know it.
        CheckpointError: If the Hub or the directory has no such model.
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
        hint = f"close names: {', '.join(near)}" if near else "see `timm-bcos models` or timm.list_models()"
        raise TargetError(f"timm knows no model {source.name!r}; {hint}")
    return source


def _read_config(name: str, kind: str, place: str, cache_dir: str | Path | None) -> _Source:
    try:
        if kind == "hf-hub":
            cfg, arch, kwargs = load_model_config_from_hf(place, cache_dir=cache_dir)
        else:
            cfg, arch, kwargs = private.load_model_config_from_path(place)
    except Exception as error:  # errors of the Hub's client, its HTTP library and the system
        raise CheckpointError(f"cannot read the config of {name}: {first_line(error)}") from error
    return _Source(arch, cfg, dict(kwargs or {}))


def _plain_cfg(arch: str, source: _Source) -> dict[str, object]:
    """The pretrained cfg of a plain architecture."""
    if source.name in ENTRY_POINTS:
        raise TargetError(
            f"arch={arch!r} is a B-cos model already: create it as such, timm.create_model({arch!r}, ...), which "
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
    """The function that timm registers under its name."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_converted(pretrained, **kwargs) if name == "bcosify" else _create(name, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = _create_converted.__doc__ if name == "bcosify" else _describe(ARCHITECTURES[name])
    return entry


def _describe(row: Architecture) -> str:
    arch = row.arch if isinstance(row.arch, str) else row.arch.__name__
    return f"{arch} as a B-cos model. Keywords: timm's, and those of `timm_bcos.BcosConfig`."


default_cfgs = generate_default_cfgs(_cfgs())
ENTRY_POINTS = {name: register_model(_entry_point(name)) for name in (*ARCHITECTURES, "bcosify")}
