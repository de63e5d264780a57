"""The command `timm-bcos`."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tqdm import tqdm

from .. import __version__
from ..data.photos import find_photos, open_photo
from ..errors import BcosError, InputError
from ..explaining.checking import check as measure
from ..explaining.checking import random_image, settle
from ..explaining.explanation import Explanation
from ..explaining.films import VIDEO_SUFFIXES, explain_video
from ..explaining.forward import explain_targets
from ..explaining.pictures import save_image
from ..models.classes import class_names, find_class
from ..models.loading import create_model, load_model
from .autoload import autoload_file, disable_autoload, enable_autoload
from .run import run_script

app = typer.Typer(
    help="B-cos networks for timm: exact explanations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point; errors that we raise on purpose are one line, without a traceback."""
    try:
        app()
    except BcosError as error:
        typer.echo(f"timm-bcos: {error}", err=True)
        raise SystemExit(2) from error


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
    paths = list(find_photos(photos))
    network = load_model(model, checkpoint).eval().to(device)
    names = class_names(network, classes)
    targets = [find_class(t, names, network.num_classes) for t in target] if target else None
    job = _Explainer(network, names, targets, top, out)
    for path in tqdm(paths, unit="photo", disable=len(paths) < 2):
        job.run(path)
    if job.failures:
        typer.echo(f"{len(job.failures)} of {len(paths)} photos failed: {', '.join(map(str, job.failures))}", err=True)
        raise typer.Exit(1)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A B-cos network, or a timm model, which is converted.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; without them the network is untrained.")] = None,
    b: Annotated[float, typer.Option(help="Exponent B of a conversion.")] = 2.0,
    size: Annotated[int | None, typer.Option(help="Image size; the network's own if not given.")] = None,
) -> None:
    """Measure whether a network's explanations are exact, and if not, name the module that breaks them."""
    conversion = dict(b=b, bias=False)
    network = load_model(model, checkpoint, **conversion) if checkpoint else create_model(model, conversion)
    network = network.eval().double()
    shape = network.pretrained_cfg.get("input_size", (3, 224, 224))
    x = random_image(network.in_chans, (size, size) if size else shape[-2:]).double()
    verdict = measure(network if checkpoint else settle(network, x), x)
    typer.echo(f"{model}: {'exact' if verdict.exact else 'not exact'} in float64, image of {x.shape[-1]} pixels")
    typer.echo(f"  completeness error  {verdict.completeness_error:.1e}")
    typer.echo(f"  logit shift         {verdict.logit_shift:.1e}")
    typer.echo(f"  image share         {verdict.image_share:.3f}")
    if not verdict.exact:
        typer.echo(f"  breaks at           {verdict.breaks_at or 'no single module'}")
        raise typer.Exit(1)


@app.command(context_settings=dict(allow_interspersed_args=False, ignore_unknown_options=True))
def run(
    script: Annotated[Path, typer.Argument(help="A script of timm's: train.py, validate.py, inference.py, ...")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
) -> None:
    """Run a script of timm's, unchanged, with the B-cos networks registered."""
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


@dataclass
class _Explainer:
    """Explains one photo after the other; a broken one is reported and the others go on."""

    network: Any
    names: list[str]
    targets: list[int] | None
    top: int
    out: Path
    failures: list[Path] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        cfg = timm.data.resolve_model_data_config(self.network)
        self.transform = timm.data.create_transform(**cfg, is_training=False)
        self.device = next(self.network.parameters()).device
        self.top = min(self.top, self.network.num_classes)

    def run(self, path: Path) -> None:
        try:
            if path.suffix.lower() in VIDEO_SUFFIXES:
                return self._run_video(path)
            x = self.transform(open_photo(path))[None].to(self.device)
        except InputError as error:
            self.failures.append(path)
            tqdm.write(f"{path}: {error}")
            return None
        targets = None if self.targets is None else [self.targets]
        explanation = Explanation.stack(explain_targets(self.network, x, targets, top=self.top))
        self._report(path, explanation)
        self._save(path, explanation)
        return None

    def _run_video(self, path: Path) -> None:
        """A film of the explanations beside the film; of one class, as films have no room for several."""
        target = self.targets[0] if self.targets else None
        film = self._free_stem(path.stem, path.suffix) + path.suffix
        frames = explain_video(self.network, path, self.out / film, target)
        tqdm.write(str(path))
        for c, count in frames.most_common(self.top):
            tqdm.write(f"  {self.names[c]:<32.32} {count} frames")

    def _report(self, path: Path, explanation: Explanation) -> None:
        probability = explanation.probability.gather(1, explanation.target[:, None])[:, 0]
        rows = zip(explanation.target.tolist(), probability, explanation.completeness_error, strict=True)
        tqdm.write(str(path))
        for c, p, error in rows:
            tqdm.write(f"  {self.names[c]:<32.32} probability {p:6.4f}   completeness error {error:.1e}")

    def _save(self, path: Path, explanation: Explanation) -> None:
        stem = self._free_stem(path.stem)
        explanation.save(self.out / f"{stem}.png", self.names)
        for picture, c in zip(explanation.to_rgba(), explanation.target.tolist(), strict=True):
            save_image(picture, self.out / f"{stem}_{_slug(self.names[c])}.png")

    def _free_stem(self, stem: str, suffix: str = ".png") -> str:
        """Photos of one name in several directories do not overwrite each other."""
        candidates = (stem if i == 1 else f"{stem}_{i}" for i in range(1, len(self.taken) + 2))
        free = next(c for c in candidates if c + suffix not in self.taken)
        self.taken.add(free + suffix)
        return free


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
