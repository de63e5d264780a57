"""Explanation mode: inside it, autograd sees the network as the linear map that it is for its current input.

Outputs stay what they are; only the graph that autograd records changes. Everything that depends on the input but is
not the linear path is treated as a constant (detached): cosine factors, norm statistics, attention weights, gates.
One backward pass from a logit then gives that logit's row of W(x) exactly (section 3.2.1 of arXiv 2205.10268).

`TABLE` says how each torch function is rewritten (`timm_bcos.dynamic.functions` fills it): it covers functions inside
forwards as well as modules. A tensor is on the linear path when it requires a gradient: parameters are frozen in this
mode, so only the image's path does. `declare` adds functions of your own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

Handler = Callable[..., Any]
TABLE: dict[Callable[..., Any], Handler] = {}

__all__ = ["DynamicLinearMode", "constant", "declare", "explanation_mode", "on_linear_path"]


def on_linear_path(x: Any) -> bool:
    """Whether x is (a dynamic linear map of) the image, rather than a constant of the network."""
    return isinstance(x, Tensor) and x.requires_grad


def constant(value: Tensor) -> Tensor:
    """Mark an additive constant, so that `explain` can tell what all constants together contribute.

    The network is linear in the image and its additive constants jointly. Multiplying all constants by α, the
    derivative of a logit by α at α = 1 is their contribution; forward-mode differentiation gives it for every image
    and logit at once, starting from d(α · value)/dα = value.
    """
    if forward_ad._current_level < 0 or forward_ad.unpack_dual(value).tangent is not None:
        return value
    value = value.contiguous()  # an expanded tensor cannot carry a tangent
    return forward_ad.make_dual(value, value.clone())


def declare(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Decorator: how `functions` are rewritten in explanation mode.

    The handler receives the function and then its arguments, and returns the same value with the gradient wanted: that
    of a linear map, everything else being constant. Without a handler a function is differentiated as it is, which is
    right for linear and piecewise linear ones. `timm_bcos.check` tells whether a network is exact.

    Example:
        >>> @timm_bcos.declare(my_gate)  # a gate: what it returns only scales
        ... def _(func, x):
        ...     return func(x.detach())
        >>> @timm_bcos.declare(my_product)  # a product of two activations: half each
        ... def _(func, a, b):
        ...     return 0.5 * func(a, b.detach()) + 0.5 * func(a.detach(), b)
    """

    def register(handler: Handler) -> Handler:
        TABLE.update(dict.fromkeys(functions, handler))
        return handler

    return register


class DynamicLinearMode(TorchFunctionMode):
    """Looks every torch function up in `TABLE`; what is not there runs as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = TABLE.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))


def _in_explanation_mode() -> bool:
    return any(isinstance(mode, DynamicLinearMode) for mode in _get_current_function_mode_stack())


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager in which gradients of `model` are rows of its linear map W(x).

    Every torch function called inside the block is affected, so apply losses and sigmoids outside. Parameters take
    no gradients and gradient checkpointing is off inside; both are restored on exit, whatever happens. Blocks nest.

    Args:
        model: A B-cos network in evaluation mode.

    Example:
        >>> with explanation_mode(model):
        ...     contributions = captum.attr.InputXGradient(model).attribute(timm_bcos.encode_image(x, 3), target=c)
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    checkpointing = [m for m in model.modules() if getattr(m, "grad_checkpointing", False) is True]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in checkpointing:
            module.grad_checkpointing = False  # type: ignore[assignment]
        with nullcontext() if _in_explanation_mode() else DynamicLinearMode():
            yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module in checkpointing:
            module.grad_checkpointing = True  # type: ignore[assignment]
