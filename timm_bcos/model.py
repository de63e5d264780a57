"""What a converted network can do beyond timm's: explain itself, and stay B-cos when its head changes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from .config import BcosConfig
from .layers import BcosConv2d, BcosPool2d, ImageReader

__all__ = ["BcosModel", "adopt_class", "frozen"]


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
        from .explain import explain

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
        from .convert import bcosify

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
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.weight = plain.weight
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
