"""The second and third step of an explanation: select numbers of a model's run, and attribute them to its images."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import AmbiguousBatch
from ..dynamic_linear.mode import ordinary_autograd
from ..dynamic_linear.violations import Violation
from ..errors import ModelStateError, TargetError
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.module_utils import channel_axis, converted_part, first_output, get_classifiers
from .linear_parts import LinearPart, linear_part, linear_parts
from .outputs import ModelOutputs, Selection
from .regions import PositionGrid
from .request import Request
from .result import Explanation
from .run import ModelRun
from .self_check import compare_outputs, compare_with_another_image, incomplete

__all__ = ["LinearizedModel"]

T = TypeVar("T")


class LinearizedModel(ModelRun):
    """A run of a model, from which any number of outputs are explained.

    Args:
        model: A B-cos model in evaluation mode, as `check_model` wants it. Not changed.
        x: Images, as `check_images` wants them.
        request: Of which the layer, the output and the other arguments of the model are taken.
        checks: Whether the outputs are compared with those of the model outside of explanation mode.

    Attributes:
        violations: What the comparison has found.

    Raises:
        TargetError: For a layer that does not exist, does not run once, or whose output has no units.
        AmbiguousBatch: If constants cannot be told apart by image.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        request: Request = Request(),  # noqa: B008  (frozen)
        checks: bool = True,
    ) -> None:
        super().__init__(model, x, request)
        with ordinary_autograd(x.device):
            try:
                self.run()
            except AmbiguousBatch as signal:
                signal.violations = tuple(compare_outputs(self)) if checks else ()
                raise
            self.violations = self.backward(self._compared) if checks else ()
            self.outputs = self._outputs_of(self.tensor, self.layer)
            if checks and self.apart.shape == self.tensor.shape:
                self.outputs.shifts = self.by_position(self.apart - self.tensor.detach())

    def run(self) -> None:
        super().run()
        self.outputs = self._outputs_of(self.tensor, self.layer)

    def _compared(self) -> tuple[Violation, ...]:
        found = compare_outputs(self, self.tensor.detach())
        if self.is_narrow and not found:
            self.tensor = self.tensor + (self.plain(self.image) - self.tensor.detach())
        if self.tracker.needs_another_image:
            found += compare_with_another_image(self)
        return tuple(found)

    @property
    def final(self) -> ModelOutputs:
        """What the model returns, whatever the layer is."""
        output = first_output(self.whole)
        return self._outputs_of(output, None)

    def _outputs_of(self, x: Tensor, layer: str | None) -> ModelOutputs:
        size = (self.leaf.shape[2], self.leaf.shape[3])
        what = "classes" if layer is None else f"units in layer {layer!r}"
        maps = self._channels_first(x, layer)
        if x.ndim == 2:
            grid = PositionGrid(1, 1)
        elif x.ndim == 4:
            grid = PositionGrid(maps.shape[2], maps.shape[3])
        else:
            prefix = getattr(converted_part(self.model), "num_prefix_tokens", 0)
            grid = PositionGrid.of_tokens(maps.shape[2], prefix, size)
        return ModelOutputs(maps.flatten(2), grid, what, size, layer is not None or x.ndim > 2)

    def by_position(self, x: Tensor) -> Tensor:
        """(N, C, P), of a tensor in the format of the layer's output."""
        return self._channels_first(x, self.layer).flatten(2)

    def _channels_first(self, x: Tensor, layer: str | None) -> Tensor:
        if x.ndim == 2:
            return x[:, :, None]
        module = self.model if layer is None else self.model.get_submodule(layer)
        return x.movedim(channel_axis(module, x, converted_part(self.model)), 1)

    def best_classes(self, top: int) -> Tensor:
        """(N, top) the classes with the highest logits, best first.

        Raises:
            TargetError: For more than there are.
        """
        logits = self.outputs.maps.detach().amax(2)
        if not 1 <= top <= logits.shape[1]:
            raise TargetError(f"top={top}: the model has {logits.shape[1]} classes")
        return logits.topk(top, dim=1).indices

    def explain(self, request: Request) -> Explanation:
        """Select a number of each image and attribute it, with one backward pass.

        Images do not see each other, so that the gradient of the sum holds each one's row of W.
        """

        def explain() -> Explanation:
            selection = self.outputs.select(request)
            part = linear_part(selection.values.sum(), self.leaf, self.tracker)
            return self.explanation(selection, part, self.layer)

        return self.backward(explain)

    def explain_classes(self, table: Tensor) -> list[Explanation]:
        """Explain T classes of each image, as many in one backward pass as memory allows.

        Args:
            table: (N, T) classes.
        """

        def explain() -> list[Explanation]:
            selections = [self.outputs.select(Request(column)) for column in table.T]
            values = torch.stack([selection.values.sum() for selection in selections])
            parts = linear_parts(values, self.leaf, self.tracker)
            found = zip(selections, parts, strict=True)
            return [self.explanation(selection, part, self.layer) for selection, part in found]

        return self.backward(explain)

    def backward(self, function: Callable[[], T]) -> T:
        """Run what takes backward passes; a second time, on copies, where the model has written over saved tensors.

        Raises:
            ModelStateError: For a model that autograd cannot differentiate.
        """
        with ordinary_autograd(self.leaf.device):
            if not self.saves_copies:
                try:
                    return function()
                except RuntimeError as error:
                    if "modified by an inplace operation" not in str(error):
                        raise ModelStateError(f"{type(self.model).__name__} cannot be explained: {error}") from error
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                self.saves_copies = True
                self.run()
                return function()

    def explanation(self, selection: Selection, part: LinearPart, layer: str | None) -> Explanation:
        """Of what has been taken apart.

        Args:
            selection: The numbers.
            part: Their weights and constants.
            layer: Whose numbers they are; None for the model's outputs.
        """
        has_bias = layer is None and selection.versus is None
        found = Explanation(
            logits=selection.activations,
            target=selection.unit,
            weights=part.weights,
            inputs=self.inputs,
            bias=part.constant_bias + part.gate_bias,
            constant_bias=part.constant_bias,
            logit_bias=_logit_bias(self.model) if has_bias else 0.0,
            layer=layer,
            position=selection.position,
            probability_kind=_probability_kind(self.model),
            versus=selection.versus,
            direction=selection.direction,
            region=selection.region,
        )
        return incomplete(self, found, selection.shift, (*part.violations, *self.violations))


def _logit_bias(model: nn.Module) -> float:
    heads = get_classifiers(converted_part(model)) or list(model.modules())
    biases = [m.logit_bias for m in heads if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    return biases[-1] if biases else 0.0


def _probability_kind(model: nn.Module) -> str:
    config = getattr(converted_part(model), "bcos_config", None)
    return config.probability if config is not None else "sigmoid"
