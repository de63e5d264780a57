"""What a converted network can do beyond timm's: explain itself, and stay B-cos when its head changes."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, NoReturn

from torch import Tensor, nn

from ..errors import ModelStateError
from ..explaining.forward import explain
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosPool2d
from ..nn.layers import BcosConv2d
from ..nn.modules import clone
from ..nn.stems import ImageReader
from .config import BcosConfig
from .plan import Places, Stats, image_channels_of, plan_replacements
from .positions import attention_blocks, confine_positions
from .rules import RULES, Rule

__all__ = ["BcosModel", "bcosify", "frozen"]


class BcosModel:
    """Mixed into the class of every converted network; `isinstance(model, BcosModel)` tells one from a plain network.

    Attributes:
        bcos_config: The conversion that made the network.
        bcos_rules: Its rule table.
    """

    bcos_config: BcosConfig
    bcos_rules: dict[type[nn.Module], Any]
    _plain_class: type[nn.Module]
    _has_reader: bool

    def explain(self, x: Tensor, target: Any = None, **kwargs: Any) -> Any:
        """Explain this network's output for images; see `timm_bcos.explain`."""
        return explain(self, x, target, **kwargs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._plain_class, self._has_reader), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript has no `super()`: it compiles timm's own class, whose modules are the B-cos ones."""
        plain = self._plain_class.__new__(self._plain_class)
        plain.__dict__.update(self.__dict__)
        plain.__dict__["_modules"] = dict(self.__dict__["_modules"])
        for name in ("bcos_config", "bcos_rules"):
            plain.__dict__.pop(name, None)
        return plain


