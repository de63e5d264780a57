"""`bcosify`, and the class of converted models, which explain themselves and stay B-cos when their head changes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .._compat import find, timm_layers, timm_models
from ..errors import InputError, ModelStateError
from ..explanation.api import explain
from ..explanation.result import Explanation
from ..nn.base import refuse_fused
from ..nn.heads import BcosPool2d
from ..nn.layers import BcosConv2d, LowPass2d
from ..nn.module_utils import clone
from ..nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d
from ..nn.patches import PatchLayout
from ..nn.stems import BcosStem, ImageReader
from .apply import apply_plan, link_heads
from .config import BcosConfig
from .inspection import inspect_model
from .plan import convertible_modules, plan_conversion
from .positions import POSITIONED, Positions, on_grid_of
from .replacements.base import BIASES
from .rules import RULES, Rules
from .settings import SETTINGS, encode_settings, refuse_contradictions

__all__ = ["BcosModel", "bcosify", "replace_classifier"]

Method = Callable[..., Any]


class BcosModel:
    """Base class of the classes of converted models: `isinstance(model, BcosModel)` is False for plain models.

    Attributes:
        bcos_config: Config of the conversion.
        bcos_rules: Rules of the conversion.
        bcos_settings: Settings that the weights do not show, as an entry of state dicts (`conversion.settings`).
        head_paths: Paths of modules with pooling layers, with the names of the classifiers beside these (`link_heads`).
    """

    bcos_config: BcosConfig
    bcos_rules: Rules
    bcos_settings: Tensor
    head_paths: dict[str, tuple[str, ...]]
    positions: Positions
    _plain_class: type[nn.Module]
    _forward_calls_reader: bool

    def explain(self, x: Tensor, target: int | Sequence[int] | Tensor | None = None, **kwargs: Any) -> Explanation:
        """Explain the model's output for images, see `timm_bcos.explain`."""
        return explain(self, x, target, **kwargs)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch. Models with fused layers refuse training mode, and are left unchanged."""
        if mode:
            for module in self.modules():  # type: ignore[attr-defined]
                refuse_fused(module)
        _convert_new_norms(self)
        return super().train(mode)  # type: ignore[misc]

    def init_non_persistent_buffers(self) -> None:
        """Set buffers that are not in the state dict: timm's own, and the zeros that replace biases."""
        inherited = getattr(super(), "init_non_persistent_buffers", None)
        if inherited is not None:
            inherited()
        for module in self.modules():  # type: ignore[attr-defined]
            for name in module._non_persistent_buffers_set.intersection(BIASES):
                module._buffers[name].zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        refuse_contradictions(self, self.bcos_config, state_dict, prefix)  # type: ignore[arg-type]
        device = next(iter(state_dict.values())).device if state_dict else None
        state_dict[prefix + SETTINGS] = encode_settings(self, self.bcos_config, device)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return _rebuild, (self._plain_class, self._forward_calls_reader), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        """The same modules in timm's own class, which TorchScript compiles because it does not support `super()`."""
        if self.bcos_config.positions == "attention":
            raise ModelStateError(
                "TorchScript does not support positions='attention': use torch.export, torch.compile or "
                "positions='keep'"
            )
        link_heads(self)
        plain = self._plain_class.__new__(self._plain_class)
        plain.__dict__.update(self.__dict__)
        modules = plain.__dict__["_modules"] = dict(self.__dict__["_modules"])
        for name in ("bcos_config", "bcos_rules", "head_paths"):
            plain.__dict__.pop(name, None)
        if not self._forward_calls_reader:
            return plain
        root = nn.Sequential(OrderedDict(image_reader=modules.pop("image_reader"), network=plain))
        root.training = plain.training
        return root


CONTAINERS = (list, tuple, dict)  # a tuple: torch.compile of torch 2.6 does not support `isinstance(x, A | B)`
MODULES_WITH_BUFFERS = (BcosStem, ImageReader, LowPass2d, UncenteredBatchNorm1d, UncenteredBatchNorm2d)
CENTERING_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct,
    timm_layers.SplitBatchNorm2d,
)  # fmt: skip


def _convert_new_norms(model: Any) -> None:
    """Convert batch norms that other code has assigned since the conversion, because they would subtract means.

    `timm.utils.unfreeze` replaces frozen batch norms by plain ones, `convert_sync_batchnorm` all by synchronized ones.
    """
    if not any(type(module) in CENTERING_NORMS for module in model.modules()):
        return
    if any(type(norm) in CENTERING_NORMS for norm in convertible_modules(model, model.bcos_rules)):
        bcosify(model, model.bcos_config, rules=model.bcos_rules)


def _put_settings_last(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    """Keep the order of weights, which other code may rely on, by moving the settings behind them."""
    if prefix + SETTINGS in state_dict:
        state_dict[prefix + SETTINGS] = state_dict.pop(prefix + SETTINGS)


def _materialize_buffers(model: BcosModel, *_: object) -> None:
    """After a state dict has been loaded, set buffers that are not in it: the model may come from the meta device.

    timm's own buffers of that kind are left to timm.
    """
    parameters: Any = model.parameters()  # type: ignore[attr-defined]
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), None)
    if device is None:
        return
    for module in model.modules():  # type: ignore[attr-defined]
        makes_buffers = isinstance(module, MODULES_WITH_BUFFERS)
        names = module._non_persistent_buffers_set
        for name in names if makes_buffers else names & {*BIASES}:
            if module._buffers[name].is_meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if makes_buffers:
            module.init_non_persistent_buffers()
    model.init_non_persistent_buffers()


