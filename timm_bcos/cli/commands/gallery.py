"""`timm-bcos gallery`: explanations of many images in one figure."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import (
    AnyModelOptions,
    Classes,
    DataOptions,
    Device,
    Methods,
    ModelOptions,
    chosen_methods,
    expand_groups,
)  # fmt: skip

__all__ = ["of_classes", "of_methods"]

SHOWN = 6
Show = Annotated[
    list[str] | None, typer.Option(help=f"Class to show, by name or index; repeatable. (default: the first {SHOWN})")
]
Out = Annotated[Path, typer.Option(help="Image file to write.")]


@expand_groups
def of_classes(
    data_options: DataOptions,
    model_options: ModelOptions,
    classes: Classes = None,
    device: Device = "cpu",
    show: Show = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images per class.")] = 6,
    out: Out = Path("classes.png"),
) -> None:
    """Plot each class's images of highest confidence with their explanations in color."""
    from ...distributed import on_main
    from ...evaluation.galleries import plot_classes
    from ...explanation.visualization import save_figure

    model = model_options.load(device)
    names, x, targets = _most_confident(model, data_options, classes, show, images)
    on_main(lambda: save_figure(plot_classes(model, x, targets, names), out))
    typer.echo(f"wrote {out}")


@expand_groups
def of_methods(
    data_options: DataOptions,
    model_options: AnyModelOptions,
    classes: Classes = None,
    device: Device = "cpu",
    show: Show = None,
    method: Methods = None,
    out: Out = Path("methods.png"),
) -> None:
    """Plot one image per class, explained by every attribution method that supports the model."""
    from ...attribution.registry import METHODS
    from ...distributed import on_main
    from ...evaluation.galleries import plot_methods
    from ...explanation.visualization import save_figure

    methods = chosen_methods(method, METHODS)
    model = model_options.load(device)
    names, x, targets = _most_confident(model, data_options, classes, show, 1)
    figure = plot_methods(model, x, targets, methods, names)
    on_main(lambda: save_figure(figure, out))
    typer.echo(f"wrote {out}")


def _most_confident(
    model: Any, data_options: DataOptions, classes: Path | None, show: list[str] | None, images: int
) -> tuple[list[str], Any, list[int]]:
    """The names of all classes, and the images with the highest confidence with their classes."""
    import torch

    from ...data.datasets import image_loader
    from ...evaluation.galleries import most_confident
    from ...evaluation.pointing_game import confidences
    from ...models.class_names import class_names, find_class

    names, labeled = class_names(model, classes), data_options.load(model.num_classes)
    shown = [find_class(c, names, len(names)) for c in show or ()] or list(range(min(SHOWN, len(names))))
    chosen = most_confident(list(confidences(model, labeled)), images, list(dict.fromkeys(shown)))
    load = image_loader(model, labeled)
    x = torch.stack([load(item.index)[0] for item in chosen]).to(next(model.parameters()).device)
    return names, x, [item.label for item in chosen]