def _overrides(plain: Any) -> dict[str, Any]:
    """What differs from timm's class, where it has such a method; signatures stay timm's."""

    def reset_classifier(self: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:

        plain.reset_classifier(self, num_classes, *args, **kwargs)  # timm builds a plain head
        bcosify(self, self.bcos_config, rules=self.bcos_rules)

    def forward_head(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = plain.forward_head(self, x, *args, **kwargs)
        pre_logits = args[0] if args else kwargs.get("pre_logits", False)
        pools = [m for m in self.modules() if isinstance(m, BcosPool2d) and m.deferred] if pre_logits else []
        return pools[0].pool_now(x).flatten(1) if pools else x  # the classifier would have pooled

    def set_input_size(self: Any, *args: Any, **kwargs: Any) -> None:
        with _lend_plain_projection(getattr(self, "patch_embed", None), self.bcos_config):
            plain.set_input_size(self, *args, **kwargs)

    def _pos_embed(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        def embed(x: Tensor) -> Any:
            return plain._pos_embed(self, x, *args, **kwargs)

        return self.positions.split_off(embed, x) if self.bcos_config.positions == "attention" else embed(x)

    methods: dict[str, Any] = dict(
        reset_classifier=reset_classifier,
        forward_head=forward_head,
        set_input_size=set_input_size,
        _pos_embed=_pos_embed,
    )
    return {name: wraps(getattr(plain, name))(method) for name, method in methods.items() if hasattr(plain, name)}


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


def _reads_first(method: Any) -> Any:
    """A forward method behind the network's `ImageReader`, which acts once when such methods call each other."""

    def read_and_call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and not getattr(x, "is_read", False):
            x = self.image_reader(x)
            x.is_read = True
        return method(self, x, *args, **kwargs)

    return wraps(method)(read_and_call)


@cache
def _bcos_class(plain: Any, has_reader: bool) -> Any:
    methods = _overrides(plain)
    if has_reader:
        methods |= {name: _reads_first(getattr(plain, name)) for name in READING if hasattr(plain, name)}
    own = dict(_plain_class=plain, _has_reader=has_reader, __module__=plain.__module__, **methods)
    return type(plain.__name__, (BcosModel, plain), own)


def _rebuild(plain: Any, has_reader: bool) -> Any:
    new = _bcos_class(plain, has_reader)
    return new.__new__(new)


def adopt_class(model: nn.Module, config: BcosConfig, rules: dict[type[nn.Module], Any]) -> nn.Module:
    """Give a converted network its class: its own, with `BcosModel` mixed in. It pickles, copies and scripts."""
    if not isinstance(model, BcosModel):
        plain: Any = type(model)
        has_reader = isinstance(getattr(model, "image_reader", None), ImageReader)
        model.__class__ = _bcos_class(plain, has_reader and not isinstance(model, nn.Sequential))
    model.bcos_config = config  # type: ignore[assignment]
    model.bcos_rules = rules  # type: ignore[assignment]
    return model


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradients while the block runs: only the image does."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def bcosify(
    model: nn.Module, config: BcosConfig | None = None, *, rules: Mapping[type[nn.Module], Rule] = RULES
) -> nn.Module:
    """Convert a network to its B-cos equivalent.

    Parameters are adopted, not copied, except where their shape changes (the stem, the classifier, MaxOut). Converting
    a converted network again only converts what is new in it.

    Args:
        model: Any timm model, or a network of your own. Changed in place.
        config: What to convert to; `BcosConfig()` fine-tunes pretrained weights at B = 2.
        rules: From exact module type to rule; extend the table with `RULES | {MyBlock: my_rule}`.

    Returns:
        The converted network: the same object, unless the root itself has been replaced.

    Raises:
        UnsupportedModuleError: Lists every module without a rule. The model is left untouched.
        BcosError: If nothing says how the network's images are normalised.

    Example:
        >>> model = bcosify(timm.create_model("resnet50", pretrained=True), BcosConfig.finetune(b=1, bias=True))
    """
    config = config or BcosConfig()
    table = dict(rules)
    if config.positions == "attention":
        attention_blocks(model)
    places = Places(model, config)
    plan = plan_replacements(model, config, table, places)
    if "" in plan:
        return plan[""]
    for name, replacement in plan.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    if places.needs_reader:
        model = _add_reader(model, places.mean, places.std)
    if config.positions == "attention" and not hasattr(model, "positions"):
        confine_positions(model)
    _link_heads(model)
    _refuse_folding(model)
    _take_unnormalised_images(model)
    return adopt_class(model, config, table)


FOLDING = ("fuse", "reparameterize", "switch_to_deploy")


def refuse_folding(*_: Any, **__: Any) -> NoReturn:
    """What a converted module answers to timm's `reparameterize_model`."""
    raise ModelStateError(
        "a norm or a parallel branch cannot be folded into a B-cos layer, whose response is not linear in its weight: "
        "call reparameterize_model on the plain network and convert the result"
    )


def _refuse_folding(model: nn.Module) -> None:
    for module in model.modules():
        for name in FOLDING:
            if hasattr(type(module), name):
                setattr(module, name, refuse_folding)


def _add_reader(model: Any, mean: Stats, std: Stats) -> nn.Module:
    like = next(model.parameters())
    reader = ImageReader(image_channels_of(model), mean, std, like.device, like.dtype)
    if isinstance(model, nn.Sequential):  # which would run it as its last layer
        return nn.Sequential(OrderedDict(image_reader=reader, network=model)).train(model.training)
    model.image_reader = reader.train(model.training)
    return model


def _link_heads(model: nn.Module) -> None:
    """A pooling layer lets maps through exactly while a classifier beside it pools by itself."""
    for parent in model.modules():
        children = list(parent.children())
        defers = any(isinstance(m, BcosConvClassifier) for m in children)
        for child in children:
            if isinstance(child, BcosPool2d | BcosFlatten):
                child.deferred = defers


def _take_unnormalised_images(model: Any) -> None:
    """The cfg tells timm's data pipeline to leave pixels in [0, 1]."""
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        channels = len(cfg.get("mean") or (0, 0, 0))
        model.pretrained_cfg = dict(cfg, mean=(0.0,) * channels, std=(1.0,) * channels)
        model.default_cfg = model.pretrained_cfg
