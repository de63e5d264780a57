"""Attribution methods behind one call, to compare with B-cos explanations: a signed map (N, H, W) for each image.

    >>> attribute(model, x, targets, method="ig")   # captum's Integrated Gradients
    >>> attribute(model, x, targets)                # the network's own explanation

The methods are in `timm_bcos.attribution.methods`; `@register("name")` adds one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..conversion.converted import frozen
from ..errors import InputError, MethodError, ModelStateError, TargetError
from ..nn.functional import encode_image
from ..nn.stems import BcosStem, ImageReader

__all__ = ["METHODS", "Method", "Subject", "attribute", "check_methods", "register"]


class Subject(nn.Module):
    """A network as the methods see it: images in [0, 1] in, logits out, whatever its own normalisation.

    Methods that follow gradients start from `prepare(x)`: the six encoded channels of a B-cos network, the normalised
    three of a plain one. Methods that change images change x itself.

    Args:
        model: A B-cos network, or a plain timm model, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.training:
            raise ModelStateError("the model is in training mode: call model.eval() first")
        self.model = model
        self.is_bcos = any(isinstance(module, BcosStem | ImageReader) for module in model.modules())
        self.eval()

    def prepare(self, x: Tensor) -> Tensor:
        """The input proper of images (N, C, H, W) in [0, 1]."""
        if self.is_bcos:
            return encode_image(x, x.shape[1])
        cfg = self.model.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).to(x).reshape(1, -1, 1, 1) for key in ("mean", "std"))
        return (x - mean) / std

    def forward(self, prepared: Tensor) -> Tensor:
        """Logits (N, K) of prepared images."""
        output = self.model(prepared)
        return output[0] if isinstance(output, tuple) else output

    def probability(self, x: Tensor) -> Tensor:
        """(N, K) of images (N, C, H, W) in [0, 1]: softmax, or sigmoid where the network's config says so."""
        with torch.no_grad():
            logits = self(self.prepare(x))
        config = getattr(self.model, "bcos_config", None)
        return logits.sigmoid() if config and config.probability == "sigmoid" else logits.softmax(1)


Attribute = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: Its name for `attribute`.
        function: (subject, images, targets, **options) to maps (N, H, W).
        slow: Looks at many changed copies of an image: takes one image at a time, with all its classes.
    """

    name: str
    function: Attribute
    slow: bool = False


METHODS: dict[str, Method] = {}


def register(name: str, *, slow: bool = False) -> Callable[[Attribute], Attribute]:
    """Add a method: a function of (subject, images (N, C, H, W) in [0, 1], targets (N,), **options) to (N, H, W).

    Args:
        name: What `attribute` calls it.
        slow: It looks at many changed copies of an image: it is handed one image at a time, repeated for each of its
            targets, and need change only the first.
    """

    def add(function: Attribute) -> Attribute:
        METHODS[name] = Method(name, function, slow)
        return function

    return add


def attribute(
    model: nn.Module,
    x: Tensor,
    targets: Sequence[int] | Tensor | int | None = None,
    method: str = "bcos",
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """What each pixel adds to a class, by any of `METHODS`.

    Args:
        model: A B-cos network or a plain timm model, in eval mode.
        x: Images (N, C, H, W) in [0, 1], for plain models too: their cfg says how to normalise.
        targets: A class per image, one for all, or None for the predicted ones.
        method: A key of `METHODS`.
        batch_size: Images at a time; slow methods take one, and neighbours that are the same image together.
        seed: Of the methods that draw random numbers; the same seed gives the same maps.
        progress: Show a bar.
        options: Of the method, for instance `n_steps` of 'ig'.

    Returns:
        (N, H, W), signed, detached; higher speaks for the class. Scales differ between methods.

    Raises:
        MethodError: For an unknown method, or one that the model's architecture does not support.
        InputError: For tensors that are no images.
        TargetError: For classes that the model does not have.
        ModelStateError: For a model in training mode.
    """
    check_methods([method])
    chosen, subject = METHODS[method], Subject(model)
    _check_images(x)
    classes = _targets(subject, x, targets, batch_size)
    sizes = _runs(x) if chosen.slow else batch_size
    batches = list(zip(x.split(sizes), classes.split(sizes), strict=True))
    maps = []
    # every batch draws the same numbers: maps do not depend on the batch size (smoothgrad's do)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), frozen(model):
        for images, wanted in tqdm(batches, chosen.name, disable=not progress):
            torch.manual_seed(seed)
            maps.append(chosen.function(subject, images, wanted, **options).detach())
    return torch.cat(maps)


def check_methods(names: Iterable[str]) -> None:
    """Refuse names that no method has.

    Raises:
        MethodError: Naming the first.
    """
    for name in names:
        if name not in METHODS:
            raise MethodError(f"no attribution method {name!r}: choose one of {', '.join(METHODS)}")


def _runs(x: Tensor) -> list[int]:
    """How many images follow each other that are the same one."""
    changes = (x[1:] != x[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1
    return torch.diff(changes.cpu(), prepend=torch.tensor([0]), append=torch.tensor([len(x)])).tolist()


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point() or len(x) == 0:
        raise InputError(f"expected images (N, C, H, W) of floating point, got {tuple(x.shape)} of {x.dtype}")
    if not bool(x.isfinite().all()) or x.min() < 0 or x.max() > 1:
        raise InputError("images must be in [0, 1] and finite, without mean/std normalisation")


def _targets(subject: Subject, x: Tensor, targets: Any, batch_size: int) -> Tensor:
    if targets is None:
        return torch.cat([subject.probability(images).argmax(1) for images in x.split(batch_size)])
    classes = torch.as_tensor(targets, device=x.device).expand(len(x)) if isinstance(targets, int) else targets
    classes = torch.as_tensor(classes, device=x.device)
    count = subject.model.num_classes
    if classes.shape != x.shape[:1] or bool(((classes < 0) | (classes >= count)).any()):
        raise TargetError(f"targets {classes.tolist()}: give {len(x)} classes from 0 to {count - 1}")
    return classes
