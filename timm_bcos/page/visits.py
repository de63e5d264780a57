"""What the page answers: a photo's classes, other methods' maps, a layer's strongest neurons. Nothing is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attribution.registry import Subject, attribute
from ..errors import InputError
from ..explaining.explanation import Explanation
from ..explaining.forward import explain, explain_targets
from ..explaining.pictures import map_to_rgba
from ..judging.neurons import peak_activations
from .networks import PageNetwork
from .viewer import viewer_html

__all__ = ["MOST_CLASSES", "Picture", "Visit", "begin", "explain_classes", "map_of_method", "strongest_neurons"]

FIRST_CLASSES = 5  # that are explained without being asked for
MOST_CLASSES = 10  # in one document
NEURONS = 6


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
    image = network.read(address)
    with torch.no_grad():
        logits = network.model(image)[0]
    return Visit(network, image, logits.topk(min(FIRST_CLASSES, len(logits))).indices.tolist())


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
    return viewer_html(Explanation.stack(found), visit.network.names, visit.network.label)


def map_of_method(visit: Visit, target: int, method: str) -> Picture:
    """What another method says speaks for a class (red) and against it (blue).

    Args:
        visit: The photo and the network.
        target: The class.
        method: Of `timm_bcos.attribution.registry.METHODS`.

    Raises:
        MethodError: If there is no such method, or it does not suit the network.
        TargetError: For a class that the network does not have.
    """
    maps = attribute(visit.network.model, visit.image, [target], method)
    return Picture(method, map_to_rgba(maps)[0, ..., :3])


def strongest_neurons(visit: Visit, layer: str) -> list[Picture]:
    """What a layer's most active units see in the photo: their explanations, over the photo in pale grey.

    Args:
        visit: The photo and the network.
        layer: One of the network's `layers`.

    Raises:
        TargetError: For a layer that has no neurons to explain.
    """
    peaks = peak_activations(Subject(visit.network.model), layer, visit.image)[:, 0]
    best = peaks.topk(min(NEURONS, len(peaks)))
    images = visit.image.expand(len(best.indices), -1, -1, -1)
    explanation = explain(visit.network.model, images, best.indices, layer=layer)
    return [
        Picture(f"unit {unit}", picture, f"activation {value:.3g}")
        for unit, value, picture in zip(
            best.indices.tolist(), best.values.tolist(), _on_photo(explanation), strict=True
        )
    ]


def _on_photo(explanation: Explanation) -> Tensor:
    """(N, H, W, 3) explanations in colour over the photo in pale grey, so that one sees where they are."""
    colours = explanation.to_rgba().cpu()
    opacity = colours[..., 3:]
    grey = 0.6 + 0.4 * explanation.image.mean(1).cpu()[..., None]
    return colours[..., :3] * opacity + grey * (1 - opacity)
