"""What the page answers: a photo's classes, other methods' maps, a layer's strongest neurons. Nothing is kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attribution.registry import AttributionModel, attribute
from ..data.photos import photo_transform
from ..errors import InputError
from ..evaluation.neurons import peak_activations
from ..explanation.api import explain, explain_targets
from ..explanation.result import Explanation
from ..explanation.visualization import map_to_rgba
from ..models.class_names import class_names
from ..models.loading import TimmBcosModel, load_model
from ..nn.module_utils import first_output, frozen_copy, hooked
from ..nn.stems import image_channels
from ..viewer.document import viewer_html
from .limits import SLOW_BATCH
from .uploads import decode_photo

__all__ = [
    "MOST_CLASSES",
    "DemoModel",
    "Picture",
    "Visit",
    "begin",
    "document_of",
    "embedded_networks",
    "explain_classes",
    "explain_photos",
    "map_of_method",
    "strongest_neurons",
]

EXAMPLES = Path(__file__).parent / "examples"
# The networks that come with the package: what they know, and photos for them, the first being shown first.
EMBEDDED = {
    "bcos_efficientnet_lite0.in1k": ("photos", ("cat", "coffee", "shoes")),
    "bcos_efficientnet_lite0.clothing": ("clothes", ("jacket", "hat", "shoes", "pants")),
    "bcos_cifar_resnet20": ("CIFAR-10", ("cat", "rocket")),
}


class DemoModel:
    """A network on the page.

    Args:
        label: What visitors choose it by.
        model: In eval mode.
        names: Of its classes.
        examples: Photos to begin with.

    Attributes:
        layers: Paths of the modules whose neurons the page explains.
        layer: The one that it explains first; None if there are none.
        seconds_per_image: That a pass took when a photo was shown to it last; None before the first.

    Raises:
        InputError: For a network that takes neither gray nor colored images.
    """

    def __init__(self, label: str, model: TimmBcosModel, names: Sequence[str], examples: Sequence[Path] = ()) -> None:
        self.label, self.model, self.names, self.examples = label, model, list(names), list(examples)
        self.mode, self.transform = photo_transform(model)
        self.seconds_per_image: float | None = None
        self.layers = _layers_with_positions(model)
        stages = [stage["module"] for stage in getattr(model, "feature_info", None) or [] if "module" in stage]
        self.layer = next((name for name in reversed([*self.layers, *stages[:-1]]) if name in self.layers), None)

    def read(self, address: object) -> Tensor:
        """A photo from a browser as the network takes it, (1, C, H, W) in [0, 1].

        Args:
            address: As in `decode_photo`.

        Raises:
            InputError: For what is no photo.
        """
        image = self.transform(decode_photo(address, self.mode))
        return image[None].to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device


def embedded_networks() -> list[DemoModel]:
    """The networks that need no download."""
    return [
        DemoModel(f"{known}: {name}", model, class_names(model), [EXAMPLES / f"{photo}.jpg" for photo in photos])
        for name, (known, photos) in EMBEDDED.items()
        for model in [load_model(name).eval()]
    ]


@torch.no_grad()
def _layers_with_positions(model: TimmBcosModel) -> list[str]:
    """The network's larger parts whose output is a map, or tokens, in the order of execution.

    Those that run several times have no single activation to explain.
    """
    copy = frozen_copy(model)
    names = {module: name for name, module in copy.named_modules() if _is_large_part(name, module)}
    runs: list[nn.Module] = []

    def record(module: nn.Module, args: object, output: object) -> None:
        value = first_output(output)
        if (
            isinstance(value, Tensor)
            and value.ndim in (3, 4)
            and value[0].numel() > max(value.shape[1], value.shape[-1])
        ):
            runs.append(module)

    weight = next(copy.parameters())
    _, *size = timm.data.resolve_model_data_config(model)["input_size"]
    with hooked(names, record):
        copy(torch.rand(1, image_channels(model) or 3, *size, generator=torch.Generator().manual_seed(0)).to(weight))
    return [names[module] for module in dict.fromkeys(runs) if runs.count(module) == 1]


def _is_large_part(name: str, module: nn.Module) -> bool:
    return name != "" and name.count(".") <= 1 and not isinstance(module, nn.Identity)


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

    network: DemoModel
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


def begin(network: DemoModel, address: object) -> Visit:
    """Show a photo to a network.

    Args:
        network: Any of the page's.
        address: The photo, as in `timm_bcos.demo.uploads.decode_photo`.

    Raises:
        InputError: For what is no photo.
    """
    return _visits(network, [network.read(address)])[0]


def explain_photos(network: DemoModel, images: Sequence[Tensor]) -> list[tuple[Visit, Explanation]]:
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
def _visits(network: DemoModel, images: Sequence[Tensor]) -> list[Visit]:
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
    """What a layer's most active units see in the photo: their explanations, over the photo in pale gray.

    Args:
        visit: The photo and the network.
        layer: One of the network's `layers`.
        run: Calls each of several steps, for instance in another thread, and returns what it returns.

    Raises:
        TargetError: For a layer that has no neurons to explain.
    """
    model, image = visit.network.model, visit.image
    peaks = run(lambda: peak_activations(AttributionModel(model), layer, image)[:, 0])
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
    """(N, H, W, 3) explanations in color over the photo in pale gray, so that one sees where they are."""
    colors = explanation.to_rgba().cpu()
    opacity = colors[..., 3:]
    gray = 0.6 + 0.4 * explanation.image.mean(1).cpu()[..., None]
    return colors[..., :3] * opacity + gray * (1 - opacity)
