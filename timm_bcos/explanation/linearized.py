"""A model at its images: one forward pass in explanation mode, from which any number of outputs are explained."""

import difflib
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import AmbiguousBatch, BiasTracker
from ..dynamic_linear.mode import active, ordinary_autograd
from ..dynamic_linear.tracking_mode import BiasTrackingMode
from ..dynamic_linear.violations import Violation
from ..errors import BcosError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.heads import BcosConvClassifier, BcosLinearClassifier
from ..nn.module_utils import channel_axis, converted_part, first_output, get_classifiers, isolate, pick_output
from .inputs import check_model, is_encoding, rows_of
from .linear_parts import LinearPart, linear_part, linear_parts
from .outputs import ModelOutputs, Selection
from .regions import PositionGrid
from .request import Request
from .result import Explanation
from .self_check import compare_outputs, compare_with_another_image, incomplete, measure_rounding, outputs_apart

__all__ = ["LinearizedModel"]

T = TypeVar("T")


class LinearizedModel:
    """A model for a batch of images.

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
        self.model = getattr(model, "_orig_mod", model)  # of `torch.compile`
        self.layer, self.output, self.extra = request.layer, request.output, dict(request.extra)
        self._saves_copies = False
        stem = check_model(model)
        self.image_channels = stem.image_channels
        if self.layer is not None:
            _check_layer(self.model, self.layer)
        with ordinary_autograd(x.device):
            x = x.detach().clone()
            is_encoded = is_encoding(x, self.image_channels)
            channels = x.shape[1] // 2 if is_encoded else x.shape[1]
            self.inputs = encode_image(x.to(stem.weight.dtype), channels).clone()
            self.image = self.inputs[:, :channels].contiguous()
            try:
                self._run()
            except AmbiguousBatch as signal:
                signal.violations = tuple(compare_outputs(self)) if checks else ()
                raise
            self.violations = self.backward(self._compared) if checks else ()
            self.outputs = self._outputs_of(self.tensor, self.layer)
            if checks and self.apart.shape == self.tensor.shape:
                self.outputs.shifts = self.by_position(self.apart - self.tensor.detach())

    def _run(self) -> None:
        self.leaf, self.tracker, self.mode, whole, outputs = self._pass(self.image)
        self._whole = whole
        self.tensor = self._checked([whole] if self.layer is None else outputs)
        self.outputs = self._outputs_of(self.tensor, self.layer)

    @property
    def eps(self) -> float:
        """Of the narrowest type on the image's path."""
        return self.mode.eps

    @property
    def is_narrow(self) -> bool:
        """Whether a part of the model computes in a narrower type than its input's."""
        return self.eps > torch.finfo(self.image.dtype).eps

    @cached_property
    def apart(self) -> Tensor:
        """As `outputs_apart` finds them."""
        return outputs_apart(self)

    @cached_property
    def rounding(self) -> float | None:
        """As `measure_rounding` finds it, once it is asked for."""
        return measure_rounding(self)

    def _pass(self, image: Tensor, names_places: bool = False) -> tuple[Any, ...]:
        """One forward pass in explanation mode: the leaf, the tracker, the mode, what the model and layer return."""
        outputs: list[object] = []
        network = _network_to_run(self.model, self.layer, outputs)
        leaf = image.clone().requires_grad_()
        tracker = BiasTracker(network, len(image), leaf, names_places)
        mode = BiasTrackingMode(leaf, tracker)
        mode.heeds_hooks = self._saves_copies
        try:
            with active(mode):
                whole = network(leaf.clone(), **self.extra)  # a clone, in which it may write
        except (BcosError, AmbiguousBatch):
            raise
        except Exception as error:
            self.plain(image)  # raises the same where the model itself is at fault
            raise ModelStateError(f"{type(self.model).__name__} cannot be explained: {error}") from error
        return leaf, tracker, mode, whole, outputs

    def plain(self, image: Tensor, rows: slice = slice(None)) -> Tensor:
        """The outputs outside of explanation mode, for some of the images."""
        outputs: list[object] = []
        network = _network_to_run(self.model, self.layer, outputs)
        with torch.no_grad():
            whole = network(image[rows].clone(), **rows_of(self.extra, rows, len(image)))
        found: Tensor = pick_output(whole if self.layer is None else outputs[0], self.output, "the model")
        return found

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
        output = first_output(self._whole)
        return self._outputs_of(output, None)

    def _checked(self, outputs: list[object]) -> Tensor:
        what = "the model" if self.layer is None else f"layer {self.layer!r}"
        if len(outputs) != 1:
            times = f"runs {len(outputs)} times in a forward pass: pick the module around it" if outputs else (
                "did not run for this input"
            )  # fmt: skip
            raise TargetError(f"{what} {times}")
        output = pick_output(outputs[0], self.output, what)
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4) or len(output) != len(self.leaf):
            found = _described(output)
            raise TargetError(f"{what} returns {found}; one row of units per image is needed{_hint(output)}")
        if not output.requires_grad:
            raise TargetError(
                f"{what} ends in {self.mode.maker(output)}, a gate or a statistic that only scales the image's path: "
                f"pick another layer, take a final activation out (nn.Identity()), or say what it is with "
                f"timm_bcos.register_function"
            )
        return self.mode.seen(output)

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
            if not self._saves_copies:
                try:
                    return function()
                except RuntimeError as error:
                    if "modified by an inplace operation" not in str(error):
                        raise ModelStateError(f"{type(self.model).__name__} cannot be explained: {error}") from error
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                self._saves_copies = True
                self._run()
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


