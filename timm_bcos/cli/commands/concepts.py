"""`timm-bcos concepts`: the concepts of a layer, and logits as sums of concepts."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..exceptions import quiet_libraries
from ..options import Classes, DataOptions, Device, Layer, ModelOptions, expand_groups
from ..processes import map_with_outputs

if TYPE_CHECKING:
    from ...concepts.dictionary import Concepts
    from ...explainer import Explainer
    from ..outputs import OutputPaths

__all__ = ["concepts"]


@expand_groups
def concepts(
    layer: Layer,
    data_options: DataOptions,
    model_options: ModelOptions,
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos to decompose into the concepts.")] = None,
    classes: Classes = None,
    device: Device = "cpu",
    method: Annotated[str, typer.Option(help="Method that finds the concepts: nmf, kmeans, sae or channels.")] = "nmf",
    count: Annotated[int, typer.Option(min=1, help="Number of concepts.")] = 8,
    target: Annotated[
        str | None, typer.Option(help="Class whose logit is decomposed. (default: the predicted class)")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of concepts per photo to explain by pixels.")] = 3,
    images: Annotated[int, typer.Option(min=1, help="Number of images per concept in wall.png.")] = 6,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("concepts"),
) -> None:
    """Find a layer's concepts, and explain logits as sums of concepts and concepts as sums of pixels.

    Writes wall.png (crops of the images that show each concept most, and their explanations), shares.csv (what each
    concept adds to the logit of each class), concepts.safetensors, and a picture per photo.
    """
    from ...concepts.figures import class_shares, save_shares
    from ...concepts.learning import learn_concepts
    from ...data.photos import find_photos
    from ...distributed import on_main
    from ...evaluation.neurons import find_strongest, plot_wall
    from ...explainer import Explainer
    from ...explanation.visualization import save_figure
    from ...models.class_names import class_names, find_class
    from ..outputs import OutputPaths

    with quiet_libraries():
        given = list(find_photos(photos)) if photos else []
        outputs = OutputPaths(out, given)
        model = model_options.load(device)
        labeled = data_options.load(model.num_classes)
        names = class_names(model, classes)
        asked = None if target is None else find_class(target, names, model.num_classes)
        found = learn_concepts(model, labeled, layer, count, method)
    reader = Explainer(model, class_names=names)
    on_main(lambda: found.save(out / "concepts.safetensors"))
    strongest = find_strongest(model, labeled, layer, images, encode=found.encode)

    def draw_wall() -> None:
        shown = strongest.most_active(count, images)
        wall = plot_wall(model, labeled, strongest, shown, images, directions=found.encoder, noun="concept")
        save_figure(wall, outputs.claim("wall", ".png"))

    on_main(draw_wall)
    shares = class_shares(model, labeled, found, model.num_classes)
    on_main(lambda: save_shares(shares, names, out / "shares.csv"))
    decompose = partial(_explain, reader=reader, outputs=outputs, found=found, target=asked, top=top)
    for report in map_with_outputs(decompose, given, outputs):
        typer.echo(report)
    typer.echo(f"wrote {out}")


def _explain(
    path: Path, reader: "Explainer", outputs: "OutputPaths", found: "Concepts", target: int | None, top: int
) -> str:
    from ...concepts.decomposition import explain_concepts
    from ...concepts.figures import plot_decomposition
    from ...explanation.visualization import save_figure

    decomposition = explain_concepts(reader.model, reader.read(path).images, found, target, top=top)
    save_figure(plot_decomposition(decomposition, reader.class_names), outputs.claim(path.stem, ".png"))
    parts = zip(decomposition.strongest[0].tolist(), decomposition.pixels, strict=True)
    shares = ", ".join(f"concept {concept} {float(one.logit):+.3f}" for concept, one in parts)
    whole = decomposition.explanation
    return (
        f"{path}: {reader.class_names[int(whole.target)]}, logit {float(whole.logit):.3f}, of which {shares}   "
        f"completeness error {float(decomposition.completeness_error):.1e}"
    )
