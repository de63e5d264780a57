"""What a converted network can do beyond timm's: explain itself, and stay B-cos when its head changes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from inspect import signature
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .._compat import timm_layers, timm_models
from ..errors import InputError, ModelStateError
from ..explanation.api import explain
from ..explanation.result import Explanation
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear, LowPass2d, refuse_fused
from ..nn.module_utils import buffer_device, clone
from ..nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d
from ..nn.stems import BcosStem, ImageReader
from .config import BcosConfig
from .plan import FOLDING, Plan, convertible, move_hooks, plan_conversion
from .positions import POSITIONED, Positions, on_grid_of
from .reference import reference_activations, set_reference_shifts
from .replacements.offsets import OFFSETS
from .rules import RULES, Rules
from .settings import SETTINGS, encode_settings, refuse_contradictions

__all__ = ["BcosModel", "bcosify"]

Method = Callable[..., Any]


class BcosModel:
    """Mixed into the class of every converted network; `isinstance(model, BcosModel)` tells one from a plain network.

    Attributes:
        bcos_config: The conversion that made the network.
        bcos_rules: Its rule table.
        bcos_settings: What it computes besides its weights, in their state dict (`timm_bcos.conversion.settings`).
        head_paths: Where pooling layers are, which let maps through while a B-cos classifier beside them pools; and
            what that is called there.
    """

    bcos_config: BcosConfig
    bcos_rules: Rules
    bcos_settings: Tensor
    head_paths: dict[str, tuple[str, ...]]
    positions: Positions
    _plain_class: type[nn.Module]
    _has_reader: bool

    def explain(self, x: Tensor, target: int | Sequence[int] | Tensor | None = None, **kwargs: Any) -> Explanation:
        """Explain this network's output for images; see `timm_bcos.explain`."""
        return explain(self, x, target, **kwargs)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Self:
        """As in torch; refused, before anything is changed, if layers have been fused."""
        if mode:
            for module in self.modules():  # type: ignore[attr-defined]
                refuse_fused(module)
        _keep_uncentered(self)
        return super().train(mode)  # type: ignore[misc,no-any-return]

    def init_non_persistent_buffers(self) -> None:
        """Make anew what no state dict holds, as timm calls it: the zeros in place of biases of timm's own modules."""
        inherited = getattr(super(), "init_non_persistent_buffers", None)
        if inherited is not None:
            inherited()
        for module in self.modules():  # type: ignore[attr-defined]
            for name in module._non_persistent_buffers_set.intersection(OFFSETS):
                module._buffers[name].zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        refuse_contradictions(self, self.bcos_config, state_dict, prefix)  # type: ignore[arg-type]
        device = next(iter(state_dict.values())).device if state_dict else None
        state_dict[prefix + SETTINGS] = encode_settings(self, self.bcos_config, device)  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return _rebuild, (self._plain_class, self._has_reader), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript has no `super()`: it compiles timm's own class, whose modules are the B-cos ones."""
        if self.bcos_config.positions == "attention":
            raise ModelStateError(
                "TorchScript has no form of positions='attention': use torch.export, torch.compile or positions='keep'"
            )
        _link_heads(self)
        plain = self._plain_class.__new__(self._plain_class)
        plain.__dict__.update(self.__dict__)
        modules = plain.__dict__["_modules"] = dict(self.__dict__["_modules"])
        for name in ("bcos_config", "bcos_rules", "head_paths"):
            plain.__dict__.pop(name, None)
        if not self._has_reader:
            return plain
        root = nn.Sequential(OrderedDict(image_reader=modules.pop("image_reader"), network=plain))
        root.training = plain.training
        return root


# Tuples: torch.compile of torch 2.6 knows no `isinstance(x, A | B)`.
LAYERS = (BcosConv2d, BcosLinear)
POOLING = (BcosPool2d, BcosFlatten)
CONTAINERS = (list, tuple, dict)
OWN_BUFFERS = (BcosStem, ImageReader, LowPass2d, UncenteredBatchNorm1d, UncenteredBatchNorm2d)


def _link_heads(model: Any) -> None:
    """Pooling layers let maps through exactly while a classifier beside them pools by itself, whatever was assigned."""
    for path, names in model.head_paths.items():
        head = _find(model, path)
        children = {} if head is None else head._modules
        defers = any(isinstance(child, BcosConvClassifier) for child in children.values())
        defers = defers or any(_holds_classifier(children.get(name)) for name in names)
        for child in children.values():
            if isinstance(child, POOLING) and child.deferred != defers:
                child.deferred = defers


