"""The computations of the demo: predictions, explanations, attribution maps, and the most active units of a layer."""

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
from ..errors import InputError
from ..evaluation.neurons import peak_activations
from ..explainer import Explainer, PreparedPhotos
from ..explanation.api import explain
from ..explanation.result import Explanation
from ..explanation.visualization import map_to_rgba
from ..models.class_names import class_names
from ..models.loading import TimmBcosModel, load_model
from ..nn.module_utils import first_output, frozen_copy, hooked
from ..nn.stems import image_channels
from ..viewer.document import viewer_html
from .limits import SLOW_BATCH_SIZE
from .validation import decode_photo

__all__ = [
    "MAX_CLASSES",
    "DemoModel",
    "Figure",
    "Prediction",
    "attribution_map",
    "doubt",
    "embedded_models",
    "explain_classes",
    "explain_photos",
    "predict",
    "render_explanation",
    "strongest_units",
]

EXAMPLES = Path(__file__).parent / "examples"
# The embedded models: label, and example photos, of which the first is shown first.
EMBEDDED = {
    "bcos_efficientnet_lite0.in1k": ("photos", ("cat", "coffee", "shoes")),
    "bcos_efficientnet_lite0.clothing": ("clothes", ("jacket", "hat", "shoes", "pants")),
    "bcos_cifar_resnet20": ("CIFAR-10", ("cat", "rocket")),
}
TOP_CLASSES = 5  # explained by default
MAX_CLASSES = 10  # per document
LOW_CONFIDENCE = 0.2  # probability of the best class below which the demo says that little is recognized
UNITS = 6
UNITS_PER_PASS = 2  # limits the memory of an explanation


class DemoModel:
    """A model of the demo.

    Args:
        label: Name in the menu.
        module: B-cos model in eval mode.
        names: Names of its classes.
        examples: Example photos.

    Attributes:
        explainer: Explainer of the model.
        layers: Paths of the layers whose units can be explained.
        layer: The layer that is selected first; None if there is none.
        seconds_per_image: Duration of the last forward pass; None before the first.

    Raises:
        InputError: If the model takes neither gray nor color images.
    """

    def __init__(self, label: str, module: TimmBcosModel, names: Sequence[str], examples: Sequence[Path] = ()) -> None:
        self.label, self.module, self.names, self.examples = label, module, list(names), list(examples)
        self.explainer = Explainer(module, class_names=self.names)
        self.seconds_per_image: float | None = None
        self.layers = _spatial_layers(module)
        stages = [stage["module"] for stage in getattr(module, "feature_info", None) or [] if "module" in stage]
        self.layer = next((name for name in reversed([*self.layers, *stages[:-1]]) if name in self.layers), None)

    def read(self, url: object) -> Tensor:
        """Decode a photo and transform it to an input of the model. The photo itself is not kept.

        Args:
            url: Data URL, as in `decode_photo`.

        Returns:
            Image (1, C, H, W) in [0, 1].

        Raises:
            InputError: If it is not a photo.
        """
        return self.explainer.read(decode_photo(url)).images

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.module.parameters()).device


def embedded_models() -> list[DemoModel]:
    """The models that need no download."""
    return [
        DemoModel(f"{label}: {name}", module, class_names(module), [EXAMPLES / f"{photo}.jpg" for photo in photos])
        for name, (label, photos) in EMBEDDED.items()
        for module in [load_model(name).eval()]
    ]


@torch.no_grad()
def _spatial_layers(model: TimmBcosModel) -> list[str]:
    """Paths of the model's stages and blocks that return feature maps or tokens, in the order of execution.

    Layers that run several times are left out: they have no single activation to explain.
    """
    copy = frozen_copy(model)
    names = {module: name for name, module in copy.named_modules() if _is_block(name, module)}
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


