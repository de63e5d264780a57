"""The command `timm-bcos`."""

import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tqdm import tqdm

from .. import __version__
from ..data.photos import find_photos
from ..errors import BcosError, InputError
from ..explaining.checking import Check, random_image, settle
from ..explaining.checking import check as measure
from ..files import first_line
from ..models.classes import class_names, find_class
from ..models.loading import create_model, load_model
from .autoload import autoload_file, disable_autoload, enable_autoload
from .devices import find_device
from .failures import as_python_does, exit_status, one_line, quiet_libraries, stop_if_interrupted
from .outputs import Outputs, is_own
from .photos import PhotoExplainer
from .run import run_script

app = typer.Typer(
    help="B-cos networks for timm: exact explanations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point; errors are one line, without a traceback."""
    raise SystemExit(exit_status(app))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"timm-bcos {__version__}, timm {timm.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """B-cos networks for timm: exact explanations."""


@app.command()
def explain(
    photos: Annotated[list[Path], typer.Argument(help="Image files or films, or directories of images.")],
    model: Annotated[
        str | None, typer.Option(help="A B-cos network, or a timm model, converted to one that computes the same.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Weights, of the B-cos network or of the plain one; train.py's say of which model. Without a model "
            "either, a network for clothes that comes with the package."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Class name or index; repeat for several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Without a target: how many of the most probable classes.")] = 3,
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("explanations"),
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line, or a directory of a directory per class.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
) -> None:
    """Explain what a network sees in photos: prints the classes and writes a figure and pictures per photo."""
    with quiet_libraries():
        given = list(find_photos(photos))
        outputs = Outputs(out, given)
        place = find_device(device)
        network = load_model(model, checkpoint).eval().to(place)
        names = class_names(network, classes)
        targets = [find_class(t, names, network.num_classes) for t in dict.fromkeys(target)] if target else None
        explainer = PhotoExplainer(network, names, targets and list(dict.fromkeys(targets)), top, outputs)
        paths = _without_own(given)
        failures = _explain_all(explainer, paths)
    if failures:
        typer.echo(f"{len(failures)} of {len(paths)} photos failed: {', '.join(map(str, failures))}", err=True)
        raise typer.Exit(1)


def _without_own(paths: Sequence[Path]) -> list[Path]:
    """Explanations are not explained."""
    own = [path for path in paths if is_own(path)]
    if own:
        names = ", ".join([*map(str, own[:3]), *(["…"] if len(own) > 3 else [])])
        typer.echo(f"left out {len(own)} that timm-bcos made: {names}", err=True)
    return [path for path in paths if path not in own]


def _explain_all(explainer: PhotoExplainer, paths: Sequence[Path]) -> list[Path]:
    """One photo after the other; one that fails, in whatever way, is reported and the others go on."""
    failures = []
    for path in tqdm(paths, unit="photo", disable=True if len(paths) < 2 else None):
        stop_if_interrupted()
        try:
            report = explainer.explain(path)
        except Exception as error:
            failures.append(path)
            report = f"{path}: {one_line(error)}"
        tqdm.write(report)
    return failures


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A B-cos network, or a timm model, which is converted.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; without them the network is untrained.")] = None,
    b: Annotated[float | None, typer.Option(min=1, help="Exponent B of a conversion; 2 if not given.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image size; the network's own if not given.")] = None,
) -> None:
    """Measure whether a network's explanations are exact, and if not, name the module that breaks them."""
    if b is not None and not math.isfinite(b):
        raise InputError(f"--b {b}: give a number of at least 1")
    conversion = dict(bias=False) if b is None else dict(bias=False, b=b)
    with quiet_libraries():
        network = load_model(model, checkpoint, **conversion) if checkpoint else create_model(model, conversion)
        verdict, side = _measure(network.eval().double(), size, is_trained=checkpoint is not None)
    typer.echo(f"{model}: {'exact' if verdict.exact else 'not exact'} in float64, image of {side} pixels")
    typer.echo(f"  completeness error  {verdict.completeness_error:.1e}")
    typer.echo(f"  logit shift         {verdict.logit_shift:.1e}")
    typer.echo(f"  image share         {verdict.image_share:.3f}")
    if not verdict.exact:
        typer.echo(f"  breaks at           {verdict.breaks_at or 'no single module'}")
        raise typer.Exit(1)


def _measure(network: Any, size: int | None, is_trained: bool) -> tuple[Check, int]:
    """The verdict and the image's size."""
    shape = network.pretrained_cfg.get("input_size", (3, 224, 224))
    x = random_image(network.in_chans, (size, size) if size else shape[-2:]).double()
    try:
        return measure(network if is_trained else settle(network, x), x), x.shape[-1]
    except BcosError:
        raise
    except Exception as error:  # as kernels larger than an image, or images that patches do not divide
        place = f"an image of {x.shape[-2]} × {x.shape[-1]} pixels"
        raise InputError(f"the network fails on {place}: {first_line(error)}; choose another --size") from error


@app.command(context_settings=dict(allow_interspersed_args=False, ignore_unknown_options=True))
def run(
    script: Annotated[Path, typer.Argument(help="A script of timm's: train.py, validate.py, inference.py, ...")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
) -> None:
    """Run a script of timm's, unchanged, with the B-cos networks registered."""
    with as_python_does():
        run_script(script, arguments or [])


class Switch(str, Enum):
    """What `autoload` does."""

    ON, OFF, STATUS = "on", "off", "status"


@app.command()
def autoload(switch: Annotated[Switch, typer.Argument(help="on, off or status")] = Switch.STATUS) -> None:
    """Make every `import timm` of this Python find the B-cos networks, or no longer."""
    if switch is Switch.ON:
        enable_autoload()
    elif switch is Switch.OFF:
        disable_autoload()
    state = "on" if autoload_file().exists() else "off"
    typer.echo(f"autoload is {state} ({autoload_file()})")
