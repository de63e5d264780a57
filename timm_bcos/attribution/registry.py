"""The registry of attribution methods, and `attribute`, which returns a signed map (N, H, W) by any of them.

    >>> attribute(model, x, targets, method="integrated_gradients")  # captum's Integrated Gradients
    >>> attribute(model, x, targets)  # the model's own explanation

`timm_bcos.attribution.methods` and `.transformers` define the methods; `@register("name")` adds one.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..dynamic_linear.mode import ordinary_autograd
from ..errors import InputError, MethodError, MissingExtraError
from ..explanation.inputs import Layer, layer_path
from ..explanation.patches import split_input
from ..explanation.regions import Position, Region
from ..explanation.request import Request
from .attribution_model import AttributionModel, Targets

__all__ = [
    "METHODS",
    "WITH_GRAPH",
    "AttributionModel",
    "Method",
    "Targets",
    "attribute",
    "available_methods",
    "check_counts",
    "checked_images",
    "images_at_once",
    "library",
    "method_name",
    "method_names",
    "register",
    "settled_model",
]

ROUNDING = 1e-4  # tolerance of pixels in [0, 1], as in `explain`: resizing may overshoot by rounding

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
        needs: Module that the method imports, which needs the extra `attribution`; None for none.
    """

    name: str
    function: Attribute
    slow: bool = False
    aliases: tuple[str, ...] = ()
    needs: str | None = None

    @property
    def options(self) -> list[str]:
        """Names of the method's own options."""
        parameters = inspect.signature(self.function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

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


def available_methods(chosen: Sequence[str] | None, default: Iterable[str]) -> tuple[list[str], list[str]]:
    """The methods of a command, and the reasons why others of its default are left out.

    Args:
        chosen: Names or aliases that a user has chosen; None or empty for the default.
        default: Names or aliases of the default methods, which are left out if their library is not installed.

    Raises:
        MethodError: If there is no method of a name.
        MissingExtraError: If the library of a chosen method is not installed.
    """
    names, missing = method_names(chosen or default), dict[str, list[str]]()
    for name in names:
        try:
            library(METHODS[name].needs)
        except MissingExtraError as error:
            if chosen:
                raise MissingExtraError(f"{name}: {error}") from error
            missing.setdefault(str(error), []).append(name)
    left_out = [name for some in missing.values() for name in some]
    reasons = [f"{', '.join(some)}: {reason}" for reason, some in missing.items()]
    return [name for name in names if name not in left_out], reasons


def library(name: str | None) -> Any:
    """Import a library of the extra `attribution`, or a module of this package that needs one; None for None.

    Raises:
        MissingExtraError: If it is not installed.
    """
    if name is None:
        return None
    try:
        return importlib.import_module(name, __package__)
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install 'timm_bcos[attribution]'") from error


def register(
    name: str, *, aliases: Sequence[str] = (), slow: bool = False, needs: str | None = None, replace: bool = False
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
        needs: Module that the function imports, if it comes with the extra `attribution`.
        replace: Replace the method that has this name.

    Raises:
        MethodError: If there is a method of this name, unless `replace` is set.
    """
    known = method_name(name)

    def add(function: Attribute) -> Attribute:
        if known in METHODS and not replace:
            raise MethodError(f"there is a method {name!r}: choose another name, or pass register(..., replace=True)")
        others = tuple(aliases) or (METHODS[known].aliases if known in METHODS else ())
        METHODS[known] = Method(known, function, slow, others, needs)
        return function

    return add


def attribute(
    model: nn.Module,
    x: Tensor | Mapping[str, Tensor],
    targets: Targets = None,
    method: str = "bcos",
    *,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Compute attribution maps of classes, or of whatever else `explain` can explain.

    The model and the global random state are not modified, so other threads may use the model at the same time.

    Args:
        model: A B-cos model or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1], or a NaFlex input as in `explain`. Plain models are normalized by their
            `pretrained_cfg`.
        targets: Class of each image, one class for all, or None for the predicted classes. With `layer`, units.
        method: Name or alias of a method in `METHODS`.
        layer: Inner module, or its path, whose units are attributed, as in `explain`. For 'gradcam' it is the layer
            whose feature maps are weighted, and the class is always one of the model's output.
        output: Name or index of the output, as in `explain`.
        position: Position in a map, or N of them, as in `explain`. With `layer` or `output`, None takes the position
            where the target is largest; perturbed images keep that position.
        region: Mask or box, or N of them, over which a map is averaged, as in `explain`.
        extra: Other arguments of the model by name, as in `explain`; tensors with N rows are taken image by image.
        batch_size: Number of images per pass; None for `images_at_once`, which bounds the memory. Slow methods process
            one image at a time, with all of its classes.
        seed: Random seed. Maps do not depend on the batch size.
        progress: Show a progress bar.
        options: Options of the method, for instance `n_steps` of 'integrated_gradients'.

    Returns:
        Signed maps (N, H, W), detached. Positive values support the class. Scales differ between methods.

    Raises:
        MethodError: If the method or an option is unknown, or the method does not support the model or the request.
        InputError: If the tensor is not a batch of images of this model.
        TargetError: If the model does not have a class, layer, output, position or region.
        ModelStateError: If the model is in training mode, is a plain model without normalization, or returns maps and
            nothing says what to take from them.
    """
    chosen = METHODS[method_names([method])[0]]
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    options, layer = _split_layer(chosen, model, options, layer)
    _check_options(chosen, options)
    x, request = _checked_request(model, x, layer, output, position, region, extra)
    batch_size = batch_size or images_at_once(x)
    maps = []
    with ordinary_autograd(x.device):
        subject, x = AttributionModel(model, request), x.clone()
        classes = subject.settle(x, targets, batch_size)
        request = subject.request
        batches = _batches(x, chosen, request.varies, batch_size)
        for rows in tqdm(batches, chosen.name, disable=None if progress else True):
            subject.request = request.of_images(rows)
            subject.generator.manual_seed(seed)
            maps.append(chosen.function(subject, x[rows], classes[rows], **options).detach())
    return torch.cat(maps)


def settled_model(
    model: nn.Module,
    x: Tensor | Mapping[str, Tensor],
    targets: Targets,
    method: str,
    *,
    layer: Layer = None,
    output: str | int | None = None,
    position: Position = None,
    region: Region = None,
    extra: Mapping[str, object] | None = None,
) -> tuple[AttributionModel, Tensor, Tensor]:
    """The model with a request of `attribute`, for other computations than attribution.

    Args:
        model: As in `attribute`.
        x: As in `attribute`.
        targets: As in `attribute`.
        method: As in `attribute`.
        layer: As in `attribute`.
        output: As in `attribute`.
        position: As in `attribute`.
        region: As in `attribute`.
        extra: As in `attribute`.

    Returns:
        The model, which returns what is attributed, with positions where the targets are largest in the given images;
        the images (N, C, H, W); and the classes (N,).
    """
    _, layer = _split_layer(METHODS[method_names([method])[0]], model, {}, layer)
    image, request = _checked_request(model, x, layer, output, position, region, extra)
    with ordinary_autograd(image.device):
        subject = AttributionModel(model, request)
        return subject, image, subject.settle(image, targets, images_at_once(image))


def _split_layer(
    method: Method, model: nn.Module, options: dict[str, Any], layer: Layer
) -> tuple[dict[str, Any], Layer]:
    """The layer as an option of a method that has an option of this name, or else as what is attributed."""
    if layer is None or "layer" not in method.options:
        return options, layer
    return options | dict(layer=layer if isinstance(layer, str) else layer_path(model, layer)), None


def _checked_request(
    model: nn.Module,
    x: Tensor | Mapping[str, Tensor],
    layer: Layer,
    output: str | int | None,
    position: Position,
    region: Region,
    extra: Mapping[str, object] | None,
) -> tuple[Tensor, Request]:
    """The images, and the request that arguments of `attribute` stand for: an empty one for logits."""
    image, rest, patches = split_input(model, x, extra)
    image = checked_images(model, image)
    names: dict[str, Any] = dict(layer=layer_path(model, layer), output=output, patches=patches)
    request = Request.checked(image, None, position=position, region=region, extra=rest, **names)
    is_empty = not rest and not request.is_placed and layer is None and output is None
    return image, Request() if is_empty else request


def check_counts(**counts: int) -> None:
    """Check that numbers are integers of at least 1.

    Raises:
        MethodError: If one is not; the message names it.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise MethodError(f"{name}={value!r}: give a whole number from 1")


def checked_images(model: nn.Module, x: object) -> Tensor:
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
    unknown = [name for name in options if name not in method.options]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise MethodError(f"{method.name} has no option {unknown[0]!r}: it has {', '.join(method.options) or 'none'}")


def _batches(x: Tensor, method: Method, varies: bool, batch_size: int) -> list[slice]:
    """Rows of the images that go into one pass: one image if the request differs from image to image."""
    starts = [*range(0, len(x), 1 if varies else batch_size)]
    if method.slow and not varies:  # runs of equal images
        starts = [0, *((x[1:] != x[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1).tolist()]
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(x)])]
