"""`timm-bcos explain`: photos and videos explained one after the other."""

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..exceptions import one_line, quiet_libraries, stop_if_interrupted
from ..options import Classes, Device, ModelOptions, expand_groups
from ..processes import map_with_outputs

if TYPE_CHECKING:
    from ..photo_writer import PhotoWriter

__all__ = ["explain"]


class Crop(str, Enum):
    """How photos that are not square are brought to the shape of the model's image."""

    CENTER, NONE, SQUASH = "center", "none", "squash"


@expand_groups
def explain(
    photos: Annotated[list[Path], typer.Argument(help="Image files, videos, or directories of images.")],
    model_options: ModelOptions,
    classes: Classes = None,
    device: Device = "cpu",
    target: Annotated[list[str] | None, typer.Option(help="Class to explain, by name or index; repeatable.")] = None,
    versus: Annotated[
        list[str] | None,
        typer.Option(help="Explain the target's logit minus this class's logit; repeatable, for the mean of several."),
    ] = None,
    crop: Annotated[
        Crop,
        typer.Option(
            help="Crop the center of photos (as the model's config says), or explain whole photos: padded to the shape "
            "of the model's image (none), or resized to it (squash)."
        ),
    ] = Crop.CENTER,
    shifts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Explain the mean over this many shifts in each direction, by 0, 1, ... pixels: smoother, slower.",
        ),
    ] = 1,
    top: Annotated[
        int, typer.Option(min=1, help="Number of most probable classes to explain if no target is given.")
    ] = 3,
    scale: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the cells over which overlays sum contributions, in pixels of the model's image; 1 for "
            "single pixels. With --html a power of two up to 32. (default: about 1/11 of the image's shorter side)",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the images.")] = Path("explanations"),
    html: Annotated[
        bool, typer.Option("--html", help="Write an interactive, self-contained HTML file per photo instead of images.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per photo and class instead of text.")
    ] = False,
) -> None:
    """Explain a model's predictions: print the classes and write a figure and images per photo.

    The images of a class are its explanation in color, and its contributions as an overlay at the photo's own size.
    """
    from ...data.photos import find_photos
    from ...explainer import Explainer
    from ...models.class_names import find_class
    from ...models.shift_averaged import ShiftAveraged
    from ..outputs import OutputPaths
    from ..photo_writer import PhotoWriter

    with quiet_libraries():
        given = list(find_photos(photos))
        outputs = OutputPaths(out, given)
        model: Any = model_options.load(device)
        model = ShiftAveraged(model, shifts).eval() if shifts > 1 else model
        explainer = Explainer(model, class_names=classes, crop=crop.value)
        names = explainer.class_names
        targets, against = (
            list(dict.fromkeys(find_class(t, names, len(names)) for t in several or ())) for several in (target, versus)
        )
        _refuse_overlap(targets, against, names)
        writer = PhotoWriter(explainer, outputs, targets, against, top, scale, html, as_json)
        paths = _without_own(given)
        failures = _write_all(writer, paths)
    if failures:
        typer.echo(f"{len(failures)} of {len(paths)} photos failed: {', '.join(map(str, failures))}", err=True)
        raise typer.Exit(1)


def _refuse_overlap(targets: Sequence[int], against: Sequence[int], names: Sequence[str]) -> None:
    from ...errors import TargetError

    both = [names[unit] for unit in targets if unit in against]
    if both:
        raise TargetError(f"{both[0]!r} is given as --target and as --versus: give two different classes")
    if len(against) >= len(names):
        raise TargetError("--versus names all classes: leave at least one out")


def _without_own(paths: Sequence[Path]) -> list[Path]:
    """Leave out files that this package wrote."""
    from ..outputs import is_own

    own = [path for path in paths if is_own(path)]
    if own:
        names = ", ".join([*map(str, own[:3]), *(["…"] if len(own) > 3 else [])])
        typer.echo(f"left out {len(own)} files that timm-bcos wrote: {names}", err=True)
    return [path for path in paths if path not in own]


def _write_all(writer: "PhotoWriter", paths: Sequence[Path]) -> list[Path]:
    """Explain all photos; failures are reported, and the remaining photos are explained."""
    from tqdm import tqdm

    def attempt(path: Path) -> tuple[str, bool]:
        stop_if_interrupted()
        try:
            return writer.write(path), True
        except Exception as error:
            message = one_line(error)
            return message if message.startswith(str(path)) else f"{path}: {message}", False

    failures = []
    reports = map_with_outputs(attempt, paths, writer.outputs)
    progress = tqdm(reports, total=len(paths), unit="photo", disable=True if len(paths) < 2 else None)
    for path, (report, is_explained) in zip(paths, progress, strict=True):
        failures += [] if is_explained else [path]
        tqdm.write(report, None if is_explained or not writer.as_json else sys.stderr)
    return failures
