"""`timm-bcos gallery`: explanations of many images in one figure."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import (
    Checkpoint,
    Classes,
    ClassMap,
    DataChoice,
    DataDir,
    Dataset,
    Device,
    Methods,
    Model,
    NetworkChoice,
    Plain,
    Split,
)

__all__ = ["of_classes", "of_methods"]

SHOWN = 6
Show = Annotated[
    list[str] | None, typer.Option(help=f"Class to show, by name or index; repeatable. (default: the first {SHOWN})")
]
Out = Annotated[Path, typer.Option(help="Image file to write.")]


def of_classes(
    data_dir: DataDir,
    dataset: Dataset = "",
    split: Split = "validation",
    class_map: ClassMap = "",
    model: Model = None,
    checkpoint: Checkpoint = None,
    classes: Classes = None,
    device: Device = "cpu",
    show: Show = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images per class.")] = 6,
    out: Out = Path("classes.png"),
) -> None:
    """Plot each class's images of highest confidence with their explanations in color."""
    from ...evaluation.galleries import plot_classes
    from ...explanation.visualization import save_figure

    data = DataChoice(data_dir, dataset, split, class_map)
    network, names, x, targets = _most_confident(NetworkChoice(model, checkpoint), data, classes, device, show, images)
    save_figure(plot_classes(network, x, targets, names), out)
    typer.echo(f"wrote {out}")


def of_methods(
    data_dir: DataDir,
    dataset: Dataset = "",
    split: Split = "validation",
    class_map: ClassMap = "",
    model: Model = None,
    checkpoint: Checkpoint = None,
    plain: Plain = False,
    classes: Classes = None,
    device: Device = "cpu",
    show: Show = None,
    method: Methods = None,
    out: Out = Path("methods.png"),
) -> None:
    """Plot one image per class, explained by every attribution method that suits the model."""
    from ...attribution.registry import METHODS, check_methods
    from ...evaluation.galleries import plot_methods
    from ...explanation.visualization import save_figure

    methods = list(method or METHODS)
    check_methods(methods)
    choice, data = NetworkChoice(model, checkpoint, plain), DataChoice(data_dir, dataset, split, class_map)
    network, names, x, targets = _most_confident(choice, data, classes, device, show, 1)
    save_figure(plot_methods(network, x, targets, methods, names), out)
    typer.echo(f"wrote {out}")


def _most_confident(
    choice: NetworkChoice, data: DataChoice, classes: Path | None, device: str, show: list[str] | None, images: int
) -> tuple[Any, list[str], Any, list[int]]:
    """The network, its classes' names, the images that it is most confident of, and their classes."""
    import torch

    from ...data.datasets import image_loader
    from ...evaluation.galleries import most_confident
    from ...evaluation.pointing_game import confidences
    from ...models.class_names import class_names, find_class

    network = choice.load(device)
    names, labeled = class_names(network, classes), data.load(network.num_classes)
    shown = [find_class(c, names, len(names)) for c in show or map(str, range(min(SHOWN, len(names))))]
    chosen = most_confident(list(confidences(network, labeled)), images, list(dict.fromkeys(shown)))
    load = image_loader(network, labeled)
    x = torch.stack([load(item.index)[0] for item in chosen]).to(device)
    return network, names, x, [item.label for item in chosen]
