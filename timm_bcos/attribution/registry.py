"""Attribution methods behind one call, to compare with B-cos explanations: a signed map (N, H, W) for each image.

    >>> attribute(model, x, targets, method="integrated_gradients")  # captum's Integrated Gradients
    >>> attribute(model, x, targets)  # the model's own explanation

The methods are in `timm_bcos.attribution.methods` and `.transformers`; `@register("name")` adds one.
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

# Pixels of a pass. With a graph: nine images of 224 × 224, or one 3×3 grid of such images.
WITH_GRAPH = 672 * 672
WITHOUT_GRAPH = 32 * 224 * 224


def images_at_once(x: Tensor, has_graph: bool = True) -> int:
    """How many images of the size of x (N, C, H, W) a pass takes, so that memory does not grow with their size.

    Args:
        x: Images.
        has_graph: Whether the pass is differentiated.
    """
    pixels = WITH_GRAPH if has_graph else WITHOUT_GRAPH
    return max(pixels // (x.shape[-2] * x.shape[-1]), 1)


Targets = Sequence[int] | Tensor | int | None
ROUNDING = 1e-4  # by which pixels may lie outside of [0, 1], as in `explain`: resizing rounds


class AttributionModel(nn.Module):
    """A network as the methods see it: images in [0, 1] in, logits out, whatever its own normalization.

    It holds a private copy of the network's modules, which shares the memory of its numbers: what methods do to it
    (hooks, modes, merged weights) no other user of the network sees.

    Methods that follow gradients start from `prepare(x)`: the six encoded channels of a B-cos network, the normalized
    three of a plain one. Methods that change images change x itself.

    Args:
        model: A B-cos network, or a plain timm model, in eval mode.

    Attributes:
        model: The copy.
        is_bcos: Whether it reads encoded images.
        channels: Of its images; None where it does not say.
        generator: What methods draw random numbers from, on the CPU; `attribute` seeds it.
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
        """The input proper of images (N, C, H, W) in [0, 1].

        Raises:
            InputError: For images of other channels than the network's.
            ModelStateError: For a plain network that does not say how its images are normalized.
        """
        if self.channels not in (None, x.shape[1]):
            raise InputError(f"images have {x.shape[1]} channels, {self.kind} takes {self.channels}")
        if self.is_bcos:
            return encode_image(x, x.shape[1]) if self._takes_encoding(x) else x
        mean, std = (torch.tensor(values).to(x).reshape(1, -1, 1, 1) for values in self._statistics(x.shape[1]))
        return (x - mean) / std

    @torch.no_grad()
    def _takes_encoding(self, x: Tensor) -> bool:
        """Whether the encoding reaches the first layer as the image does: not if the model changes images before."""
        if self._reads_at_once is None:
            try:
                found, expected = (first_output(self.model(z)) for z in (encode_image(x[:1], x.shape[1]), x[:1]))
            except (RuntimeError, BcosError):
                self._reads_at_once = False
            else:
                self._reads_at_once = bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-4))
        return self._reads_at_once

    def leaf(self, x: Tensor) -> Tensor:
        """The same as a leaf, to be differentiated by."""
        return self.prepare(x).detach().requires_grad_()

    def _statistics(self, channels: int) -> list[Any]:
        cfg = getattr(self.part, "pretrained_cfg", None) or {}
        found = [cfg.get(name) for name in ("mean", "std")]
        found = [values[:1] if values and len(set(values)) == 1 else values for values in found]
        if any(values is None or len(values) not in (1, channels) for values in found):
            raise ModelStateError(
                f"{self.kind} does not say how images of {channels} channels are normalized (mean {found[0]}, std "
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
        """(N, K) of images (N, C, H, W) in [0, 1]: softmax, or sigmoid where the network's config says so."""
        with torch.no_grad():
            logits = self(self.prepare(x))
        config = getattr(self.part, "bcos_config", None)
        return logits.sigmoid() if config and config.probability == "sigmoid" else logits.softmax(1)

    def classes(self, x: Tensor, targets: Targets, batch_size: int | None = None) -> Tensor:
        """(N,) the classes asked for, or the predicted ones.

        Raises:
            TargetError: For what is no class of the model.
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
        """A network that does not say is asked with one image."""
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
    """What each pixel adds to a class, by any of `METHODS`.

    Nothing of the model, and no global random state, is touched: other threads may use it meanwhile.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1], for plain models too: their cfg says how to normalize.
        targets: A class per image, one for all, or None for the predicted ones.
        method: Name or alias of a method in `METHODS`.
        batch_size: Images per pass. None takes as many as `images_at_once`, which bounds the memory. Slow methods take
            one image at a time, with all of its classes.
        seed: Of the methods that draw random numbers; the same seed gives the same maps, in batches of any size.
        progress: Show a bar.
        options: Of the method, for instance `n_steps` of 'integrated_gradients'.

    Returns:
        (N, H, W), signed, detached; higher speaks for the class. Scales differ between methods.

    Raises:
        MethodError: For an unknown method or option, or a method that the model's architecture does not support.
        InputError: For tensors that are no images of this network.
        TargetError: For classes that the model does not have.
        ModelStateError: For a model in training mode, or a plain one without normalization.
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
    """Refuse numbers of things that are none.

    Raises:
        MethodError: Naming the first that is not a whole number from 1.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise MethodError(f"{name}={value!r}: give a whole number from 1")


def checked_images(model: nn.Module, x: Tensor) -> Tensor:
    """The images in the network's own precision.

    Raises:
        InputError: For tensors that are no images.
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
    """How many images follow each other that are the same one."""
    changes = (x[1:] != x[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1
    return torch.diff(changes.cpu(), prepend=torch.tensor([0]), append=torch.tensor([len(x)])).tolist()
