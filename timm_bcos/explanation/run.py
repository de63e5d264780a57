"""The first step of an explanation: run the model at its images, in explanation mode and outside of it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamic_linear.bias_tracker import AmbiguousBatch, BiasTracker
from ..dynamic_linear.mode import active, ordinary_autograd
from ..dynamic_linear.tracking_mode import BiasTrackingMode
from ..errors import BcosError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.module_utils import isolate, pick_output
from .inputs import check_model, is_encoding, layer_path, rows_of
from .request import Request

__all__ = ["ModelRun", "only_output"]


class ModelRun:
    """A forward pass of a model in explanation mode, and plain ones to compare with.

    Args:
        model: A B-cos model in evaluation mode, which `check_model` accepts. Not changed.
        x: Images, which `check_images` accepts.
        request: Request, of which only the layer, the output and the extra arguments are used.

    Attributes:
        image: Images without encoding (N, C, H, W).
        inputs: Encoded images (N, 2C, H, W).
        leaf: Copy of the images with respect to which outputs are differentiated.
        tracker: Constants and violations of the pass in explanation mode.
        model_output: Whatever the model returned in explanation mode.
        explained_output: Tensor to explain: the output of the model, or of the layer.
        saves_copies: Whether autograd saves copies of tensors that the model overwrites later
            (`torch.autograd.graph.allow_mutation_on_saved_tensors`, which uses hooks of saved tensors).

    Raises:
        TargetError: For a layer that does not exist, does not run exactly once, or whose output has no units.
        AmbiguousBatch: If constants cannot be told apart by image.
    """

    leaf: Tensor
    tracker: BiasTracker
    mode: BiasTrackingMode
    model_output: object
    explained_output: Tensor

    def __init__(self, model: nn.Module, x: Tensor, request: Request) -> None:
        self.model = getattr(model, "_orig_mod", model)  # of `torch.compile`
        self.layer, self.output, self.extra = request.layer, request.output, dict(request.extra)
        self.patches = request.patches
        self.saves_copies = False
        stem = check_model(model)
        self.image_channels = stem.image_channels
        layer_path(self.model, self.layer)
        with ordinary_autograd(x.device):
            x = x.detach().clone()
            is_encoded = is_encoding(x, self.image_channels)
            channels = x.shape[1] // 2 if is_encoded else x.shape[1]
            self.inputs = encode_image(x.to(stem.weight.dtype), channels).clone()
            self.image = self.inputs[:, :channels].contiguous()

    def run(self) -> None:
        """Run the model in explanation mode."""
        self.leaf, self.tracker, self.mode, self.model_output, outputs = self.forward(self.image)
        self.explained_output = self._checked([self.model_output] if self.layer is None else outputs)

    def forward(self, image: Tensor, names_places: bool = False) -> tuple[Any, ...]:
        """Run the model in explanation mode.

        Args:
            image: Images (N, C, H, W).
            names_places: Whether the tracker notes where constants arise (`BiasTracker`).

        Returns:
            The leaf, the tracker, the mode, the model's output, and the list of the layer's outputs.
        """
        outputs: list[object] = []
        model = _model_to_run(self.model, self.layer, outputs)
        leaf = image.clone().requires_grad_()
        tracker = BiasTracker(model, len(image), leaf, names_places)
        mode = BiasTrackingMode(leaf, tracker)
        mode.heeds_hooks = self.saves_copies
        try:
            with active(mode):
                model_output = model(self._as_input(leaf.clone()), **self.extra)  # a clone: the model may overwrite it
        except (BcosError, AmbiguousBatch):
            raise
        except Exception as error:
            self.plain_output(image)  # raises the same error if the model itself is at fault
            raise ModelStateError(f"{type(self.model).__name__} cannot be explained: {error}") from error
        return leaf, tracker, mode, model_output, outputs

    def _as_input(self, image: Tensor) -> Tensor:
        """The format in which the model takes images."""
        return image if self.patches is None else self.patches.to_patches(image)

    def plain_output(self, image: Tensor, images: slice = slice(None)) -> Tensor:
        """The outputs outside of explanation mode, for some of the images."""
        outputs: list[object] = []
        model = _model_to_run(self.model, self.layer, outputs)
        with torch.no_grad():
            model_input = self._as_input(image[images].clone())
            model_output = model(model_input, **rows_of(self.extra, images, len(image)))
        found: Tensor = pick_output(model_output if self.layer is None else outputs[0], self.output, "the model")
        return found

    @cached_property
    def plain_output_in_parts(self) -> Tensor:
        """The plain outputs of the first image alone, and of every second one of the others: neighbors are apart."""
        count = len(self.image)
        parts = [slice(0, 1), slice(1, None, 2), slice(2, None, 2)][:count]
        order = torch.cat([torch.arange(count)[part] for part in parts]).argsort()
        return torch.cat([self.plain_output(self.image, part) for part in parts])[order.to(self.image.device)]

    @property
    def eps(self) -> float:
        """Machine epsilon of the lowest precision on the image's path."""
        return self.mode.eps

    @property
    def has_reduced_precision(self) -> bool:
        """Whether a part of the model computes in lower precision than that of its input."""
        return self.eps > torch.finfo(self.image.dtype).eps

    @cached_property
    def rounding(self) -> float | None:
        """Largest change of an output when the image changes in its last digits; None if two runs differ anyway.

        A deep untrained model may amplify rounding a million times.
        """
        plain, again = self.plain_output(self.image), self.plain_output(self.image)
        if not torch.equal(plain.nan_to_num(), again.nan_to_num()):
            return None
        up = torch.rand(self.image.shape, generator=torch.Generator().manual_seed(0)).to(self.image) < 0.5
        other = self.image * (1 + self.eps * (2 * up.to(self.image.dtype) - 1))
        return float((self.plain_output(other) - plain).abs().max())

    def _checked(self, outputs: list[object]) -> Tensor:
        what = "the model" if self.layer is None else f"layer {self.layer!r}"
        output = pick_output(only_output(outputs, what), self.output, what)
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


