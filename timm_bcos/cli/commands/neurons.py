"""`timm-bcos neurons`: the images that activate a layer's units most."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import Classes, DataOptions, Device, Layer, ModelOptions, expand_groups

__all__ = ["neurons"]


@expand_groups
def neurons(
    layer: Layer,
    data_options: DataOptions,
    model_options: ModelOptions,
    classes: Classes = None,
    device: Device = "cpu",
    units: Annotated[int, typer.Option(min=1, help="Number of units in the figures.")] = 6,
    images: Annotated[int, typer.Option(min=1, help="Number of images per unit in wall.png.")] = 6,
    strongest: Annotated[
        int, typer.Option(min=1, help="Number of images per unit over which its class entropy is computed.")
    ] = 500,
    out: Annotated[Path, typer.Option(help="Directory for the figures and units.csv.")] = Path("neurons"),
) -> None:
    """Show the images that activate a layer's units most, with explanations, and their classes.

    Writes wall.png (crops of the most active units' images, and their explanations), classes.png (the classes of the
    units with the lowest class entropy) and units.csv (every unit).
    """
    from ...distributed import on_main
    from ...evaluation.neurons import find_strongest, label_entropy, plot_label_counts, plot_wall, save_units
    from ...explanation.visualization import save_figure
    from ...models.class_names import class_names

    model = model_options.load(device)
    labeled = data_options.load(model.num_classes)
    names = class_names(model, classes)
    found = find_strongest(model, labeled, layer, strongest)
    selective = found.most_one_sided(units, len(names))

    def write() -> None:
        save_units(found, names, out / "units.csv")
        save_figure(plot_wall(model, labeled, found, found.most_active(units), images), out / "wall.png")
        if selective:
            save_figure(plot_label_counts(found, selective, names), out / "classes.png")

    on_main(write)
    entropy = label_entropy(found.labels, len(names)).tolist()
    for unit in selective:
        top = names[int(found.labels[unit].mode().values)]
        typer.echo(f"unit {unit}: entropy {entropy[unit]:.3f} of the uniform distribution's, most often {top}")
    typer.echo(f"wrote {out}")