def _overrides(plain: Any) -> dict[str, Method]:
    """Methods that replace those of the model's own class, for those that it has. Signatures are the same."""

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        link_heads(self)
        if self.training and not torch.compiler.is_compiling():
            _convert_new_norms(self)
        return plain.forward(self, *args, **kwargs)

    def reset_classifier(self: Any, num_classes: int, *args: object, **kwargs: object) -> None:
        is_same = num_classes in (0, self.num_classes)
        config = self.bcos_config if is_same else self.bcos_config.for_new_classifier()
        replace_classifier(self, num_classes, config, *args, **kwargs)

    def forward_head(self: Any, *args: object, **kwargs: object) -> Tensor:  # NaFlex models name their first argument
        link_heads(self)
        x: Tensor = plain.forward_head(self, *args, **kwargs)
        pre_logits = args[1] if len(args) > 1 else kwargs.get("pre_logits", False)
        pools = [m for m in self.modules() if isinstance(m, BcosPool2d) and m.deferred] if pre_logits else []
        return pools[0].pool_now(x).flatten(1) if pools else x  # instead of the classifier

    def set_input_size(self: Any, *args: object, **kwargs: object) -> None:
        with _with_plain_projection(getattr(self, "patch_embed", None), self.bcos_config):
            plain.set_input_size(self, *args, **kwargs)

    methods: dict[str, Method] = dict(
        forward=forward,
        reset_classifier=reset_classifier,
        forward_head=forward_head,
        set_input_size=set_input_size,
    )
    if issubclass(plain, POSITIONED):
        methods |= _position_overrides(plain)
    return {name: wraps(getattr(plain, name))(method) for name, method in methods.items() if hasattr(plain, name)}


def _position_overrides(plain: Any) -> dict[str, Method]:
    """Methods for positions='attention': blocks get tokens without position embeddings, and the grid if it varies."""
    has_rotary_positions = issubclass(plain, timm_models.Eva)

    def _pos_embed(self: Any, x: Tensor, *args: object, **kwargs: object) -> object:
        if self.bcos_config.positions == "keep":
            return plain._pos_embed(self, x, *args, **kwargs)
        if "_is_one_pass" in self.__dict__:
            self.blocks = on_grid_of(self.blocks, x)
        contents = self.pos_drop(self.positions.contents(x))
        return (contents, plain._pos_embed(self, x)[1]) if has_rotary_positions else contents

    def in_one_pass(method: Method) -> Method:
        def call(self: Any, *args: object, **kwargs: object) -> object:
            if self.bcos_config.positions == "attention" and self.dynamic_img_size:
                self = clone(self)  # whose blocks are replaced for this forward pass
                self.__dict__["_is_one_pass"] = True
            return method(self, *args, **kwargs)

        return call

    passes = {name: in_one_pass(getattr(plain, name)) for name in ("forward_features", "forward_intermediates")}
    return dict(_pos_embed=_pos_embed, **passes)


@contextmanager
def _with_plain_projection(patch_embed: Any, config: BcosConfig) -> Iterator[None]:
    """Set a plain convolution as the patch embedding's projection, which timm resamples, and convert it afterwards."""
    layer = getattr(patch_embed, "proj", None)
    if not isinstance(layer, BcosConv2d):
        yield
        return
    rows, channels = layer.weight.shape[:2]
    plain = nn.Conv2d(channels, rows, layer.kernel_size, layer.stride, bias=False, device="meta")  # type: ignore[arg-type]
    plain.weight = layer.weight
    patch_embed.proj = plain
    try:
        yield
    finally:
        patch_embed.proj = layer if patch_embed.proj is plain else _resized(layer, patch_embed.proj, config)


def _resized(layer: BcosConv2d, plain: nn.Conv2d, config: BcosConfig) -> BcosConv2d:
    new = clone(layer, weight=plain.weight)
    new.kernel_size, new.stride = plain.kernel_size, plain.stride
    if config.gamma_scale is not None:
        new.gamma = config.layer_gamma(plain.weight[0].numel())
    return new


NAFLEX: Any = find("timm.models.naflexvit.NaFlexVit")
METHODS_TAKING_IMAGES = ("forward", "forward_features", "forward_intermediates")


def _with_reader(method: Method, takes_patches: bool) -> Method:
    """A forward method that passes its image through the model's `ImageReader` first.

    The method itself runs on `_without_reader(self)`: `forward` calls `forward_features`, which must not read again.
    """
    first = [*signature(method).parameters, "x"][1]
    read = _read_patches if takes_patches else _read_image

    def read_and_call(self: Any, *args: object, **kwargs: object) -> object:
        image = args[0] if args else kwargs.pop(first)
        return method(_without_reader(self), read(self, image), *args[1:], **kwargs)

    return wraps(method)(read_and_call)


