"""DeepLIFT (arXiv 1704.02685) with the rescale rule, from a baseline of zeros.

captum's takes the baseline along in the same pass and keeps its graph, too, and copies of what goes into and comes out
of each activation: four times the memory. Here the baseline passes before, without a graph, and an activation leaves
only its multiplier.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..errors import MethodError
from ..nn.module_utils import first_output, hooked

__all__ = ["multiplied_contributions"]

Kinds = tuple[type[nn.Module], ...]
EPS = 1e-10  # below which a change of an input is none, and its gradient is taken
ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
POOLS: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: F.max_pool1d, nn.MaxPool2d: F.max_pool2d, nn.MaxPool3d: F.max_pool3d,
}  # fmt: skip


def multiplied_contributions(model: nn.Module, x: Tensor, targets: Tensor, activations: Kinds) -> Tensor:
    """What inputs contribute to the difference of logits from those of an input of zeros.

    Multipliers are those of the rescale rule for activations and max pooling, and gradients for everything else.

    Args:
        model: Its activations are hooked for the time, and no longer work in place.
        x: (N, C, H, W), as the model takes it, a leaf.
        targets: (N,) classes.
        activations: Types of modules that are functions of single numbers, besides torch's most common ones.

    Returns:
        (N, C, H, W).

    Raises:
        MethodError: For a module that runs twice in a pass.
    """
    kinds = {*ACTIVATIONS, *activations, *POOLS}
    modules = [module for module in model.modules() if type(module) in kinds]
    for module in modules:
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    references: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module in references:
            raise MethodError(f"deeplift needs a module for each activation; one {type(module).__name__} runs twice")
        references[module] = args[0]

    def rescale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        reference = references[module]
        if type(module) in POOLS:
            return _RescaledPool.apply(args[0], reference, module)  # type: ignore[no-any-return]
        (slope,) = torch.autograd.grad(output, args[0], torch.ones_like(output))
        change = args[0].detach() - reference
        with torch.no_grad():
            ratio = (output - module.forward(reference)) / change
        return _Multiplied.apply(args[0], output.detach(), slope.where(change.abs() < EPS, ratio))  # type: ignore[no-any-return]

    with torch.no_grad(), hooked(modules, note):
        model(torch.zeros_like(x[:1]))
    handles = [module.register_forward_hook(rescale) for module in references]
    try:
        logits = first_output(model(x))
    finally:
        for handle in handles:
            handle.remove()
    (multipliers,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), x)
    return x.detach() * multipliers


class _Context(FunctionCtx):
    """What forward leaves to backward."""

    saved_tensors: tuple[Tensor, ...]
    pool: Any


class _Multiplied(torch.autograd.Function):
    """y, whose gradient by x is a given multiplier."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        return y.clone()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None, None


class _RescaledPool(torch.autograd.Function):
    """Max pooling: a change goes to the input that is largest now as far as it raises, else to the one before."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, reference: Tensor, pool: nn.Module) -> Tensor:
        ctx.save_for_backward(x, reference)
        ctx.pool = pool
        return pool.forward(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, reference = ctx.saved_tensors
        (y, winners), (before, earlier) = (_max_and_winners(ctx.pool, values) for values in (x, reference))
        higher, change = torch.maximum(y, before), x - reference
        contributions = _scattered(grad * (higher - before), winners, x)
        contributions += _scattered(grad * (y - higher), earlier.expand_as(winners), x)
        plain = _scattered(grad, winners, x)
        return torch.where(change.abs() < EPS, plain, contributions / change), None, None


def _max_and_winners(pool: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each window, and where it is in the flattened positions."""
    found: tuple[Tensor, Tensor] = POOLS[type(pool)](
        x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
    )
    return found


def _scattered(values: Tensor, winners: Tensor, like: Tensor) -> Tensor:
    """What windows give to the inputs that won them; one input may win several."""
    flat = torch.zeros_like(like).flatten(2)
    return flat.scatter_add_(2, winners.flatten(2), values.flatten(2)).reshape(like.shape)
