"""torchao and B-cos layers: what would replace them by plain ones, or cannot work, raises an error.

A fused model (`timm_bcos.fuse`) can be quantized, because its layers use their weights as they are.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..errors import ModelStateError
from ..nn.base import BcosLayer
from ..nn.layers import BcosLinear
from .registration import marked, original

__all__ = ["refuse_float8", "refuse_unfused"]

Filter = Callable[[nn.Module, str], bool]
Replace = Callable[..., nn.Module]


def refuse_float8() -> None:
    """Make `convert_to_float8_training` refuse B-cos layers, which it would replace by plain ones."""
    from torchao.float8 import float8_linear_utils

    swap = original(float8_linear_utils.swap_linear_layers)

    @wraps(swap)
    def refusing(module: nn.Module, *args: Any, module_filter_fn: Filter | None = None, **kwargs: Any) -> nn.Module:
        _check_kept(module, module_filter_fn)
        return swap(module, *args, module_filter_fn=module_filter_fn, **kwargs)

    float8_linear_utils.swap_linear_layers = marked(refusing)


def _check_kept(model: nn.Module, filter_fn: Filter | None) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, BcosLinear) and (filter_fn is None or filter_fn(layer, name)):
            raise ModelStateError(
                f"{name or '(root)'}: float8 training would replace a {type(layer).__name__} by a plain linear "
                f"layer: leave such layers out, module_filter_fn=lambda module, name: not isinstance(module, "
                f"timm_bcos.BcosLinear)"
            )


def refuse_unfused() -> None:
    """Make `quantize_` refuse B-cos layers that normalize their weight, and configs that replace B-cos layers."""
    from torchao.quantization import quant_api

    walk = original(quant_api._replace_with_custom_fn_if_matches_filter)

    @wraps(walk)
    def refusing(
        model: nn.Module, replacement_fn: Replace, filter_fn: Filter, cur_fqn: str = "", *args: Any, **kwargs: Any
    ) -> Any:
        if cur_fqn == "":  # it calls itself for the parts of the model
            _check_fused(model, filter_fn)
            replacement_fn = _keeping_kind(replacement_fn)
        return walk(model, replacement_fn, filter_fn, cur_fqn, *args, **kwargs)

    quant_api._replace_with_custom_fn_if_matches_filter = marked(refusing)


def _check_fused(model: nn.Module, filter_fn: Filter) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BcosLayer) and not module.is_fused and filter_fn(module, name):
            raise ModelStateError(
                f"{name or '(root)'}: a {type(module).__name__} normalizes its weight in each pass, which a quantized "
                f"weight does not allow: quantize a fused copy, quantize_(timm_bcos.fuse(model), ...)"
            )


def _keeping_kind(replace: Replace) -> Replace:
    @wraps(replace)
    def checked(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        new = replace(module, *args, **kwargs)
        if isinstance(module, BcosLayer) and not isinstance(new, type(module)):
            raise ModelStateError(
                f"torchao would replace a {type(module).__name__} by a {type(new).__name__}, which is no B-cos layer: "
                f"leave such layers out with filter_fn"
            )
        return new

    return checked
