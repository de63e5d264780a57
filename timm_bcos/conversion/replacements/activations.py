"""Rules for activations, and for blocks that call an activation as a function."""

from torch import nn

from ..._compat import timm_layers
from ...nn.layers import SigmoidActivation
from ...nn.module_utils import clone
from ..blocks import BARE
from ..config import BcosConfig
from .base import LayerRole, refuse, remove_biases, with_class


def replace_activation(act: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Activations, which explanation mode makes dynamic linear."""
    return nn.Identity() if config.activation == "remove" else act


# The same activations without an autograd function of their own, by the names of their types.
PLAIN_FORMS: dict[str, type[nn.Module]] = {
    "SwishMe": nn.SiLU, "MishMe": nn.Mish, "HardSwishMe": nn.Hardswish, "HardSigmoidMe": nn.Hardsigmoid,
    "HardMishMe": timm_layers.HardMish,
}  # fmt: skip


def replace_memory_efficient_activation(act: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """timm's memory-efficient activations, which hide their computation from explanation mode in autograd functions."""
    plain = PLAIN_FORMS[type(act).__name__]().train(act.training)
    return plain if type(plain) is nn.Hardsigmoid else replace_activation(plain, layer_role, config)


def replace_biased_activation(act: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Activations that add a constant of their own."""
    return nn.Identity() if config.activation == "remove" else remove_biases(act, layer_role, config)


def replace_sequential(sequence: nn.Sequential, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Sequentials, in which a sigmoid with layers behind it is an activation, and otherwise a gate."""
    children = list(sequence.named_children())
    hidden = [
        name
        for i, (name, child) in enumerate(children)
        if type(child) is nn.Sigmoid and any(m._parameters for _, m in children[i + 1 :])
    ]
    return clone(sequence, **{name: SigmoidActivation() for name in hidden}) if hidden else sequence


def replace_functional_activation(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Blocks that call their activation as a function."""
    return block if config.activation == "keep" else with_class(block, BARE)


def refuse_functional_activation(model: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Models that call their last activation in their own forward pass, where it cannot be removed."""
    if config.activation == "remove":
        refuse(layer_role, model, "applies a ReLU in its own forward pass: take another model, or activation='keep'")
    return model


def sigmoid_as_activation(act: nn.Sigmoid, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """Sigmoids whose value is passed on instead of multiplied."""
    return SigmoidActivation().train(act.training)


def replace_iformer_attention(block: nn.Module, layer_role: LayerRole, config: BcosConfig) -> nn.Module:
    """iFormer's attention, whose values and gates come from one sigmoid."""
    return clone(block, gate_act=SigmoidActivation().train(block.training))