def only_output(outputs: Sequence[object], what: str) -> object:
    """The output of a module that has run once.

    Args:
        outputs: What the module returned, each time it ran in a forward pass.
        what: Description of the module, for errors.

    Raises:
        TargetError: If the module did not run, or ran more than once.
    """
    if len(outputs) == 1:
        return outputs[0]
    times = f"runs {len(outputs)} times in a forward pass: pick the module around it"
    raise TargetError(f"{what} {times if outputs else 'did not run for this input'}")


def _described(output: object) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _hint(output: object) -> str:
    if not isinstance(output, Tensor):
        return ""
    if output.ndim == 1:
        return ": return one column per output, y[:, None]"
    return ": name the output to explain with output=" if output.ndim == 0 else ""


def _model_to_run(model: nn.Module, layer: str | None, outputs: list[object]) -> nn.Module:
    """The model itself, or a copy that records the layer's outputs, without checkpointing.

    With checkpointing, the backward pass would run parts again, outside of explanation mode.
    """
    changed = [name for name, module in model.named_modules() if _is_checkpointing(module) or _is_compiled(module)]
    if layer is None and not any(map(_is_checkpointing, model.modules())):
        return model
    copy = isolate(model, [name for name in (*changed, layer) if name])
    for name in changed:
        own = copy.get_submodule(name)
        own.grad_checkpointing = False  # type: ignore[assignment]
        if _is_compiled(own):  # its compiled program calls the original's layers
            own.__dict__["forward"] = own.get_submodule("_orig_mod").__call__
    if layer is not None:
        copy.get_submodule(layer).register_forward_hook(lambda module, args, output: _record(output, outputs))
    return copy


def _record(output: object, outputs: list[object]) -> object:
    """Append the output to the list, and return a copy, which functions that follow may overwrite."""
    outputs.append(_copied(output))
    return _copied(outputs[-1])


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, dict):
        return {name: _copied(value) for name, value in output.items()}
    return tuple(map(_copied, output)) if isinstance(output, list | tuple) else output


def _is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a part of the model."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def _is_checkpointing(module: nn.Module) -> bool:
    return getattr(module, "grad_checkpointing", False) is True
