"""`timm-bcos evaluate`: the pointing game, AggAtt, metrics of explanations, and comparisons of accuracy."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import (
    AnyModelOptions,
    DataOptions,
    Device,
    DisconnectMode,
    DisconnectOption,
    Methods,
    Reuse,
    Seed,
    chosen_methods,
    expand_groups,
    find_device,
    method_option,
)

__all__ = ["aggatt", "compare", "metrics", "pointing_game"]

QUICK = (
    "bcos", "gradient", "input_x_gradient", "integrated_gradients", "deeplift", "smoothgrad", "guided_backprop",
    "gradcam", "lrp", "chefer", "attnlrp",
)  # fmt: skip
ALL = (*QUICK, "attention_rollout", "occlusion", "lime", "rise")
SHOWN = ("bcos", "input_x_gradient", "gradcam")


@expand_groups
def pointing_game(
    data_options: DataOptions,
    model_options: AnyModelOptions,
    device: Device = "cpu",
    method: Methods = None,
    n: Annotated[
        list[int] | None, typer.Option("--cells", "--n", min=1, help="Cells per side; repeatable. (default: 2, 3)")
    ] = None,
    grids: Annotated[int, typer.Option(min=1, help="Number of grids per grid size.")] = 500,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum confidence for an image to be used in a grid.")
    ] = 0.5,
    reuse: Reuse = False,
    smooth: Annotated[
        list[int] | None, typer.Option(min=1, help="Window of the mean filter in pixels; repeatable. (default: 1, 15)")
    ] = None,
    scale: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Side of the square cells, in pixels, that maps are summed over before negative sums "
            "are set to 0; repeatable. (default: 1)",
        ),
    ] = None,
    disconnect: DisconnectOption = DisconnectMode.NONE,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of classes per pass. (default: as many as fit into about 3 GB of memory)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results; a run resumes there.")] = Path("pointing_game"),
) -> None:
    """Play the grid pointing game: measure how much attribution of a class lies in its own cell.

    Writes values.csv, summary.csv, gains.csv (paired differences to the other methods), summary.md and boxes.png.
    """
    from ...distributed import on_main
    from ...evaluation.pointing_game import sample_grids
    from ...evaluation.pointing_results import play_all, read_confidences
    from ...evaluation.results import remember_settings

    methods = chosen_methods(method, ALL)
    model = model_options.load(device)
    images = data_options.load(model.num_classes)
    on_main(lambda: remember_settings(out, vars(model_options) | vars(data_options)))
    found = read_confidences(model, images, out)
    right = sum(item.predicted == item.label for item in found)
    typer.echo(f"{right} of {len(found)} images are classified correctly")
    sample = partial(sample_grids, found, count=grids, threshold=threshold, seed=seed, reuse=reuse)
    samples = [sample(cells) for cells in n or (2, 3)]  # all at once: a lack of images shows before the first game
    settings = dict(reuse=reuse, seed=seed, threshold=threshold, disconnect=disconnect.value)
    on_main(lambda: remember_settings(out, settings, "values.csv"))
    left_out = play_all(
        model, images, samples, methods, out, disconnect=disconnect.value, smooth=smooth or (1, 15),
        scale=scale or (1,), batch_size=batch_size,
    )  # fmt: skip
    _report(left_out, out / "summary.md")


@expand_groups
def metrics(
    data_options: DataOptions,
    model_options: AnyModelOptions,
    device: Device = "cpu",
    method: Annotated[
        list[str] | None, method_option(f"all fast ones that support the model: {', '.join(QUICK)}")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric to compute, for instance deletion; repeatable. (default: all; energy only with --regions)"
        ),
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="Object regions for the metric energy: a directory of masks, or a CSV file of boxes."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images, evenly spread over the data set.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for the results; a run resumes there.")] = Path("metrics"),
) -> None:
    """Measure deletion, insertion, faithfulness, sensitivity, randomization and more of attribution methods.

    Writes metrics.csv and metrics.md.
    """
    from ...distributed import on_main
    from ...errors import MethodError
    from ...evaluation.metric_results import evaluate_all
    from ...evaluation.metrics import METRICS, NEEDING_MASKS, check_metrics
    from ...evaluation.results import remember_settings

    suited = [name for name in METRICS if regions is not None or name not in NEEDING_MASKS]
    methods, measured = chosen_methods(method, QUICK), list(metric or suited)
    check_metrics(measured)
    if lacking := [name for name in measured if name not in suited]:
        raise MethodError(f"{lacking[0]} needs the regions of the objects: give --regions")
    model = model_options.load(device)
    labeled = data_options.load(model.num_classes)
    settings = vars(model_options) | vars(data_options) | dict(images=images, regions=regions)
    on_main(lambda: remember_settings(out, settings, "metrics.csv"))
    left_out = evaluate_all(model, labeled, measured, methods, out, images=images, regions=regions)
    _report(left_out, out / "metrics.md")


@expand_groups
def aggatt(
    data_options: DataOptions,
    model_options: AnyModelOptions,
    device: Device = "cpu",
    method: Annotated[list[str] | None, method_option(", ".join(SHOWN))] = None,
    n: Annotated[int, typer.Option("--cells", "--n", min=1, help="Cells per side of the grids.")] = 2,
    grids: Annotated[int, typer.Option(min=1, help="Number of grids.")] = 100,
    smooth: Annotated[int, typer.Option(min=1, help="Window of the mean filter in pixels; 1 for no smoothing.")] = 15,
    disconnect: DisconnectOption = DisconnectMode.NONE,
    reuse: Reuse = False,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("aggatt.png"),
) -> None:
    """Plot mean attribution maps of pointing-game grids, from the best localized to the worst (AggAtt)."""
    from ...distributed import on_main
    from ...evaluation.aggatt import plot_aggatt
    from ...evaluation.pointing_game import Disconnected, confidences, sample_grids
    from ...explanation.visualization import save_figure

    methods = chosen_methods(method, SHOWN)
    model = model_options.load(device)
    images = data_options.load(model.num_classes)
    chosen = sample_grids(list(confidences(model, images)), n, grids, seed=seed, reuse=reuse)
    player = model if disconnect is DisconnectMode.NONE else Disconnected(model, n, disconnect.value)
    figure, left_out = plot_aggatt(player, images, chosen, methods, smooth)
    on_main(lambda: save_figure(figure, out))
    typer.echo("\n".join([*(f"left out: {reason}" for reason in left_out), f"wrote {out}"]))


@expand_groups
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models to compare with the first one: checkpoints of train.py or timm names, or NAME=MODEL. "
            "Models of the same NAME count as seeds of one training.",
        ),
    ],
    data_options: DataOptions,
    device: Device = "cpu",
    contributors: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns file and contributor. By default images whose names differ only in the "
            "number behind the last underscore form a cluster."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("comparison"),
) -> None:
    """Compare the accuracies of models on the same images, with 95 % intervals from a bootstrap over clusters.

    Writes comparison.csv (a row per model), clusters.csv (accuracy by cluster) and images.csv (correct predictions).
    """
    from ...data.datasets import image_names
    from ...distributed import on_main
    from ...evaluation import comparison

    loaded = _named_models(models)
    first = loaded[0][1]()
    images: Any = data_options.load(first.num_classes)
    names = image_names(images)
    clusters = comparison.contributors(contributors, names) if contributors else comparison.series(names)
    right: dict[str, list[Any]] = {}
    for position, (name, load) in enumerate(loaded):
        model = first if position == 0 else load()
        right.setdefault(name, []).append(comparison.correct(model.eval().to(find_device(device)), images))

    def write() -> None:
        comparison.write_table(out / "comparison.csv", comparison.compare(right, clusters))
        comparison.write_clusters(out / "clusters.csv", right, clusters)
        comparison.write_images(out / "images.csv", names, clusters, right)

    on_main(write)
    typer.echo(comparison.report(right, clusters))


def _named_models(arguments: Sequence[str]) -> list[tuple[str, Callable[[], Any]]]:
    """The name of each model and a function that loads it."""
    from ...errors import InputError
    from ...models.loading import load_named

    found: list[tuple[str, Callable[[], Any]]] = []
    for argument in arguments:
        name, equals, choice = argument.partition("=")
        if equals and not (name and choice):
            raise InputError(f"{argument!r}: give a model as NAME=CHECKPOINT, or a checkpoint or timm name alone")
        found.append((name, partial(load_named, choice or name)))
    if len({name for name, _ in found}) < 2:
        raise InputError(f"one model only ({found[0][0]}): give at least two, as plain=a.pth.tar bcos=b.pth.tar")
    return found


def _report(left_out: Sequence[str], table: Path) -> None:
    from ...distributed import on_main

    lines: Iterable[str] = (f"left out: {reason}" for reason in left_out)
    typer.echo("\n".join([*lines, on_main(table.read_text)]))