def _holds_classifier(module: nn.Module | None) -> bool:
    """Behind a dropout, in an adapter of PEFT's, compiled: what stands where the classifier stood may contain it."""
    if module is None or isinstance(module, BcosConvClassifier):
        return module is not None
    return any(_holds_classifier(child) for child in module._modules.values())


TRAINED_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, timm_layers.BatchNormAct2d, timm_layers.SyncBatchNormAct,
    timm_layers.SplitBatchNorm2d,
)  # fmt: skip


def _keep_uncentered(model: Any) -> None:
    """Convert batch norms that others have put in place of uncentered ones: trained, they would subtract means.

    `timm.utils.unfreeze` makes plain ones of frozen ones, `convert_sync_batchnorm` synchronized ones of ours.
    """
    if not any(type(module) in TRAINED_NORMS for module in model.modules()):
        return
    if any(type(norm) in TRAINED_NORMS for _, norm in convertible(model, model.bcos_rules)):
        bcosify(model, model.bcos_config, rules=model.bcos_rules)


def _put_settings_last(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    """Behind the weights, whose order others may rely on."""
    if prefix + SETTINGS in state_dict:
        state_dict[prefix + SETTINGS] = state_dict.pop(prefix + SETTINGS)


def _make_buffers(model: BcosModel, *_: object) -> None:
    """After a state dict has been loaded, make what it does not hold: the network may come from the meta device.

    What a network of timm's own has of that kind is left to timm.
    """
    parameters: Any = model.parameters()  # type: ignore[attr-defined]
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), None)
    if device is None:
        return
    for module in model.modules():  # type: ignore[attr-defined]
        is_own = isinstance(module, OWN_BUFFERS)
        for name in module._non_persistent_buffers_set if is_own else module._non_persistent_buffers_set & {*OFFSETS}:
            if module._buffers[name].is_meta:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if is_own:
            module.init_non_persistent_buffers()
    model.init_non_persistent_buffers()


