"""Rules for norms, with or without a built-in activation."""

from typing import Any, TypeVar

import torch
from torch import nn

from ...nn.layers import ShiftedActivation
from ...nn.module_utils import clone
from ...nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d, UncenteredBatchNormAct2d
from ..blocks import WIDE_NORM_ACTS, WIDE_NORMS
from ..config import BcosConfig
from .base import LayerRole, refuse, remove_biases, with_class


def replace_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Batch norms of one or two dimensions, synchronized or not."""
    if hasattr(norm, "act"):  # torch's `convert_sync_batchnorm` keeps the activation in timm's norms without calling it
        return replace_batch_norm_act(norm, layer_role, config)
    if config.norm == "remove":
        return nn.Identity()
    if _stays(norm, layer_role, config):
        return norm
    kind = UncenteredBatchNorm1d if isinstance(norm, nn.BatchNorm1d) else UncenteredBatchNorm2d
    return kind.from_batch_norm(_with_weight(norm))


def replace_batch_norm_act(norm: Any, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's batch norms with a built-in dropout and activation."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config)
    if _stays(norm, layer_role, config):
        return norm
    new = UncenteredBatchNormAct2d.from_batch_norm(_with_weight(norm))
    new.drop, new.act = norm.drop, norm.act
    if config.bias == "reference" and not isinstance(norm.act, nn.Identity | ShiftedActivation):
        shift = torch.zeros_like(new.weight, requires_grad=new.weight.requires_grad)  # trainable if the norm is
        new.act = ShiftedActivation(norm.act, shift)
    return new


def _stays(norm: nn.BatchNorm1d | nn.BatchNorm2d, layer_role: LayerRole, config: BcosConfig) -> bool:
    if norm.running_var is None:
        reason = "has no running statistics: it normalizes by the batch, so that images would explain each other"
        refuse(layer_role, norm, f"{reason}; train it with track_running_stats=True, or pass norm='remove'")
    return config.norm == "keep" and config.adds_bias


BatchNormT = TypeVar("BatchNormT", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm1d | nn.BatchNorm2d)


def _with_weight(norm: BatchNormT) -> BatchNormT:
    """The norm, with weights of 1 if it has none."""
    if norm.weight is not None:
        return norm
    assert norm.running_var is not None
    return clone(norm, weight=nn.Parameter(torch.ones_like(norm.running_var), requires_grad=False))


def replace_frozen_batch_norm(norm: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Batch norms whose weights are buffers, with or without a built-in activation."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config) if hasattr(norm, "act") else nn.Identity()
    if config.norm == "keep" and config.adds_bias:
        return norm
    return clone(norm, **{name: torch.zeros_like(getattr(norm, name)) for name in ("bias", "running_mean")})


def _removed_norm_act(norm: Any, config: BcosConfig) -> nn.Module:
    return nn.Identity() if config.activation == "remove" else nn.Sequential(norm.drop, norm.act)


def replace_norm(norm: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Norms over the features of one input, which explanation mode makes dynamic linear, without their bias."""
    if config.norm == "remove":
        return nn.Identity()
    norm = with_class(norm, WIDE_NORMS | WIDE_NORM_ACTS)
    return norm if config.adds_bias or getattr(norm, "bias", None) is None else clone(norm, bias=None)


def replace_norm_act(norm: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Norms over the features of one input with a built-in activation."""
    return _removed_norm_act(norm, config) if config.norm == "remove" else replace_norm(norm, layer_role, config)


def replace_fused_norm_act(norm: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Norms and activations in one formula; the activation is disabled by removing its parameter, `v` or `tau`."""
    if config.norm == "remove":
        if config.activation == "keep":
            refuse(layer_role, norm, "is norm and activation in one: pass norm='keep', or activation='remove' too")
        return nn.Identity()
    norm = remove_biases(norm, layer_role, config)
    owned = "v" if hasattr(norm, "v") else "tau"
    return clone(norm, **{owned: None}) if config.activation == "remove" else norm
