"""Attribution methods for vision transformers: attention rollout, Chefer et al., and AttnLRP."""

import math
from collections import ChainMap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dynamic_linear.attention import attention_weights
from ..dynamic_linear.bias_tracker import function_name
from ..dynamic_linear.mode import DynamicLinearMode, active
from ..dynamic_linear.products import CONVOLUTIONS
from ..dynamic_linear.registry import TABLE, Function, FunctionRule, Mode, named, on_linear_path
from ..errors import MethodError
from ..nn.module_utils import hooked
from .registry import AttributionModel, register

__all__: list[str] = []


@register("attention_rollout")
def attention_rollout(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Attention rollout (arXiv 2005.00928) of a vision transformer; the same map for every class."""
    _check_transformer(subject, "attention_rollout")
    with torch.no_grad():
        _, layers = _logits_and_attention(subject, subject.prepare(x))
    rolled = identity = torch.eye(layers[0].shape[-1]).to(x)
    for attention in layers:
        rolled = (attention.mean(1) + identity) / 2 @ rolled
    return _map_of_patches(subject.part, rolled, x)


@register("chefer")
def chefer(subject: AttributionModel, x: Tensor, targets: Tensor) -> Tensor:
    """Generic attention explainability (Chefer et al., arXiv 2103.15679, section 3) of a vision transformer.

    R = I, and R ← R + Ā · R in each layer, where Ā is the mean over heads of (∇A ⊙ A)⁺. The map shows R - I and is
    never negative. Subtracting I changes nothing for the class token, and only a constant for the mean over patches.
    """
    _check_transformer(subject, "chefer")
    logits, layers = _logits_and_attention(subject, subject.leaf(x))
    gradients = torch.autograd.grad(_wanted(logits, targets), layers)
    gathered = torch.zeros_like(layers[0][:, 0])  # R - I: beside I, small numbers would be lost
    for attention, gradient in zip(layers, gradients, strict=True):
        raising = (gradient * attention.detach()).clamp(min=0).mean(1)
        gathered = gathered + raising + raising @ gathered
    return _map_of_patches(subject.part, gathered, x)


@register("attnlrp")
def attention_relevance(
    subject: AttributionModel, x: Tensor, targets: Tensor, *, gamma: float = 0.05, conv_gamma: float = 0.25
) -> Tensor:
    """AttnLRP (Achtibat et al., arXiv 2402.05602, section 3), computed as input × modified gradient of the logit.

    Linear layers follow the γ rule (the ε rule if γ = 0). Activations pass relevance on, and statistics of norms are
    constants. Softmax follows R_i = x_i (R_i - s_i Σ_j R_j), and the factors of a product get half each. Sigmoid
    gates are constants, as in explanation mode, whose rules are used except for attention and γ.

    Args:
        subject: A plain model.
        x: Images (N, C, H, W).
        targets: Classes (N,).
        gamma: γ of linear layers. The default is not from the paper.
        conv_gamma: γ of convolutions, such as the patch embedding. The default is not from the paper.
    """
    if subject.is_bcos:
        raise MethodError("attnlrp has rules for linear layers and activations; B-cos layers are neither")
    for name, value in (("gamma", gamma), ("conv_gamma", conv_gamma)):
        if not 0 <= value < math.inf:
            raise MethodError(f"{name}={value!r}: give a number from 0")
    leaf = subject.leaf(x)
    with active(_RelevanceMode(leaf, gamma, conv_gamma)):
        logits = subject(leaf.clone())  # a clone, because the model may modify it in place
    if not logits.requires_grad:
        raise MethodError(
            f"attnlrp: the logits of {subject.kind} are the output of a gate, which passes no relevance on"
        )
    (gradient,) = torch.autograd.grad(_wanted(logits, targets), leaf)
    return (leaf * gradient).sum(1)


class _RelevanceMode(DynamicLinearMode):
    """Dynamic linear mode with ordinary gradients of attention and the γ rule; input × gradient is the relevance.

    Args:
        leaf: Images with respect to which gradients are computed.
        gamma: γ of linear layers.
        conv_gamma: γ of convolutions.
    """

    def __init__(self, leaf: Tensor, gamma: float, conv_gamma: float) -> None:
        rules: dict[Function, FunctionRule] = dict.fromkeys([attention_weights, *named("softmax")], _ordinary_gradient)
        if gamma:
            rules |= dict.fromkeys(named("linear"), _gamma_rule(gamma))
        if conv_gamma:
            rules |= dict.fromkeys(CONVOLUTIONS, _gamma_rule(conv_gamma))
        super().__init__(leaf, table=ChainMap(rules, TABLE))

    def suspected(self, result: object, func: Function) -> object:
        if on_linear_path(result):
            raise MethodError(
                f"attnlrp has no rule for {function_name(func)}: register one with timm_bcos.register_function"
            )
        return result


def _ordinary_gradient(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> object:
    """The ordinary gradient, which times the input is AttnLRP's rule for softmax."""
    return func(*args, **kwargs)


def _gamma_rule(gamma: float) -> FunctionRule:
    """The γ rule for inputs of both signs: contributions with the output's sign count 1 + γ times, as does a bias."""

    def linear(
        mode: Mode, func: Function, /, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if on_linear_path(weight) or on_linear_path(bias):
            return TABLE[func](mode, func, input, weight, bias, *args, **kw)  # type: ignore[return-value]
        raising, lowering = (
            func(input.relu(), w, b, *args, **kw) + func(input - input.relu(), v, None, *args, **kw)
            for w, v, b in _by_sign(weight, bias)
        )
        y = func(input.detach(), weight, bias, *args, **kw)
        counted = raising + lowering + gamma * torch.where(y > 0, raising, lowering)
        return counted * torch.where(counted == 0, 1, y / counted).detach()

    return linear


def _by_sign(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Weights of positive inputs, of negative inputs, and bias: first those that raise outputs."""
    above, below = weight.clamp(min=0), weight.clamp(max=0)
    biases = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
    return [(above, below, biases[0]), (below, above, biases[1])]


def _wanted(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the targets' logits. Images are independent, so its gradient contains the gradient of each."""
    return logits.gather(1, targets[:, None]).sum()


def _check_transformer(subject: AttributionModel, method: str) -> None:
    if not all(hasattr(subject.part, name) for name in ("num_prefix_tokens", "patch_embed", "blocks")):
        raise MethodError(f"{method} is for vision transformers, not for {subject.kind}")
    if subject.request.is_placed or subject.request.layer is not None:
        raise MethodError(
            f"{method} follows attention to the classifier: leave out layer, position and region, or use another method"
        )


def _logits_and_attention(subject: AttributionModel, prepared: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the weights (N, heads, T, T) of each layer."""
    dropouts = [module for name, module in subject.model.named_modules() if name.endswith("attn_drop")]
    for module in subject.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # the fused kernel does not return the weights
    layers: list[Tensor] = []
    with hooked(dropouts, lambda module, args, output: layers.append(output)):
        logits = subject(prepared)
    model: Any = subject.part
    tokens = model.num_prefix_tokens + math.prod(model.patch_embed.grid_size)
    if not layers or any(attention.shape[-2:] != (tokens, tokens) for attention in layers):
        raise MethodError(f"{subject.kind} does not provide the attention of its {tokens} tokens in each layer")
    return logits, layers


def _map_of_patches(model: Any, by_token: Tensor, x: Tensor) -> Tensor:
    """(N, H, W) map from (N, T, T): the row of the token that the classifier reads, or the mean row of the patches."""
    prefix = model.num_prefix_tokens
    reads_token = prefix and getattr(model, "global_pool", "token") == "token"
    to_output = by_token[:, 0] if reads_token else by_token[:, prefix:].mean(1)
    grid = to_output[:, prefix:].unflatten(1, tuple(model.patch_embed.grid_size))
    return F.interpolate(grid[:, None], x.shape[-2:], mode="bilinear")[:, 0]
