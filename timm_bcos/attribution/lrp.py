"""Layer-wise Relevance Propagation with zennit, completed for timm's models.

zennit has rules for modules only. This module adds rules for functions (sums of branches, means, gates) and for timm's
batch norms with an activation inside, so that relevance is conserved (Bach et al., 2015, section 2).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from zennit.attribution import Gradient
from zennit.canonizers import MergeBatchNorm
from zennit.composites import EpsilonPlusFlat
from zennit.core import stabilize
from zennit.rules import Pass

from ..nn.module_utils import hooked

__all__ = ["MergeBatchNorms", "RelevanceOfFunctions", "relevance"]


def relevance(model: nn.Module, x: Tensor, targets: Tensor, activations: tuple[type[nn.Module], ...]) -> Tensor:
    """Relevance of the inputs for the logits of their targets.

    The rules are z⁺ for convolutions, ε for linear layers, and flat for the first layer.

    Args:
        model: The model; hooks and merged batch norms are undone afterwards.
        x: Inputs (N, C, H, W) of the model.
        targets: Classes (N,).
        activations: Types of modules that pass relevance on unchanged.

    Returns:
        Relevance (N, C, H, W).
    """

    def wanted(logits: Tensor) -> Tensor:
        return F.one_hot(targets, logits.shape[1]).to(logits) * logits

    composite = EpsilonPlusFlat(layer_map=[(activations, Pass())], canonizers=[MergeBatchNorms(x[:1])])
    propagate = Gradient(model, composite, attr_output=wanted)
    with propagate, RelevanceOfFunctions():
        _, found = propagate(x)
    return found


Function = Callable[..., Tensor]


class _Context(FunctionCtx):
    """The function and the tensors that forward saves."""

    func: Function
    saved_tensors: tuple[Tensor, ...]


class _InProportion(torch.autograd.Function):
    """A linear function of tensors. Each input gets relevance in proportion to its contribution to the output."""

    @staticmethod
    def forward(ctx: _Context, func: Function, *inputs: Tensor) -> Tensor:
        ctx.func = func
        ctx.save_for_backward(*inputs)
        return func(*inputs)

    @staticmethod
    def backward(ctx: _Context, relevance: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.func(*inputs)
        shares = torch.autograd.grad(output, inputs, relevance / stabilize(output.detach()))
        return None, *(x.detach() * share for x, share in zip(inputs, shares, strict=True))


def _addition(func: Function, x: Tensor | float, other: Tensor | float, **kwargs: Any) -> Tensor:
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return func(x, other, **kwargs)
    return _InProportion.apply(lambda a, b: torch.add(a, b, **kwargs), x, other)


def _total(func: Function, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return _InProportion.apply(lambda a: func(a, *args, **kwargs), x)


def _gate(func: Function, x: Tensor | float, other: Tensor | float) -> Tensor:
    """The smaller factor is a gate and treated as constant; the other gets all relevance."""
    tensors = [t for t in (x, other) if isinstance(t, Tensor)]
    signal = max(tensors, key=lambda t: t.numel())
    factor = other if signal is x else x
    constant = factor.detach() if isinstance(factor, Tensor) else factor
    return _InProportion.apply(lambda a: torch.mul(a, constant), signal)


TABLE: dict[Callable[..., object], Function] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__), _addition),
    **dict.fromkeys((torch.mean, Tensor.mean, torch.sum, Tensor.sum), _total),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__), _gate),
}


class RelevanceOfFunctions(TorchFunctionMode):
    """Replaces the gradients of additions, sums, means and products by relevance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        is_signal = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        handler = TABLE.get(func) if is_signal and torch.is_grad_enabled() else None
        return handler(func, *args, **(kwargs or {})) if handler else func(*args, **(kwargs or {}))


class MergeBatchNorms(MergeBatchNorm):
    """Merges batch norms into the convolutions before them, including timm's batch norms with an activation.

    Args:
        prepared: Input (1, C, H, W) that the model is run on to find the order of its modules.
    """

    def __init__(self, prepared: Tensor) -> None:
        super().__init__()
        self.prepared = prepared

    def apply(self, root_module: nn.Module) -> list["MergeBatchNorms"]:
        """Merge all pairs; zennit undoes the merges afterwards."""
        merges = []
        for linear, norm in self._pairs(root_module):
            merge = type(self)(self.prepared)
            merge.register((linear,), norm)
            merges.append(merge)
        return merges

    @torch.no_grad()
    def _pairs(self, root_module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        makers: list[tuple[Tensor, nn.Module]] = []
        pairs: list[tuple[nn.Module, nn.Module]] = []

        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, self.linear_type):
                makers.append((output, module))
            else:
                pairs.extend((maker, module) for made, maker in makers if made is args[0])

        kinds = (*self.linear_type, *self.batch_norm_type)
        with hooked((m for m in root_module.modules() if isinstance(m, kinds)), note):
            root_module(self.prepared)
        return pairs
