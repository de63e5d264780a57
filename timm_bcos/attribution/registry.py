"""The registry of attribution methods, and `attribute`, which returns a signed map (N, H, W) by any of them.

    >>> attribute(model, x, targets, method="integrated_gradients")  # captum's Integrated Gradients
    >>> attribute(model, x, targets)  # the model's own explanation

`timm_bcos.attribution.methods` and `.transformers` define the methods; `@register("name")` adds one.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..dynamic_linear.mode import ordinary_autograd
from ..errors import BcosError, InputError, MethodError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.module_utils import converted_part, first_output, frozen_copy
from ..nn.stems import BcosStem, ImageReader

__all__ = [
    "METHODS",
    "AttributionModel",
    "Method",
    "Targets",
    "attribute",
    "check_counts",
    "checked_images",
    "images_at_once",
    "method_name",
    "method_names",
    "register",
]

# Pixels per pass. With a graph: nine images of 224 × 224, or one 3×3 grid of such images.
WITH_GRAPH = 672 * 672
WITHOUT_GRAPH = 32 * 224 * 224


def images_at_once(x: Tensor, has_graph: bool = True) -> int:
    """Number of images per pass that bounds the memory.

    Args:
        x: Images (N, C, H, W).
        has_graph: Whether gradients are computed.
    """
    pixels = WITH_GRAPH if has_graph else WITHOUT_GRAPH
    return max(pixels // (x.shape[-2] * x.shape[-1]), 1)


Targets = Sequence[int] | Tensor | int | None
ROUNDING = 1e-4  # tolerance of pixels in [0, 1], as in `explain`: resizing may overshoot by rounding


class AttributionModel(nn.Module):
    """The model for attribution methods: a copy that may be hooked and modified, with a common interface for inputs.

    The copy shares parameters and buffers with the original model, but not its modules, so hooks and replaced modules
    do not affect other users of the model.

    Gradient-based methods differentiate with respect to `prepare(x)`: the six encoded channels of a B-cos model, the
    normalized channels of a plain model. Perturbation-based methods modify x itself.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.

    Attributes:
        model: The copy.
        is_bcos: Whether the model encodes images.
        channels: Number of image channels; None if unknown.
        generator: CPU generator for random numbers; `attribute` seeds it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if model.training:
            raise ModelStateError("the model is in training mode: call model.eval() first")
        self.model = frozen_copy(model)
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
                found, expected = (first_output(self.model(z)) for z in (encode_image(x[:1], x.shape[1]), x[:1]))
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
        """Logits (N, K) of prepared images."""
        logits = first_output(self.model(prepared))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            hint = "; let it return output[:, None]" if isinstance(logits, Tensor) and logits.ndim == 1 else ""
            raise ModelStateError(f"{self.kind} returns {found}: attribution needs logits (N, K){hint}")
        return logits

    def probability(self, x: Tensor) -> Tensor:
        """(N, K) probabilities of images (N, C, H, W) in [0, 1]: softmax, or sigmoid if the model's config says so."""
        with torch.no_grad():
            logits = self(self.prepare(x))
        config = getattr(self.part, "bcos_config", None)
        return logits.sigmoid() if config and config.probability == "sigmoid" else logits.softmax(1)

    def classes(self, x: Tensor, targets: Targets, batch_size: int | None = None) -> Tensor:
        """(N,) the given classes, or the predicted ones.

        Raises:
            TargetError: If a target is not a class of the model.
        """
        if targets is None:
            return torch.cat(
                [self.probability(images).argmax(1) for images in x.split(batch_size or images_at_once(x))]
            )
        count = self._count_classes(x)
        wanted = f"give {len(x)} classes, whole numbers from 0 to {count - 1}"
        try:
            classes = torch.as_tensor(targets, device=x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TargetError(f"targets {targets!r}: {wanted}") from error
        if classes.ndim == 0:
            classes = classes.expand(len(x))
        has_bool = isinstance(targets, Sequence) and any(isinstance(target, bool) for target in targets)
        is_whole = not (has_bool or classes.dtype == torch.bool or classes.is_floating_point() or classes.is_complex())
        if not is_whole or classes.shape != x.shape[:1] or bool(((classes < 0) | (classes >= count)).any()):
            raise TargetError(f"targets {classes.tolist()}: {wanted}")
        return classes.long()

    def _count_classes(self, x: Tensor) -> int:
        """The number of classes, by running the model if it has no `num_classes`."""
        stated = getattr(self.part, "num_classes", None)
        if isinstance(stated, int) and stated > 0:
            return stated
        return self.probability(x[:1]).shape[1]


Attribute = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A registered attribution method.

    Attributes:
        name: Name of the method.
        function: Function of (subject, images, targets, **options) that returns maps (N, H, W).
        slow: Whether the method runs the model on many modified copies of an image. Slow methods get one image at a
            time, with all its classes.
        aliases: Other names that `attribute` accepts.
    """

    name: str
    function: Attribute
    slow: bool = False
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.aliases)})" if self.aliases else self.name


METHODS: dict[str, Method] = {}  # by name, without aliases


def method_name(name: str) -> str:
    """The name of the method that `name` is an alias of; `name` itself if it is none."""
    return next((method.name for method in METHODS.values() if name in method.aliases), name)


def method_names(names: Iterable[str]) -> list[str]:
    """The names of methods that may be given by aliases, without repetitions.

    Raises:
        MethodError: If there is no method of a name.
    """
    found = list(dict.fromkeys(map(method_name, names)))
    for name in found:
        if name not in METHODS:
            raise MethodError(f"no attribution method {name!r}: choose one of {', '.join(map(str, METHODS.values()))}")
    return found


def register(
    name: str, *, aliases: Sequence[str] = (), slow: bool = False, replace: bool = False
) -> Callable[[Attribute], Attribute]:
    """Add a method: a function of (subject, images (N, C, H, W) in [0, 1], targets (N,), **options) to (N, H, W).

    The function may hook, replace and switch the modules of `subject`, but not write into parameters and buffers, whose
    memory is shared with the original model. It draws random numbers from `subject.generator`, which is seeded for
    every batch, and never from the global generators.

    Args:
        name: Name of the method.
        aliases: Other names that `attribute` accepts.
        slow: Whether the method runs the model on many modified copies of an image. It then gets one image at a time,
            repeated for each of its targets, and needs to modify only the first.
        replace: Replace the method that has this name.

    Raises:
        MethodError: If there is a method of this name, unless `replace` is set.
    """
    known = method_name(name)

    def add(function: Attribute) -> Attribute:
        if known in METHODS and not replace:
            raise MethodError(f"there is a method {name!r}: choose another name, or pass register(..., replace=True)")
        others = tuple(aliases) or (METHODS[known].aliases if known in METHODS else ())
        METHODS[known] = Method(known, function, slow, others)
        return function

    return add


def attribute(
    model: nn.Module,
    x: Tensor,
    targets: Targets = None,
    method: str = "bcos",
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Compute attribution maps of classes.

    The model and the global random state are not modified, so other threads may use the model at the same time.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1]. Plain models are normalized by their `pretrained_cfg`.
        targets: Class of each image, one class for all, or None for the predicted classes.
        method: Name or alias of a method in `METHODS`.
        batch_size: Number of images per pass; None for `images_at_once`, which bounds the memory. Slow methods process
            one image at a time, with all of its classes.
        seed: Random seed. Maps do not depend on the batch size.
        progress: Show a progress bar.
        options: Options of the method, for instance `n_steps` of 'integrated_gradients'.

    Returns:
        Signed maps (N, H, W), detached. Positive values support the class. Scales differ between methods.

    Raises:
        MethodError: If the method or an option is unknown, or the method does not support the model.
        InputError: If the tensor is not a batch of images of this model.
        TargetError: If the model does not have a class.
        ModelStateError: If the model is in training mode, or is a plain model without normalization.
    """
    chosen = METHODS[method_names([method])[0]]
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    _check_options(chosen, options)
    x = checked_images(model, x)
    batch_size = batch_size or images_at_once(x)
    maps = []
    with ordinary_autograd(x.device):
        subject, x = AttributionModel(model), x.clone()
        classes = subject.classes(x, targets, batch_size)
        sizes = _runs(x) if chosen.slow else batch_size
        batches = list(zip(x.split(sizes), classes.split(sizes), strict=True))
        for images, wanted in tqdm(batches, chosen.name, disable=None if progress else True):
            subject.generator.manual_seed(seed)
            maps.append(chosen.function(subject, images, wanted, **options).detach())
    return torch.cat(maps)


def check_counts(**counts: int) -> None:
    """Check that numbers are integers of at least 1.

    Raises:
        MethodError: If one is not; the message names it.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise MethodError(f"{name}={value!r}: give a whole number from 1")


def checked_images(model: nn.Module, x: Tensor) -> Tensor:
    """Check images and convert them to the dtype of the model.

    Raises:
        InputError: If the tensor is not a batch of images in [0, 1].
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
        found = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"expected images (N, C, H, W) of floating point, got {found}")
    if not bool(x.isfinite().all()) or x.min() < -ROUNDING or x.max() > 1 + ROUNDING:
        raise InputError("images must be in [0, 1] and finite, without mean/std normalization")
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    if x.device != like.device:
        raise InputError(f"images are on {x.device}, the model is on {like.device}: move one of them")
    return x.detach().to(like.dtype)


def _check_options(method: Method, options: dict[str, object]) -> None:
    parameters = inspect.signature(method.function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise MethodError(f"{method.name} has no option {unknown[0]!r}: it has {', '.join(known) or 'none'}")


def _runs(x: Tensor) -> list[int]:
    """Lengths of the runs of equal images."""
    changes = (x[1:] != x[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1
    return torch.diff(changes.cpu(), prepend=torch.tensor([0]), append=torch.tensor([len(x)])).tolist()
