"""What a converted network can do beyond timm's: explain itself, and stay B-cos when its head changes."""

import copy
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .config import BcosConfig
from .layers import BcosPool2d

__all__ = ["BcosModel", "adopt_class"]


class BcosModel:
    """Mixed into the class of every converted network; `isinstance(model, BcosModel)` tells one from a plain network.

    Attributes:
        bcos_config: The conversion that made the network.
        bcos_rules: Its rule table.
    """

    bcos_config: BcosConfig
    bcos_rules: dict[type[nn.Module], Any]
    _plain_class: type[nn.Module]

    def explain(self, x: Tensor, target: Any = None, **kwargs: Any) -> Any:
        """Explain this network's output for images; see `timm_bcos.explain`."""
        from .explain import explain

        return explain(self, x, target, **kwargs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._plain_class,), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript has no `super()`: it compiles timm's own class, whose modules are the B-cos ones."""
        plain = self._plain_class.__new__(self._plain_class)
        plain.__dict__.update(self.__dict__)
        plain.__dict__["_modules"] = dict(self.__dict__["_modules"])
        for name in ("bcos_config", "bcos_rules"):
            plain.__dict__.pop(name, None)
        return plain


def _reset_classifier(self: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """timm builds a plain head; convert it as the first one was."""
    from .convert import bcosify

    super(type(self), self).reset_classifier(num_classes, *args, **kwargs)
    bcosify(self, self.bcos_config, rules=self.bcos_rules)


def _forward_head(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """timm's, and features before the logits are pooled although the classifier pools by itself."""
    x = super(type(self), self).forward_head(x, *args, **kwargs)
    pools = [m for m in self.modules() if isinstance(m, BcosPool2d) and m.deferred]
    pre_logits = args[0] if args else kwargs.get("pre_logits", False)
    return pools[0].pool_now(x) if pre_logits and pools else x


OVERRIDES = {"reset_classifier": _reset_classifier, "forward_head": _forward_head}


@lru_cache(maxsize=None)
def _bcos_class(plain: type[nn.Module]) -> type[nn.Module]:
    own = {name: method for name, method in OVERRIDES.items() if hasattr(plain, name)}
    for name, method in own.items():
        own[name] = _with_signature_of(getattr(plain, name), method)
    return type(plain.__name__, (BcosModel, plain), {"_plain_class": plain, "__module__": plain.__module__, **own})


def _with_signature_of(original: Any, method: Any) -> Any:
    method = copy.copy(method)
    method.__wrapped__ = original  # what `inspect.signature` shows, which timm and its users read
    return method


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    new = _bcos_class(plain)
    return new.__new__(new)


def adopt_class(model: nn.Module, config: BcosConfig, rules: dict[type[nn.Module], Any]) -> nn.Module:
    """Give a converted network its class: its own, with `BcosModel` mixed in. It pickles, copies and scripts."""
    if not isinstance(model, BcosModel):
        model.__class__ = _bcos_class(type(model))
    model.bcos_config = config  # type: ignore[assignment]
    model.bcos_rules = rules  # type: ignore[assignment]
    return model
