"""The command `timm-bcos`."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from . import __version__
from .check import check as measure
from .check import random_image, settle
from .checkpoints import load_weights, read_state_dict
from .errors import BcosError, CheckpointError, InputError, TargetError
from .explain import Explanation, explain_targets
from .render import save_image

app = typer.Typer(help="B-cos networks for timm: exact explanations.", no_args_is_help=True, add_completion=False)


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
    photos: Annotated[list[Path], typer.Argument(help="Image files, or directories of them.")],
    model: Annotated[
        str, typer.Option(help="A B-cos network, or a timm model, converted to one that computes the same.")
    ],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights, of the B-cos network or of the plain one.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Class name or index; repeat for several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Without a target: how many of the most probable classes.")] = 3,
    out: Annotated[Path, typer.Option(help="Directory for the pictures.")] = Path("explanations"),
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line; ImageNet's are built in.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
) -> None:
    """Explain what a network sees in photos: prints the classes and writes a figure and pictures per photo."""
    paths = list(_find_photos(photos))
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
    network = load_model(model, checkpoint, b=b, bias=False) if checkpoint else _untrained(model, b=b)
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
            x = self.transform(open_photo(path))[None].to(self.device)
        except InputError as error:
            self.failures.append(path)
            tqdm.write(f"{path}: {error}")
            return
        targets = None if self.targets is None else [self.targets]
        explanation = Explanation.stack(explain_targets(self.network, x, targets, top=self.top))
        self._report(path, explanation)
        self._save(path, explanation)

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

    def _free_stem(self, stem: str) -> str:
        """Photos of one name in several directories do not overwrite each other."""
        candidates = (stem if i == 1 else f"{stem}_{i}" for i in range(1, len(self.taken) + 2))
        free = next(c for c in candidates if c not in self.taken)
        self.taken.add(free)
        return free


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def _find_photos(given: Iterable[Path]) -> Iterator[Path]:
    endings = timm.data.get_img_extensions()
    for path in given:
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
        if not found:
            raise InputError(f"no photos in {path}: looked for {', '.join(sorted(endings))}")
        yield from found


def open_photo(path: Path) -> Image.Image:
    """Open a photo upright, in RGB.

    Raises:
        InputError: If it is missing, no image, or truncated.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError("no such file") from None
    except UnidentifiedImageError:
        raise InputError("not an image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"broken image ({error})") from error


def load_model(name: str, checkpoint: Path | None = None, **conversion: Any) -> Any:
    """A B-cos network by name, or a timm model, converted.

    Args:
        name: timm's.
        checkpoint: Weights of either; None for the published ones.
        conversion: `BcosConfig` fields for a timm model; by default it computes the same as before.

    Raises:
        CheckpointError: For weights that cannot be had or do not fit.
        TargetError: For a name that timm does not know.
    """
    arguments = _arguments(name, **(conversion or dict(b=1, bias=True)))
    if checkpoint is None:
        return _with_published_weights(name, arguments)
    weights = read_state_dict(checkpoint)
    classes = _count_classes(timm.create_model(**arguments, device="meta"), weights)
    network = timm.create_model(**arguments, **classes)
    load_weights(network, checkpoint)
    return network


def _untrained(name: str, **conversion: Any) -> Any:
    return timm.create_model(**_arguments(name, **conversion))


def _arguments(name: str, **conversion: Any) -> dict[str, Any]:
    """For `timm.create_model`."""
    if name.startswith(("bcos", "hf-hub:", "local-dir:")):
        return dict(model_name=name)
    if timm.is_model(name):
        return dict(model_name="bcosify", arch=name, **conversion)
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise TargetError(f"timm knows no model {name!r}; close names: {', '.join(near) or 'none'}")


def _with_published_weights(name: str, arguments: dict[str, Any]) -> Any:
    try:
        return timm.create_model(**arguments, pretrained=True)
    except Exception as error:  # timm, the Hub client and urllib each raise their own
        raise CheckpointError(
            f"no weights for {name}: {str(error).splitlines()[0]}; give a file with --checkpoint"
        ) from error


def _count_classes(network: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint may have been trained on other classes than the architecture's default."""
    head = network.get_classifier()
    name = next((n for n, m in network.named_modules() if m is head), "")
    found = weights.get(f"{name}.weight")
    if found is None:
        return {}
    rows = found.shape[0]
    is_plain = found.shape != head.weight.shape and found.ndim != head.weight.ndim
    return dict(num_classes=rows if is_plain else rows // getattr(head, "max_out", 1))


def class_names(network: Any, path: Path | None = None) -> list[str]:
    """Names of a network's classes: from a file, its cfg, or timm's ImageNet tables; numbers where there are none."""
    count = network.num_classes
    if path is not None:
        names = path.read_text().splitlines()
        if len(names) != count:
            raise InputError(f"{path} names {len(names)} classes, the model has {count}")
        return names
    labels = network.pretrained_cfg.get("label_names")
    if labels and len(labels) == count:
        return list(labels)
    if count == 1000:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(i).split(",")[0] for i in range(count)]
    return [f"class {i}" for i in range(count)]


def find_class(wanted: str, names: list[str], count: int) -> int:
    """The index of a class given by number, name, or a part of one name.

    Raises:
        TargetError: If there is none, or several.
    """
    if wanted.isdecimal():
        if int(wanted) < count:
            return int(wanted)
        raise TargetError(f"class {wanted}: the model has {count} classes, counted from 0")
    lower = [name.lower() for name in names]
    matches = [i for i, name in enumerate(lower) if name == wanted.lower()]
    matches = matches or [i for i, name in enumerate(lower) if wanted.lower() in name]
    if len(matches) == 1:
        return matches[0]
    near = [names[i] for i in matches[:5]] or difflib.get_close_matches(wanted.lower(), lower, n=3)
    problem = "several classes match" if matches else "no class is called"
    raise TargetError(f"{problem} {wanted!r}: {', '.join(near) or 'give its index'}")