def _find(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def _overrides(plain: Any) -> dict[str, Method]:
    """What differs from the network's own class, where it has such a method; signatures stay."""

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        _link_heads(self)
        if self.training and not torch.compiler.is_compiling():
            _keep_uncentered(self)
        return plain.forward(self, *args, **kwargs)

    def reset_classifier(self: Any, num_classes: int, *args: object, **kwargs: object) -> None:
        plain.reset_classifier(self, num_classes, *args, **kwargs)  # timm builds a plain head
        bcosify(self, self.bcos_config, rules=self.bcos_rules)

    def forward_head(self: Any, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        _link_heads(self)
        x = plain.forward_head(self, x, *args, **kwargs)
        pre_logits = args[0] if args else kwargs.get("pre_logits", False)
        pools = [m for m in self.modules() if isinstance(m, BcosPool2d) and m.deferred] if pre_logits else []
        return pools[0].pool_now(x).flatten(1) if pools else x  # the classifier would have pooled

    def set_input_size(self: Any, *args: object, **kwargs: object) -> None:
        with _lend_plain_projection(getattr(self, "patch_embed", None), self.bcos_config):
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
    """With positions='attention' the blocks get tokens without constants, and know the grid if it varies."""
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
                self = clone(self)  # its blocks will be this pass's own
                self.__dict__["_is_one_pass"] = True
            return method(self, *args, **kwargs)

        return call

    passes = {name: in_one_pass(getattr(plain, name)) for name in ("forward_features", "forward_intermediates")}
    return dict(_pos_embed=_pos_embed, **passes)


@contextmanager
def _lend_plain_projection(patch_embed: Any, config: BcosConfig) -> Iterator[None]:
    """timm resamples a patch embedding's weights into a new, plain convolution: they go back into a B-cos one."""
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


READING = ("forward", "forward_features", "forward_intermediates")


def _reads_first(method: Method) -> Method:
    """A forward method that passes its image through the model's `ImageReader` first.

    The method itself runs on `_without_reader(self)`: `forward` calls `forward_features`, which must not read again.
    """
    first = [*signature(method).parameters, "x"][1]

    def read_and_call(self: Any, *args: object, **kwargs: object) -> object:
        image = args[0] if args else kwargs.pop(first)
        if isinstance(image, CONTAINERS):
            raise InputError(f"the model reads one tensor of images first, got a {type(image).__name__}")
        return method(_without_reader(self), self.image_reader(image), *args[1:], **kwargs)

    return wraps(method)(read_and_call)


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
def _bcos_class(plain: type, has_reader: bool) -> type:
    bases: tuple[type, ...] = (BcosModel, plain)
    methods = _overrides(plain)
    if has_reader:
        base = _bcos_class(plain, False)
        bases, methods = (base,), {n: _reads_first(getattr(base, n)) for n in READING if hasattr(base, n)}
        methods["_class_without_reader"] = base
    own = dict(_plain_class=plain, _has_reader=has_reader, __module__=__name__, **methods)
    return type(f"Bcos{plain.__name__}", bases, own)


def _rebuild(plain: type, has_reader: bool) -> nn.Module:
    new: type[nn.Module] = _bcos_class(plain, has_reader)
    return new.__new__(new)


def bcosify(model: nn.Module, config: BcosConfig | None = None, *, rules: Rules | None = None) -> nn.Module:
    """Convert a network to its B-cos equivalent.

    All of it is planned before anything is changed: whatever is raised, the network is left as it was. Parameters are
    adopted, not copied, except where their shape changes (the stem, the classifier, MaxOut). Hooks on replaced layers
    move to their replacements. Converting a converted network again only converts what is new in it.

    Args:
        model: Any timm model, or a network of your own. Changed in place.
        config: What to convert to; `BcosConfig()` fine-tunes pretrained weights at B = 2. None is that, or the config
            of a network that has been converted before.
        rules: From exact module type, or its qualified name, to rule; `RULES` by default. Extend the table with
            `RULES | {MyBlock: my_rule}`.

    Returns:
        The converted network: the same object, unless the root itself has been replaced.

    Raises:
        UnsupportedModuleError: Lists every module that cannot be converted, and what else is missing: how the network's
            images are normalized, if nothing says so.
        InputError: For a mean or std that does not fit the image's channels.

    Examples:
        >>> model = bcosify(timm.create_model("resnet50", pretrained=True), BcosConfig.finetune(b=1, bias=True))
    """
    converted = next((m for m in model.modules() if isinstance(m, BcosModel)), None)
    if config is None:
        config = BcosConfig() if converted is None else converted.bcos_config
    if rules is None:
        rules = RULES if converted is None else converted.bcos_rules
    plan = plan_conversion(model, config, rules)
    responses = reference_activations(model) if config.bias == "reference" else {}
    network = _apply(plan)
    set_reference_shifts(network, responses)
    return network


def _apply(plan: Plan) -> nn.Module:
    kind: Any = type(plan.root)
    if not issubclass(kind, BcosModel):
        plan.root.__class__ = _bcos_class(kind, plan.has_reader)  # comes first, because Python may refuse it
        plan.root.register_load_state_dict_post_hook(_make_buffers)
        plan.root.register_state_dict_post_hook(_put_settings_last)
    move_hooks(plan.model, plan.network)
    for path, new in plan.replacements.items():
        parent, _, child = path.rpartition(".")
        owner = plan.network.get_submodule(parent)
        move_hooks(getattr(owner, child), new)
        setattr(owner, child, new)
    for name, value in plan.attributes.items():
        setattr(plan.root, name, value)
    if not plan.has_reader and "image_reader" in plan.root._modules:  # of networks that run their layers in order
        rest = dict(plan.root._modules)
        first = {"image_reader": rest.pop("image_reader")}
        plan.root._modules.clear()
        plan.root._modules.update(first | rest)
    for module in plan.foldable:
        for name in FOLDING:
            if hasattr(type(module), name):
                setattr(module, name, partial(fuse_within, module))
    _link_heads(plan.root)
    device = next((buffer_device(parameter) for parameter in plan.root.parameters()), None)
    settings = encode_settings(plan.root, plan.attributes["bcos_config"], device)  # type: ignore[arg-type]
    plan.root.register_buffer(SETTINGS, settings)
    return plan.root


def fuse_within(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """What timm's `reparameterize_model` makes of a converted module that would fold norms or branches into weights.

    Responses of B-cos layers are not linear in their weights, so that norms and branches stay; layers are fused.
    """
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if isinstance(child, LAYERS) else fuse_within(child))
    return module