def _described(output: object) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _hint(output: object) -> str:
    if not isinstance(output, Tensor):
        return ""
    if output.ndim == 1:
        return ": return one column per output, y[:, None]"
    return ": name the output to explain with output=" if output.ndim == 0 else ""


def _network_to_run(model: nn.Module, layer: str | None, outputs: list[object]) -> nn.Module:
    """The model itself, or one whose layer of interest notes its outputs and which runs once, as it was written.

    A compiled program holds no explanation mode, and the backward pass would run checkpointed parts without it.
    """
    changed = [name for name, m in model.named_modules() if _is_compiled(m) or _is_checkpointing(m) or _is_program(m)]
    if layer is None and not changed:
        return model
    network = isolate(model, [name for name in (*changed, layer) if name])
    for name in changed:
        own = network.get_submodule(name)
        own.grad_checkpointing = False  # type: ignore[assignment]
        if _is_program(own):
            own.__dict__["forward"] = own.get_submodule("_orig_mod").__call__
    if layer is not None:
        network.get_submodule(layer).register_forward_hook(lambda module, args, output: _noted(output, outputs))
    return network


def _noted(output: object, outputs: list[object]) -> object:
    """A copy of what is noted is passed on: functions that follow may work in place."""
    outputs.append(_copied(output))
    return _copied(outputs[-1])


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, dict):
        return {name: _copied(value) for name, value in output.items()}
    return tuple(map(_copied, output)) if isinstance(output, list | tuple) else output


def _is_compiled(module: nn.Module) -> bool:
    return module.__dict__.get("_compiled_call_impl") is not None


def _is_program(module: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a part of the model."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _is_checkpointing(module: nn.Module) -> bool:
    return getattr(module, "grad_checkpointing", False) is True


def _check_layer(model: nn.Module, layer: str) -> None:
    if layer == "":
        raise TargetError("layer='' is the model itself: leave `layer` out to explain its logits")
    names = dict(model.named_modules(remove_duplicate=False))
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=3)
        hint = f"close names: {', '.join(near)}" if near else "see model.named_modules() for their names"
        raise TargetError(f"no layer {layer!r}; {hint}")


def _logit_bias(model: nn.Module) -> float:
    heads = get_classifiers(converted_part(model)) or list(model.modules())
    biases = [m.logit_bias for m in heads if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    return biases[-1] if biases else 0.0


def _probability_kind(model: nn.Module) -> str:
    config = getattr(converted_part(model), "bcos_config", None)
    return config.probability if config is not None else "sigmoid"