def _read_image(model: Any, x: object) -> object:
    if isinstance(x, CONTAINERS):
        raise InputError(f"the model reads one tensor of images first, got a {type(x).__name__}")
    return model.image_reader(x)


def _read_patches(model: Any, x: Any) -> object:
    """Read images, or what a NaFlex model takes instead: patches (N, L, ...), or a dict with such patches."""
    if isinstance(x, dict) and "patches" in x:
        return {**x, "patches": _read_patches(model, x["patches"])}
    if isinstance(x, CONTAINERS) or x.ndim == 4:
        return _read_image(model, x)
    layout = PatchLayout.of(model, x, model.image_reader.image_channels)
    return layout.to_patches(model.image_reader(layout.to_image(x)))


def _without_reader(model: Any) -> nn.Module:
    """The same model as an object of the class whose forward methods do not read: both have one `__dict__`.

    Simpler mechanisms fail: a forward pre-hook runs for `model(x)` alone, not for `model.forward_features(x)`; a flag
    on the model is seen by other threads; a `Sequential` of reader and model renames the weights and has no
    `forward_features`; a shallow copy loses what a forward method assigns to `self`, and torch.compile cannot trace it
    in one graph.
    """
    unread = object.__new__(model._class_without_reader)
    object.__setattr__(unread, "__dict__", model.__dict__)
    return unread


@cache
def _bcos_class(plain: type, forward_calls_reader: bool) -> type:
    bases: tuple[type, ...] = (BcosModel, plain)
    methods = _overrides(plain)
    if forward_calls_reader:
        base = _bcos_class(plain, False)
        takes_patches, names = issubclass(plain, NAFLEX), [n for n in METHODS_TAKING_IMAGES if hasattr(base, n)]
        bases, methods = (base,), {name: _with_reader(getattr(base, name), takes_patches) for name in names}
        methods["_class_without_reader"] = base
    own = dict(_plain_class=plain, _forward_calls_reader=forward_calls_reader, __module__=__name__, **methods)
    return type(f"Bcos{plain.__name__}", bases, own)


def _rebuild(plain: type, forward_calls_reader: bool) -> nn.Module:
    new: type[nn.Module] = _bcos_class(plain, forward_calls_reader)
    return new.__new__(new)


def bcosify(model: nn.Module, config: BcosConfig | None = None, *, rules: Rules | None = None) -> nn.Module:
    """Convert a model to its B-cos equivalent.

    The whole conversion is planned before anything is changed: if an error is raised, the model is as before. `bcosify`
    reuses the parameters of the original model, except where their shape changes (the stem, the classifier, MaxOut).
    Hooks on replaced layers move to their replacements. For a model that has been converted before, only what is new in
    it is converted.

    Args:
        model: Any timm model, or a model of your own. Changed in place.
        config: Config of the conversion. By default the config of an earlier conversion, or else `BcosConfig()`, which
            fine-tunes pretrained weights at B = 2.
        rules: Table from exact module type, or its qualified name, to rule. `RULES` by default; extend it with
            `RULES | {MyBlock: my_rule}`.

    Returns:
        The converted model: the same object, unless the root itself has been replaced.

    Raises:
        UnsupportedModuleError: Lists every module that cannot be converted, and what else is missing, such as how the
            model's images are normalized.
        InputError: For a mean or std that does not fit the image's channels.

    Examples:
        >>> model = bcosify(timm.create_model("resnet50", pretrained=True), BcosConfig.finetune(b=1, bias=True))
    """
    converted = next((m for m in model.modules() if isinstance(m, BcosModel)), None)
    if config is None:
        config = BcosConfig() if converted is None else converted.bcos_config
    if rules is None:
        rules = RULES if converted is None else converted.bcos_rules
    inspection = inspect_model(model, config)
    plan = plan_conversion(inspection, rules)
    return apply_plan(plan, _set_class)


def replace_classifier(model: Any, num_classes: int, config: BcosConfig, *args: object, **kwargs: object) -> None:
    """Give a converted model of timm a new classifier, as its method `reset_classifier` does, but with another config.

    Args:
        model: The model, which is changed.
        num_classes: Number of classes.
        config: Config that the classifier is converted with, and that the model has afterwards.
        args: Further arguments of `reset_classifier`.
        kwargs: Further keyword arguments of `reset_classifier`.
    """
    model._plain_class.reset_classifier(model, num_classes, *args, **kwargs)  # builds a plain head
    model.bcos_config = config  # first, because `bcosify` refuses a config that is not the model's own
    bcosify(model, config, rules=model.bcos_rules)


def _set_class(root: nn.Module, forward_calls_reader: bool) -> None:
    """Make a converted model an instance of `BcosModel`.

    `apply_plan` takes this function as a callback, because methods of `BcosModel` themselves convert again.
    """
    kind: Any = type(root)
    if not issubclass(kind, BcosModel):
        root.__class__ = _bcos_class(kind, forward_calls_reader)
        root.register_load_state_dict_post_hook(_materialize_buffers)
        root.register_state_dict_post_hook(_put_settings_last)
