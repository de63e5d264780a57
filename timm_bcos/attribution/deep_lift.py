"""DeepLIFT (arXiv 1704.02685) with the rescale rule, from a baseline of zeros.

captum's implementation processes the baseline in the same pass, with a graph, and copies the inputs and outputs of each
activation, which takes four times the memory. Here the baseline is processed first, without a graph, and only the
multiplier of each activation is stored.
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
EPS = 1e-10  # inputs that differ by less count as equal; the multiplier is then the gradient
ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
POOLS: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: F.max_pool1d, nn.MaxPool2d: F.max_pool2d, nn.MaxPool3d: F.max_pool3d,
}  # fmt: skip


def multiplied_contributions(model: nn.Module, x: Tensor, targets: Tensor, activations: Kinds) -> Tensor:
    """Contributions of the inputs to the difference between the logits and those of an input of zeros.

    Multipliers follow the rescale rule for activations and max pooling; for all other functions they are gradients.

    Args:
        model: The model. Its activations are hooked during the call, and set to `inplace=False`.
        x: Inputs (N, C, H, W) of the model, a leaf tensor.
        targets: Classes (N,).
        activations: Types of further elementwise activation modules.

    Returns:
        Contributions (N, C, H, W).

    Raises:
        MethodError: If an activation module runs twice in a pass.
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
            return _RescaledPool.apply(args[0], reference, module)
        (slope,) = torch.autograd.grad(output, args[0], torch.ones_like(output))
        change = args[0].detach() - reference
        with torch.no_grad():
            ratio = (output - module.forward(reference)) / change
        return _Multiplied.apply(args[0], output.detach(), slope.where(change.abs() < EPS, ratio))

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
    """The tensors that forward saves."""

    saved_tensors: tuple[Tensor, ...]
    pool: Any


class _Multiplied(torch.autograd.Function):
    """Returns y, with a given multiplier as the gradient with respect to x."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        return y.clone()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


class _RescaledPool(torch.autograd.Function):
    """Max pooling. Increases are attributed to the current maximum, decreases to that of the baseline."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, reference: Tensor, pool: nn.Module) -> Tensor:
        ctx.save_for_backward(x, reference)
        ctx.pool = pool
        return pool.forward(x)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        x, reference = ctx.saved_tensors
        (y, winners), (before, earlier) = (_max_and_winners(ctx.pool, values) for values in (x, reference))
        higher, change = torch.maximum(y, before), x - reference
        contributions = _scattered(grad * (higher - before), winners, x)
        contributions += _scattered(grad * (y - higher), earlier.expand_as(winners), x)
        plain = _scattered(grad, winners, x)
        return torch.where(change.abs() < EPS, plain, contributions / change), None, None


def _max_and_winners(pool: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each window, and its index among the flattened positions."""
    found: tuple[Tensor, Tensor] = POOLS[type(pool)](
        x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
    )
    return found


def _scattered(values: Tensor, winners: Tensor, like: Tensor) -> Tensor:
    """Add the values of windows to their maximal inputs; an input may be the maximum of several windows."""
    flat = torch.zeros_like(like).flatten(2)
    return flat.scatter_add_(2, winners.flatten(2), values.flatten(2)).reshape(like.shape)
