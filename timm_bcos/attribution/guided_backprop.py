"""captum's Guided Backpropagation, for the activations of timm's models."""

from captum.attr import GuidedBackprop
from torch import nn

from .._compat import private

__all__ = ["GuidedBackpropOfRectifiers"]

Kinds = tuple[type[nn.Module], ...]


class GuidedBackpropOfRectifiers(GuidedBackprop):  # type: ignore[misc]
    """Guided Backpropagation through more rectifiers than ReLU.

    Args:
        model: The model.
        rectifiers: Types of modules whose gradient is guided.
    """

    def __init__(self, model: nn.Module, rectifiers: Kinds) -> None:
        super().__init__(model)
        self.rectifiers = rectifiers

    def _register_hooks(self, module: nn.Module) -> None:
        if isinstance(module, self.rectifiers):
            self.backward_hooks.extend(private.register_backward_hook(module, self._backward_hook, self))