def _is_block(name: str, module: nn.Module) -> bool:
    return name != "" and name.count(".") <= 1 and not isinstance(module, nn.Identity)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A photo with the most probable classes of a model.

    Attributes:
        model: The model.
        image: Input of the model, (1, C, H, W) in [0, 1].
        classes: Indices of the most probable classes, best first.
    """

    model: DemoModel
    image: Tensor
    classes: Sequence[int]


@dataclass(frozen=True, eq=False)
class Figure:
    """An image with a title and a note, one of several side by side.

    Attributes:
        title: Text above the image.
        image: Image (H, W, 3) in [0, 1]; None if there is none, for the reason in `note`.
        note: Text below the image.
    """

    title: str
    image: Tensor | None
    note: str = ""


def predict(model: DemoModel, url: object) -> Prediction:
    """Classify a photo.

    Args:
        model: Model of the demo.
        url: Data URL of the photo, as in `timm_bcos.demo.validation.decode_photo`.

    Raises:
        InputError: If it is not a photo.
    """
    return _predictions(model, [model.read(url)])[0]


def explain_photos(model: DemoModel, images: Sequence[Tensor]) -> list[tuple[Prediction, Explanation]]:
    """Classify photos and explain their most probable classes, all in one batch.

    Args:
        model: Model of the demo.
        images: Images (1, C, H, W), from `model.read`.

    Returns:
        For each photo its prediction, and its explanation with a row per class, best first.
    """
    predictions = _predictions(model, images)
    targets = [prediction.classes for prediction in predictions]
    batch = PreparedPhotos(torch.cat(list(images)))
    return list(zip(predictions, model.explainer.explain_targets(batch, targets, chunk=None), strict=True))


def doubt(prediction: Prediction, explanation: Explanation) -> str:
    """What it means that no class is probable; empty if one is.

    Args:
        prediction: Photo and model.
        explanation: Explanation of the photo, with a row per class, best first.
    """
    probability = explanation.probability[0, explanation.target[0]].item()
    if probability >= LOW_CONFIDENCE:
        return ""
    guess = prediction.model.names[prediction.classes[0]]
    return (
        f"The model recognizes hardly anything here: its best guess, {guess}, has a probability of {probability:.0%}. "
        f"The photo may show none of its classes. Pictures are scaled to the strongest evidence, so even weak evidence "
        f"looks bright, often as a colorful checkerboard."
    )


def explain_classes(prediction: Prediction, more: Sequence[int] = ()) -> str:
    """An interactive HTML document that explains the most probable classes and further ones.

    Args:
        prediction: Photo and model.
        more: Indices of further classes.

    Raises:
        InputError: If there are too many classes.
        TargetError: If the model does not have one of the classes.
    """
    classes = list(dict.fromkeys([*prediction.classes, *more]))
    if len(classes) > MAX_CLASSES:
        limit = MAX_CLASSES - len(prediction.classes)
        raise InputError(f"{len(classes)} classes are too many: choose up to {limit} further ones")
    [found] = prediction.model.explainer.explain_targets(PreparedPhotos(prediction.image), classes)
    return render_explanation(prediction, found)


def render_explanation(prediction: Prediction, explanation: Explanation) -> str:
    """An interactive HTML document of an explanation with a row per class."""
    return viewer_html(explanation, title=prediction.model.label)


@torch.no_grad()
def _predictions(model: DemoModel, images: Sequence[Tensor]) -> list[Prediction]:
    started = time.perf_counter()
    logits = model.module(torch.cat(list(images)))
    model.seconds_per_image = (time.perf_counter() - started) / len(images)
    best = logits.topk(min(TOP_CLASSES, logits.shape[1])).indices.tolist()
    return [Prediction(model, image, classes) for image, classes in zip(images, best, strict=True)]


def attribution_map(
    prediction: Prediction, target: int, method: str, before_batch: Callable[[int], None] | None = None
) -> Figure:
    """The map of an attribution method: red for the class, blue against it.

    Args:
        prediction: Photo and model.
        target: Index of the class.
        method: Name of a method in `timm_bcos.attribution.registry.METHODS`.
        before_batch: Callback for methods that process many images, which are then split into small batches. It is
            called before each batch with the number of its images, and ends the method by raising an exception.

    Raises:
        MethodError: If the method does not exist or does not support the model.
        TargetError: If the model does not have the class.
    """
    module = prediction.model.module
    model = module if before_batch is None else _InBatches(module, before_batch)
    maps = attribute(model, prediction.image, [target], method)
    return Figure(method, map_to_rgba(maps)[0, ..., :3])


def strongest_units(
    prediction: Prediction, layer: str, run: Callable[[Callable[[], Any]], Any] = lambda task: task()
) -> list[Figure]:
    """Explanations of a layer's most active units, drawn over the photo in light gray.

    Args:
        prediction: Photo and model.
        layer: One of the model's `layers`.
        run: Function that calls each of several tasks, for instance on another thread, and returns its result.

    Raises:
        TargetError: If the layer does not exist or has no spatial positions.
    """
    module, image = prediction.model.module, prediction.image
    peaks = run(lambda: peak_activations(AttributionModel(module), layer, image)[:, 0])
    best = peaks.topk(min(UNITS, len(peaks)))
    drawn: list[Tensor] = []
    for units in best.indices.split(UNITS_PER_PASS):
        images = image.expand(len(units), -1, -1, -1)
        drawn += run(partial(_draw_units, module, images, units, layer))
    return [
        Figure(f"unit {unit}", picture, f"activation {value:.3g}")
        for unit, value, picture in zip(best.indices.tolist(), best.values.tolist(), drawn, strict=True)
    ]


def _draw_units(model: nn.Module, images: Tensor, units: Tensor, layer: str) -> list[Tensor]:
    return list(_over_photo(explain(model, images, units, layer=layer)))


class _InBatches(nn.Module):
    """A model that processes its input in small batches and calls a function before each.

    Gradients are computed with activation checkpointing, so that memory holds the activations of one batch only.
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
        for batch in x.split(SLOW_BATCH_SIZE):
            self.before_batch(len(batch))
            outputs.append(checkpoint(self.model, batch, use_reentrant=False))
        return torch.cat(outputs)


def _over_photo(explanation: Explanation) -> Tensor:
    """(N, H, W, 3) explanations in color over the photo in light gray."""
    colors = explanation.to_rgba().cpu()
    opacity = colors[..., 3:]
    gray = 0.6 + 0.4 * explanation.image.mean(1).cpu()[..., None]
    return colors[..., :3] * opacity + gray * (1 - opacity)
