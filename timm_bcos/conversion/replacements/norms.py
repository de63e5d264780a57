"""Rules for norms, with or without an activation behind them."""

from typing import Any, TypeVar

import torch
from torch import nn

from ...nn.layers import ShiftedActivation
from ...nn.module_utils import clone
from ...nn.norms import UncenteredBatchNorm1d, UncenteredBatchNorm2d, UncenteredBatchNormAct2d
from ..blocks import WIDE_NORM_ACTS, WIDE_NORMS
from ..config import BcosConfig
from .base import LayerRole, refuse, with_class
from .offsets import replace_offset


def replace_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, place: LayerRole, config: BcosConfig) -> nn.Module:
    """One- and two-dimensional batch norms, and the synchronized one."""
    if hasattr(norm, "act"):  # torch's `convert_sync_batchnorm` leaves the layers inside of timm's norms unused
        return replace_batch_norm_act(norm, place, config)
    if config.norm == "remove":
        return nn.Identity()
    if _stays(norm, place, config):
        return norm
    kind = UncenteredBatchNorm1d if isinstance(norm, nn.BatchNorm1d) else UncenteredBatchNorm2d
    return kind.from_batch_norm(_with_weight(norm))


def replace_batch_norm_act(norm: Any, place: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's batch norms with a drop and an activation layer behind them."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config)
    if _stays(norm, place, config):
        return norm
    new = UncenteredBatchNormAct2d.from_batch_norm(_with_weight(norm))
    new.drop, new.act = norm.drop, norm.act
    if config.bias == "reference" and not isinstance(norm.act, nn.Identity | ShiftedActivation):
        shift = torch.zeros_like(new.weight, requires_grad=new.weight.requires_grad)  # trained as the bias was
        new.act = ShiftedActivation(norm.act, shift)
    return new


def _stays(norm: nn.BatchNorm1d | nn.BatchNorm2d, place: LayerRole, config: BcosConfig) -> bool:
    if norm.running_var is None:
        why = "has no running statistics: it normalizes by the batch, so that images would explain each other"
        refuse(place, norm, f"{why}; train it with track_running_stats=True, or pass norm='remove'")
    return config.norm == "keep" and config.adds_bias


BatchNormT = TypeVar("BatchNormT", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm1d | nn.BatchNorm2d)


def _with_weight(norm: BatchNormT) -> BatchNormT:
    """A batch norm without one multiplies by 1."""
    if norm.weight is not None:
        return norm
    assert norm.running_var is not None
    return clone(norm, weight=nn.Parameter(torch.ones_like(norm.running_var), requires_grad=False))


def replace_frozen_batch_norm(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Batch norms whose numbers are all buffers, with or without an activation behind them."""
    if config.norm == "remove":
        return _removed_norm_act(norm, config) if hasattr(norm, "act") else nn.Identity()
    if config.norm == "keep" and config.adds_bias:
        return norm
    return clone(norm, **{name: torch.zeros_like(getattr(norm, name)) for name in ("bias", "running_mean")})


def _removed_norm_act(norm: Any, config: BcosConfig) -> nn.Module:
    return nn.Identity() if config.activation == "remove" else nn.Sequential(norm.drop, norm.act)


def replace_norm(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A norm over x's own features is dynamic linear as it is, except for its bias."""
    if config.norm == "remove":
        return nn.Identity()
    norm = with_class(norm, WIDE_NORMS | WIDE_NORM_ACTS)
    return norm if config.adds_bias or getattr(norm, "bias", None) is None else clone(norm, bias=None)


def replace_norm_act(norm_act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Likewise with an activation behind it."""
    return _removed_norm_act(norm_act, config) if config.norm == "remove" else replace_norm(norm_act, place, config)


def replace_fused_norm_act(norm: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Norm and activation in one formula, whose activation has a parameter, `v` or `tau`."""
    if config.norm == "remove":
        if config.activation == "keep":
            refuse(place, norm, "is norm and activation in one: pass norm='keep', or activation='remove' too")
        return nn.Identity()
    norm = replace_offset(norm, place, config)
    owned = "v" if hasattr(norm, "v") else "tau"
    return clone(norm, **{owned: None}) if config.activation == "remove" else norm
