"""The second and third step of an explanation: select outputs of a model's run, and attribute them to its images."""

from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import AmbiguousBatch
from ..dynamic_linear.mode import ordinary_autograd
from ..dynamic_linear.violations import Violation
from ..errors import BcosError, ModelStateError, TargetError
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.module_utils import converted_part, first_output, get_classifiers
from .linear_parts import LinearPart, linear_part, linear_parts
from .outputs import ModelOutputs, Selection, channels_first, model_outputs
from .request import Request
from .result import Explanation
from .run import ModelRun
from .self_check import add_violations, compare_outputs, compare_with_another_image

__all__ = ["LinearizedModel"]

T = TypeVar("T")


class LinearizedModel(ModelRun):
    """A run of a model, from which any number of outputs are explained.

    Args:
        model: A B-cos model in evaluation mode, which `check_model` accepts. Not changed.
        x: Images, which `check_images` accepts.
        request: Request, of which only the layer, the output and the extra arguments are used.
        checks: Whether the outputs are compared with those of the model outside of explanation mode.

    Attributes:
        violations: Violations that the comparison has found.

    Raises:
        TargetError: For a layer that does not exist, does not run exactly once, or whose output has no units.
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
            self.violations = self.with_inplace_fallback(self._compare_and_correct) if checks else ()
            # `run` has set them before, perhaps twice, but the comparison may have corrected the output since.
            self.outputs = self._outputs_of(self.explained_output, self.layer)
            if checks and self.plain_output_in_parts.shape == self.explained_output.shape:
                self.outputs.shifts = self.by_position(self.plain_output_in_parts - self.explained_output.detach())

    def run(self) -> None:
        super().run()
        self.outputs = self._outputs_of(self.explained_output, self.layer)

    def _compare_and_correct(self) -> tuple[Violation, ...]:
        found = compare_outputs(self, self.explained_output.detach())
        if self.has_reduced_precision and not found:
            # Low precision rounds differently in explanation mode. The explained value is to be the plain one.
            rounding = self.plain_output(self.image) - self.explained_output.detach()
            self.explained_output = self.explained_output + rounding
        if self.tracker.needs_another_image:
            found += compare_with_another_image(self)
        return tuple(found)

    @property
    def final(self) -> ModelOutputs:
        """What the model returns, whatever the layer is."""
        output = first_output(self.model_output)
        return self._outputs_of(output, None)

    def _outputs_of(self, x: Tensor, layer: str | None) -> ModelOutputs:
        return model_outputs(x, self.model, layer, (self.leaf.shape[2], self.leaf.shape[3]))

    def by_position(self, x: Tensor) -> Tensor:
        """A tensor in the format of the layer's output as (N, C, P), with P positions."""
        return channels_first(x, self.model, self.layer).flatten(2)

    def best_classes(self, top: int, request: Request = Request()) -> Tensor:  # noqa: B008  (frozen)
        """(N, top) the classes with the highest logits, best first.

        Args:
            top: Number of classes.
            request: Request, of which only the position and the region are used; without them, classes are ranked by
                their largest value in the map.

        Raises:
            TargetError: If the model has fewer classes, or `top` is not an integer of at least 1.
        """
        maps = self.outputs.maps.detach()
        logits = self.outputs.at(request).detach() if request.is_placed else maps.amax(2)
        if isinstance(top, bool) or not isinstance(top, Integral):
            raise TargetError(f"top={top!r}: give the number of {self.outputs.what}, a whole number from 1")
        if not 1 <= top <= logits.shape[1]:
            raise TargetError(f"top={top}: the model has {logits.shape[1]} {self.outputs.what}")
        return logits.topk(int(top), dim=1).indices

    def explain(self, request: Request) -> Explanation:
        """Select an output of each image and attribute it, with one backward pass.

        Images do not influence each other, so the gradient of the sum contains the row of W of each.
        """

        def attribute() -> Explanation:
            selection = self.outputs.select(request)
            part = linear_part(selection.values.sum(), self.leaf, self.tracker)
            return self.build_explanation(selection, part, self.layer)

        return self.with_inplace_fallback(attribute)

    def explain_classes(self, table: Tensor, request: Request = Request()) -> list[Explanation]:  # noqa: B008
        """Explain T classes of each image, as many in one backward pass as memory allows.

        Args:
            table: (N, T) classes.
            request: Request, of which only the position and the region are used.
        """

        def attribute() -> list[Explanation]:
            selections = [self.outputs.select(replace(request, target=column)) for column in table.T]
            values = torch.stack([selection.values.sum() for selection in selections])
            parts = linear_parts(values, self.leaf, self.tracker)
            found = zip(selections, parts, strict=True)
            return [self.build_explanation(selection, part, self.layer) for selection, part in found]

        return self.with_inplace_fallback(attribute)

    def with_inplace_fallback(self, function: Callable[[], T]) -> T:
        """Call a function that runs backward passes.

        If the model has overwritten tensors that autograd saved, it runs again with copies of these, and the function
        is called again.

        Raises:
            ModelStateError: For a model that autograd cannot differentiate.
        """
        with ordinary_autograd(self.leaf.device):
            if not self.saves_copies:
                try:
                    return function()
                except BcosError:
                    raise
                except Exception as error:
                    if "modified by an inplace operation" not in str(error):
                        raise ModelStateError(f"{type(self.model).__name__} cannot be explained: {error}") from error
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                self.saves_copies = True
                self.run()
                return function()

    def build_explanation(self, selection: Selection, part: LinearPart, layer: str | None) -> Explanation:
        """Build the explanation of selected outputs, with its violations.

        Args:
            selection: Selected outputs, one per image.
            part: Weights and constants of these.
            layer: Path of the layer that they belong to; None for the model's outputs.
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
            class_names=_class_names(self.model, selection.activations.shape[1]) if layer is None else (),
        )
        return add_violations(self, found, selection.shift, (*part.violations, *self.violations))


def _logit_bias(model: nn.Module) -> float:
    heads = get_classifiers(converted_part(model)) or list(model.modules())
    biases = [m.logit_bias for m in heads if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    return biases[-1] if biases else 0.0


def _probability_kind(model: nn.Module) -> str:
    config = getattr(converted_part(model), "bcos_config", None)
    return config.probability if config is not None else "sigmoid"


def _class_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """The names in the config of a model with this number of classes; empty without names."""
    for part in (model, converted_part(model)):
        config = getattr(part, "pretrained_cfg", None)
        names = config.get("label_names") if isinstance(config, dict) else None
        if names and len(names) == count:
            return tuple(names)
    return ()
