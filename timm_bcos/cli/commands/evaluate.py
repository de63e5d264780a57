"""`timm-bcos evaluate`: how good explanations are, by the pointing game and by metrics."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    Checkpoint,
    ClassMap,
    DataChoice,
    DataDir,
    Dataset,
    Device,
    Disconnect,
    Methods,
    Model,
    NetworkChoice,
    Plain,
    Split,
)

__all__ = ["metrics", "pointing_game"]

QUICK = (
    "bcos", "gradient", "ixg", "ig", "deeplift", "smoothgrad", "guided_backprop", "gradcam", "lrp", "chefer", "attnlrp",
)  # fmt: skip
ALL = (*QUICK, "attention_rollout", "occlusion", "lime", "rise")


def pointing_game(
    data_dir: DataDir,
    dataset: Dataset = "",
    split: Split = "validation",
    class_map: ClassMap = "",
    model: Model = None,
    checkpoint: Checkpoint = None,
    plain: Plain = False,
    device: Device = "cpu",
    method: Methods = None,
    n: Annotated[list[int] | None, typer.Option(min=1, help="Cells per side; repeat for several. 2 and 3.")] = None,
    grids: Annotated[int, typer.Option(min=1, help="Of each size.")] = 500,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Images that the network is less sure of are not taken.")
    ] = 0.5,
    reuse: Annotated[bool, typer.Option("--reuse", help="Use images again when a class has no more.")] = False,
    smooth: Annotated[
        list[int] | None, typer.Option(min=1, help="Window of a mean filter; repeat for several. 1 and 15.")
    ] = None,
    disconnect: Annotated[
        Disconnect,
        typer.Option(help="Logits for each cell: of a network of its own (full, DiFull) or of a head (part, DiPart)."),
    ] = Disconnect.NONE,
    seed: Annotated[int, typer.Option(help="Of the choice of classes.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Classes of a grid per pass. By default as many as fit into about 3 GB of memory."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the results; a run resumes there.")] = Path("pointing_game"),
) -> None:
    """Play the grid pointing game: how much of a class's attribution lies in the cell of its image?

    Writes values.csv, summary.csv, gains.csv (paired differences to the other methods), summary.md and boxes.png.
    Without --method, all that suit the network.
    """
    from ...attribution.registry import check_methods
    from ...evaluation.pointing_game import sample_grids
    from ...evaluation.pointing_results import play_all, read_confidences
    from ...evaluation.results import remember_settings

    methods = list(method or ALL)
    check_methods(methods)
    choice, data = NetworkChoice(model, checkpoint, plain), DataChoice(data_dir, dataset, split, class_map)
    network = choice.load(device)
    images = data.load(network.num_classes)
    settings = dict(reuse=reuse, seed=seed, threshold=threshold, disconnect=disconnect.value)
    remember_settings(out, vars(choice) | vars(data) | settings)
    found = read_confidences(network, images, out)
    right = sum(item.predicted == item.label for item in found)
    typer.echo(f"{right} of {len(found)} images are classified correctly")
    sample = partial(sample_grids, found, count=grids, threshold=threshold, seed=seed, reuse=reuse)
    samples = [sample(cells) for cells in n or (2, 3)]  # all of them before the first is played
    left_out = play_all(
        network, images, samples, methods, out, disconnect=disconnect.value, smooth=smooth or (1, 15),
        batch_size=batch_size,
    )  # fmt: skip
    _report(left_out, out / "summary.md")


def metrics(
    data_dir: DataDir,
    dataset: Dataset = "",
    split: Split = "validation",
    class_map: ClassMap = "",
    model: Model = None,
    checkpoint: Checkpoint = None,
    plain: Plain = False,
    device: Device = "cpu",
    method: Methods = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Repeat for several. All: deletion, insertion, faithfulness, …")
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(help="Where the objects are, for energy: a folder of masks, or a CSV file of boxes."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many, evenly spread over the data set.")] = 20,
    out: Annotated[Path, typer.Option(help="Directory for the results; a run resumes there.")] = Path("metrics"),
) -> None:
    """Measure deletion, insertion, faithfulness, sensitivity, randomization and more of attribution methods.

    Writes metrics.csv and metrics.md. Without --method, all quick ones that suit the network.
    """
    from ...attribution.registry import check_methods
    from ...errors import MethodError
    from ...evaluation.metrics import METRICS, NEEDING_MASKS, check_metrics, evaluate_all
    from ...evaluation.results import remember_settings

    suited = [name for name in METRICS if regions is not None or name not in NEEDING_MASKS]
    methods, measured = list(method or QUICK), list(metric or suited)
    check_methods(methods)
    check_metrics(measured)
    if lacking := [name for name in measured if name not in suited]:
        raise MethodError(f"{lacking[0]} needs --regions: where the objects are")
    choice, data = NetworkChoice(model, checkpoint, plain), DataChoice(data_dir, dataset, split, class_map)
    network = choice.load(device)
    labeled = data.load(network.num_classes)
    remember_settings(out, vars(choice) | vars(data) | dict(images=images, regions=regions))
    left_out = evaluate_all(network, labeled, measured, methods, out, images=images, regions=regions)
    _report(left_out, out / "metrics.md")


def _report(left_out: Sequence[str], table: Path) -> None:
    lines: Iterable[str] = (f"left out: {reason}" for reason in left_out)
    typer.echo("\n".join([*lines, table.read_text()]))
