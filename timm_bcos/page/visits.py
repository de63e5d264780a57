"""What the page answers: a photo's classes, other methods' maps, a layer's strongest neurons. Nothing is kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attribution.registry import Subject, attribute
from ..errors import InputError
from ..explaining.explanation import Explanation
from ..explaining.forward import explain, explain_targets
from ..explaining.pictures import map_to_rgba
from ..judging.neurons import peak_activations
from ..nn.modules import frozen_copy
from .limits import SLOW_BATCH
from .networks import PageNetwork
from .viewer import viewer_html

__all__ = [
    "MOST_CLASSES", "Picture", "Visit", "begin", "document_of", "explain_classes", "explain_photos", "map_of_method",
    "strongest_neurons",
]  # fmt: skip

FIRST_CLASSES = 5  # that are explained without being asked for
MOST_CLASSES = 10  # in one document
NEURONS = 6
NEURONS_AT_ONCE = 2  # explained in one pass, whose memory grows with them


@dataclass(frozen=True, eq=False)
class Visit:
    """A photo before a network.

    Attributes:
        network: Which.
        image: (1, C, H, W) in [0, 1], as the network takes it.
        classes: The most probable ones, best first.
    """

    network: PageNetwork
    image: Tensor
    classes: Sequence[int]


@dataclass(frozen=True, eq=False)
class Picture:
    """One of several side by side.

    Attributes:
        title: Above it.
        pixels: (H, W, 3) in [0, 1]; None where there is none, and `note` says why.
        note: Below it.
    """

    title: str
    pixels: Tensor | None
    note: str = ""


def begin(network: PageNetwork, address: object) -> Visit:
    """Show a photo to a network.

    Args:
        network: Any of the page's.
        address: The photo, as in `timm_bcos.page.uploads.decode_photo`.

    Raises:
        InputError: For what is no photo.
    """
    return _visits(network, [network.read(address)])[0]


def explain_photos(network: PageNetwork, images: Sequence[Tensor]) -> list[tuple[Visit, Explanation]]:
    """Show photos to a network and explain their most probable classes, all in one pass.

    Args:
        network: Any of the page's.
        images: (1, C, H, W) each, as `network.read` returns them.

    Returns:
        For each photo its visit, and its explanation with a row for each class, best first.
    """
    visits = _visits(network, images)
    ranks = explain_targets(network.model, torch.cat(list(images)), [visit.classes for visit in visits])
    return [(visit, Explanation.stack([rank[i] for rank in ranks])) for i, visit in enumerate(visits)]


def explain_classes(visit: Visit, more: Sequence[int] = ()) -> str:
    """The interactive document about the most probable classes and further ones.

    Args:
        visit: The photo and the network.
        more: Further classes.

    Raises:
        InputError: For too many.
        TargetError: For classes that the network does not have.
    """
    classes = list(dict.fromkeys([*visit.classes, *more]))
    if len(classes) > MOST_CLASSES:
        raise InputError(
            f"{len(classes)} classes at once: choose up to {MOST_CLASSES - len(visit.classes)} further ones"
        )
    found = explain_targets(visit.network.model, visit.image, [classes])
    return document_of(visit, Explanation.stack(found))


def document_of(visit: Visit, explanation: Explanation) -> str:
    """The interactive document about an explanation with a row for each class."""
    return viewer_html(explanation, visit.network.names, visit.network.label)


@torch.no_grad()
def _visits(network: PageNetwork, images: Sequence[Tensor]) -> list[Visit]:
    started = time.perf_counter()
    logits = network.model(torch.cat(list(images)))
    network.seconds_per_image = (time.perf_counter() - started) / len(images)
    best = logits.topk(min(FIRST_CLASSES, logits.shape[1])).indices.tolist()
    return [Visit(network, image, classes) for image, classes in zip(images, best, strict=True)]


def map_of_method(visit: Visit, target: int, method: str, before_batch: Callable[[int], None] | None = None) -> Picture:
    """What another method says speaks for a class (red) and against it (blue).

    Args:
        visit: The photo and the network.
        target: The class.
        method: Of `timm_bcos.attribution.registry.METHODS`.
        before_batch: For methods that look at many images: called before each pass through the network, which then
            takes few at a time, with their number. What it raises ends the method.

    Raises:
        MethodError: If there is no such method, or it does not suit the network.
        TargetError: For a class that the network does not have.
    """
    model = visit.network.model
    maps = attribute(model if before_batch is None else _InParts(model, before_batch), visit.image, [target], method)
    return Picture(method, map_to_rgba(maps)[0, ..., :3])


def strongest_neurons(
    visit: Visit, layer: str, run: Callable[[Callable[[], Any]], Any] = lambda step: step()
) -> list[Picture]:
    """What a layer's most active units see in the photo: their explanations, over the photo in pale grey.

    Args:
        visit: The photo and the network.
        layer: One of the network's `layers`.
        run: Calls each of several steps, for instance in another thread, and returns what it returns.

    Raises:
        TargetError: For a layer that has no neurons to explain.
    """
    model, image = visit.network.model, visit.image
    peaks = run(lambda: peak_activations(Subject(model), layer, image)[:, 0])
    best = peaks.topk(min(NEURONS, len(peaks)))
    pictures: list[Tensor] = []
    for units in best.indices.split(NEURONS_AT_ONCE):
        images = image.expand(len(units), -1, -1, -1)
        pictures += run(partial(_pictures_of_units, model, images, units, layer))
    return [
        Picture(f"unit {unit}", picture, f"activation {value:.3g}")
        for unit, value, picture in zip(best.indices.tolist(), best.values.tolist(), pictures, strict=True)
    ]


def _pictures_of_units(model: nn.Module, images: Tensor, units: Tensor, layer: str) -> list[Tensor]:
    return list(_on_photo(explain(model, images, units, layer=layer)))


class _InParts(nn.Module):
    """A network that takes few images at a time, gradients included, and tells of each time.

    Where gradients are asked for it computes every part a second time, and so holds the activations of one part only.
    """

    def __init__(self, model: nn.Module, before_batch: Callable[[int], None]) -> None:
        super().__init__()
        self.model, self.before_batch = frozen_copy(model), before_batch
        for name in ("bcos_config", "in_chans", "num_classes", "pretrained_cfg"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for part in x.split(SLOW_BATCH):
            self.before_batch(len(part))
            outputs.append(checkpoint(self.model, part, use_reentrant=False))
        return torch.cat(outputs)


def _on_photo(explanation: Explanation) -> Tensor:
    """(N, H, W, 3) explanations in colour over the photo in pale grey, so that one sees where they are."""
    colours = explanation.to_rgba().cpu()
    opacity = colours[..., 3:]
    grey = 0.6 + 0.4 * explanation.image.mean(1).cpu()[..., None]
    return colours[..., :3] * opacity + grey * (1 - opacity)
