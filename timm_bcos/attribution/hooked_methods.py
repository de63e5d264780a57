"""captum's methods that hook activations, for the activations of timm's models."""

from captum.attr import DeepLift, GuidedBackprop
from torch import Tensor, nn

from .._compat import private
from ..errors import MethodError

__all__ = ["DeepLiftOfActivations", "GuidedBackpropOfRectifiers"]

Kinds = tuple[type[nn.Module], ...]


class DeepLiftOfActivations(DeepLift):  # type: ignore[misc]
    """DeepLIFT with the rescale rule for more activations than captum's own table has.

    Args:
        model: The network.
        elementwise: Types of modules that are functions of single numbers.
    """

    def __init__(self, model: nn.Module, elementwise: Kinds) -> None:
        super().__init__(model)
        self.elementwise = elementwise

    def _is_non_linear(self, module: nn.Module) -> bool:
        return type(module) in self.elementwise or super()._is_non_linear(module)

    def _backward_hook(self, module: nn.Module, grad_input: Tensor, grad_output: Tensor) -> Tensor:
        if not self.satisfies_attribute_criteria(module):
            raise MethodError(f"deeplift needs a module for each activation; one {type(module).__name__} runs twice")
        if super()._is_non_linear(module):
            return super()._backward_hook(module, grad_input, grad_output)
        multipliers = private.deep_lift_nonlinear(
            module, module.input, module.output, grad_input, grad_output, eps=self.eps
        )
        del module.input, module.output
        return multipliers


class GuidedBackpropOfRectifiers(GuidedBackprop):  # type: ignore[misc]
    """Guided Backpropagation through more rectifiers than ReLU.

    Args:
        model: The network.
        rectifiers: Types of modules whose gradient is guided.
    """

    def __init__(self, model: nn.Module, rectifiers: Kinds) -> None:
        super().__init__(model)
        self.rectifiers = rectifiers

    def _register_hooks(self, module: nn.Module) -> None:
        if isinstance(module, self.rectifiers):
            self.backward_hooks.extend(private.register_backward_hook(module, self._backward_hook, self))
