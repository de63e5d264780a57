"""The model as attribution methods see it: a private copy with one interface for B-cos models and plain ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BcosError, InputError, ModelStateError, TargetError
from ..explanation.outputs import ModelOutputs, Selection, model_outputs
from ..explanation.request import Request
from ..explanation.run import only_output
from ..nn.functional import encode_image
from ..nn.module_utils import converted_part, frozen_copy, hooked, pick_output
from ..nn.stems import BcosStem, ImageReader

__all__ = ["AttributionModel", "Targets", "checked_classes"]

Targets = Sequence[int] | Tensor | int | None


class AttributionModel(nn.Module):
    """The model for attribution methods: a copy that may be hooked and modified, with a common interface for inputs.

    The copy shares parameters and buffers with the original model, but not its modules, so hooks and replaced modules
    do not affect other users of the model.

    Calls return logits (N, K). With a request they return what it asks for: another output, the units of a layer, the
    outputs at a position, or their means over a region. Images are then those of the request, or copies of its only
    image.

    Gradient-based methods differentiate with respect to `prepare(x)`: the six encoded channels of a B-cos model, the
    normalized channels of a plain model. Perturbation-based methods modify x itself.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        request: Request, of which everything but the target is used.

    Attributes:
        model: The copy.
        request: Request for the images that are passed; may be set.
        is_bcos: Whether the model encodes images.
        channels: Number of image channels; None if unknown.
        generator: CPU generator for random numbers; `attribute` seeds it.
    """

    def __init__(self, model: nn.Module, request: Request = Request()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        if model.training:
            raise ModelStateError("the model is in training mode: call model.eval() first")
        self.request = request
        self.model = frozen_copy(model if request.layer is None else getattr(model, "_orig_mod", model))
        self.kind = type(model).__name__
        self.part: Any = converted_part(self.model)
        stems = [module for module in model.modules() if isinstance(module, BcosStem | ImageReader)]
        self.is_bcos = bool(stems)
        self.channels: int | None = stems[0].image_channels if stems else getattr(model, "in_chans", None)
        self._reads_at_once: bool | None = None
        self.generator = torch.Generator()
        self.eval()

    def prepare(self, x: Tensor) -> Tensor:
        """Encode or normalize images (N, C, H, W) in [0, 1].

        Raises:
            InputError: If the images have another number of channels than the model.
            ModelStateError: If a plain model has no mean and std in its `pretrained_cfg`.
        """
        if self.channels not in (None, x.shape[1]):
            raise InputError(f"images have {x.shape[1]} channels, {self.kind} takes {self.channels}")
        if self.is_bcos:
            return encode_image(x, x.shape[1]) if self._takes_encoding(x) else x
        mean, std = (torch.tensor(values).to(x).reshape(1, -1, 1, 1) for values in self._statistics(x.shape[1]))
        return (x - mean) / std

    @torch.no_grad()
    def _takes_encoding(self, x: Tensor) -> bool:
        """Whether the model accepts encoded images. It does not if it modifies images before the first layer."""
        if self._reads_at_once is None:
            try:
                first = self.request.of_images(slice(0, 1))
                found, expected = (self._run(z, first) for z in (encode_image(x[:1], x.shape[1]), x[:1]))
            except (RuntimeError, BcosError):
                self._reads_at_once = False
            else:
                self._reads_at_once = bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-4))
        return self._reads_at_once

    def leaf(self, x: Tensor) -> Tensor:
        """`prepare(x)` as a leaf that requires gradients."""
        return self.prepare(x).detach().requires_grad_()

    def _statistics(self, channels: int) -> list[Any]:
        cfg = getattr(self.part, "pretrained_cfg", None) or {}
        found = [cfg.get(name) for name in ("mean", "std")]
        found = [values[:1] if values and len(set(values)) == 1 else values for values in found]
        if any(values is None or len(values) not in (1, channels) for values in found):
            raise ModelStateError(
                f"{self.kind} has no normalization for images of {channels} channels (mean {found[0]}, std "
                f"{found[1]}): set model.pretrained_cfg = dict(mean=..., std=...), for instance to (0.0,) and (1.0,) "
                f"if it takes pixels in [0, 1]"
            )
        return found

    def forward(self, prepared: Tensor) -> Tensor:
        """Logits (N, K) of prepared images, or what the request asks for."""
        request = self.request.repeated(len(prepared))
        output = self._run(prepared, request)
        if request.is_placed and isinstance(output, Tensor) and output.ndim in (2, 3, 4):
            return self._outputs(output, prepared).at(request)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise self.no_logits(output)
        return output

    @torch.no_grad()
    def output(self, x: Tensor) -> Any:
        """What the model returns for images (N, C, H, W) in [0, 1]: logits, or anything else."""
        return self._run(self.prepare(x), self.request)

    def _run(self, prepared: Tensor, request: Request) -> Any:
        """The output of the model, or of the request's layer, whatever it is."""
        images = self.model_input(prepared)
        if request.layer is None:
            return pick_output(self.model(images, **request.extra), request.output, self.kind)
        what, outputs = f"layer {request.layer!r}", []

        def record(module: nn.Module, args: object, output: object) -> None:
            output = pick_output(output, request.output, what)
            outputs.append(output.clone() if isinstance(output, Tensor) else output)  # later modules may overwrite it

        with hooked([self.model.get_submodule(request.layer)], record):
            self.model(images, **request.extra)
        return only_output(outputs, what)

    def model_input(self, prepared: Tensor) -> Tensor:
        """The format in which the model takes prepared images: as they are, or as patches."""
        return prepared if self.request.patches is None else self.request.patches.to_patches(prepared)

    def _outputs(self, output: Tensor, prepared: Tensor) -> ModelOutputs:
        return model_outputs(output, self.model, self.request.layer, (prepared.shape[2], prepared.shape[3]))

    def no_logits(self, output: object) -> ModelStateError:
        """The error for a model that returns something else."""
        found, hint = type(output).__name__, ""
        if isinstance(output, Tensor):
            found = str(tuple(output.shape))
            hint = "; let it return output[:, None]" if output.ndim == 1 else ": say where with position= or region="
        return ModelStateError(f"{self.kind} returns {found}: attribution needs logits (N, K){hint}")

    @torch.no_grad()
    def settle(self, x: Tensor, targets: Targets, batch_size: int) -> Tensor:
        """Find the class of each image, and set the request's position to where the class is largest, as in `explain`.

        Args:
            x: Images (N, C, H, W) in [0, 1].
            targets: Classes, or units of the request's layer; None for the strongest of each image.
            batch_size: Number of images per pass.

        Returns:
            Classes (N,).

        Raises:
            TargetError: If a target, position or region does not exist.
            ModelStateError: If the model returns maps, and nothing in the request says what to take from them.
        """
        request = self.request
        if request.images is None:  # nothing is asked for but logits
            return self.classes(x, targets, batch_size)
        found = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            self.request = request.of_images(rows)
            found.append(self._select(x[rows], targets, rows, len(x)))
        positions = [selection.position for selection in found if selection.position is not None]
        if positions:
            request = replace(request, position=torch.cat(positions))
        self.request = request if request.varies else replace(request, images=None)
        return torch.cat([selection.unit for selection in found])

    def _select(self, x: Tensor, targets: Targets, rows: slice, count: int) -> Selection:
        """What the request asks for of some images, the given rows of `count`."""
        request, prepared = self.request, self.prepare(x)
        output = self._run(prepared, request)
        says_what = request.is_placed or request.layer is not None or request.output is not None
        if not isinstance(output, Tensor) or output.ndim not in ((2, 3, 4) if says_what else (2,)):
            raise self.no_logits(output)
        outputs = self._outputs(output, prepared)
        if targets is not None:
            classes = checked_classes(targets, count, outputs.maps.shape[1], x.device)
            request = replace(request, target=classes[rows])
        return outputs.select(request)

    def probability(self, x: Tensor) -> Tensor:
        """(N, K) probabilities of images (N, C, H, W) in [0, 1]: softmax, or sigmoid if the model's config says so.

        Activations of a hidden layer are returned as they are.
        """
        with torch.no_grad():
            logits = self(self.prepare(x))
        if self.request.layer is not None:
            return logits
        config = getattr(self.part, "bcos_config", None)
        return logits.sigmoid() if config and config.probability == "sigmoid" else logits.softmax(1)

    def classes(self, x: Tensor, targets: Targets, batch_size: int) -> Tensor:
        """(N,) the given classes, or the predicted ones of `batch_size` images per pass.

        Raises:
            TargetError: If a target is not a class of the model.
        """
        if targets is None:
            return torch.cat([self.probability(images).argmax(1) for images in x.split(batch_size)])
        return checked_classes(targets, len(x), self._count_classes(x), x.device)

    def _count_classes(self, x: Tensor) -> int:
        """The number of classes, by running the model if it has no `num_classes`."""
        stated = getattr(self.part, "num_classes", None)
        if isinstance(stated, int) and stated > 0:
            return stated
        return self.probability(x[:1]).shape[1]


def checked_classes(targets: Targets, images: int, count: int, device: torch.device) -> Tensor:
    """(N,) classes of images.

    Args:
        targets: One class for all images, or N classes.
        images: Number of images, N.
        count: Number of classes of the model.
        device: Device of the result.

    Raises:
        TargetError: If a target is not a class of the model.
    """
    wanted = f"give {images} classes, whole numbers from 0 to {count - 1}"
    try:
        classes = torch.as_tensor(targets, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"targets {targets!r}: {wanted}") from error
    if classes.ndim == 0:
        classes = classes.expand(images)
    has_bool = isinstance(targets, Sequence) and any(isinstance(target, bool) for target in targets)
    is_whole = not (has_bool or classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex())
    if not is_whole or classes.shape != (images,) or bool(((classes < 0) | (classes >= count)).any()):
        raise TargetError(f"targets {classes.tolist()}: {wanted}")
    return classes.long()
