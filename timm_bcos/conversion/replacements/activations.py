"""Rules for activations, and for blocks that call one as a function."""

from torch import nn

from ..._compat import timm_layers
from ...nn.layers import SigmoidActivation
from ...nn.module_utils import clone
from ..blocks import BARE
from ..config import BcosConfig
from .base import LayerRole, refuse, with_class
from .offsets import replace_offset


def replace_activation(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """Activations, which explanation mode makes dynamic linear."""
    return nn.Identity() if config.activation == "remove" else act


# Forms with an autograd function of their own, by the names of their types, and the same activations without.
PLAIN_FORMS: dict[str, type[nn.Module]] = {
    "SwishMe": nn.SiLU, "MishMe": nn.Mish, "HardSwishMe": nn.Hardswish, "HardSigmoidMe": nn.Hardsigmoid,
    "HardMishMe": timm_layers.HardMish,
}  # fmt: skip


def replace_memory_efficient(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's memory-efficient activations compute inside autograd functions, where explanation mode cannot look."""
    plain = PLAIN_FORMS[type(act).__name__]().train(act.training)
    return plain if type(plain) is nn.Hardsigmoid else replace_activation(plain, place, config)


def replace_activation_with_offset(act: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """An activation that adds a constant of its own."""
    return nn.Identity() if config.activation == "remove" else replace_offset(act, place, config)


def replace_sequential(sequence: nn.Sequential, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A container, in which a sigmoid that feeds another layer is an activation, not a gate."""
    children = list(sequence.named_children())
    feeding = [
        name
        for i, (name, child) in enumerate(children)
        if type(child) is nn.Sigmoid and any(m._parameters for _, m in children[i + 1 :])
    ]
    return clone(sequence, **{name: SigmoidActivation() for name in feeding}) if feeding else sequence


def replace_bare(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A block that calls its activation as a function."""
    return block if config.activation == "keep" else with_class(block, BARE)


def keep_unless_bare(model: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """A network that calls its last activation in its own forward pass."""
    if config.activation == "remove":
        refuse(place, model, "applies a ReLU in its own forward pass: take another network, or activation='keep'")
    return model


def sigmoid_as_activation(act: nn.Sigmoid, place: LayerRole, config: BcosConfig) -> nn.Module:
    """For sigmoids whose value is passed on, not multiplied."""
    return SigmoidActivation().train(act.training)


def pass_gates(block: nn.Module, place: LayerRole, config: BcosConfig) -> nn.Module:
    """iFormer's attention takes values and gates from one sigmoid."""
    return clone(block, gate_act=SigmoidActivation().train(block.training))
