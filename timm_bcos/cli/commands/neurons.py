"""`timm-bcos neurons`: the images that activate a layer's units most."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import Checkpoint, Classes, ClassMap, DataChoice, DataDir, Dataset, Device, Model, NetworkChoice, Split

__all__ = ["neurons"]


def neurons(
    layer: Annotated[
        str, typer.Option(help="Path of a layer whose output is a feature map or tokens, for instance blocks.4.")
    ],
    data_dir: DataDir,
    dataset: Dataset = "",
    split: Split = "validation",
    class_map: ClassMap = "",
    model: Model = None,
    checkpoint: Checkpoint = None,
    classes: Classes = None,
    device: Device = "cpu",
    units: Annotated[int, typer.Option(min=1, help="Number of units in the figures.")] = 6,
    images: Annotated[int, typer.Option(min=1, help="Number of images per unit in wall.png.")] = 6,
    strongest: Annotated[
        int, typer.Option(min=1, help="Number of strongest images per unit, whose class entropy is computed.")
    ] = 500,
    out: Annotated[Path, typer.Option(help="Directory for the figures and units.csv.")] = Path("neurons"),
) -> None:
    """Show the images that activate a layer's units most, with explanations, and their classes.

    Writes wall.png (crops of the most active units' images, and their explanations), classes.png (the classes of the
    most one-sided units) and units.csv (every unit).
    """
    from ...evaluation.neurons import find_strongest, label_entropy, plot_label_counts, plot_wall, save_units
    from ...explanation.visualization import save_figure
    from ...models.class_names import class_names

    network = NetworkChoice(model, checkpoint).load(device)
    labeled = DataChoice(data_dir, dataset, split, class_map).load(network.num_classes)
    names = class_names(network, classes)
    found = find_strongest(network, labeled, layer, strongest)
    save_units(found, names, out / "units.csv")
    save_figure(plot_wall(network, labeled, found, found.most_active(units), images), out / "wall.png")
    one_sided = found.most_one_sided(units, len(names))
    if one_sided:
        save_figure(plot_label_counts(found, one_sided, names), out / "classes.png")
    entropy = label_entropy(found.labels, len(names)).tolist()
    for unit in one_sided:
        top = names[int(found.labels[unit].mode().values)]
        typer.echo(f"unit {unit}: entropy {entropy[unit]:.3f} of the uniform distribution's, most often {top}")
    typer.echo(f"wrote {out}")
