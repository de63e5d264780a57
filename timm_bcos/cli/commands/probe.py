"""`timm-bcos probe`: a classifier for one's own classes, from photos in a folder per class."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..exceptions import quiet_libraries
from ..options import Device, ModelOptions, expand_groups

if TYPE_CHECKING:
    from ...data.class_folders import ClassFolders
    from ...training.probe_result import ProbeResult

__all__ = ["probe"]

SHOWN = 6  # photos of each class in its figure


@expand_groups
def probe(
    photos: Annotated[
        Path,
        typer.Argument(help="Directory with a folder per class, or with folders train and validation that have these."),
    ],
    model_options: ModelOptions,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Directory for the new model.")] = Path("probe"),
    cache: Annotated[
        Path | None,
        typer.Option(help="Directory of cached features. (default: timm_bcos/features in the cache of torch.hub)"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of photos per batch.")] = 16,
    seed: Annotated[int, typer.Option(help="Random seed of the folds of cross-validation.")] = 0,
) -> None:
    """Fit a classifier for your own classes on the features of a B-cos model, from 5 photos per class on.

    The new model is explained exactly, like the model it comes from. It is written to --out, with a figure per class of
    what speaks for the class, and loaded with --model local-dir:DIRECTORY.

    The accuracy is measured on the folder `validation`, or else by cross-validation.
    """
    import warnings

    import torch

    from ...data.class_folders import read_splits
    from ...distributed import on_main
    from ...hub.repository import save_model
    from ...training.probe import fit_probe

    _refuse_inside(out, photos)
    with quiet_libraries():
        train, validation = read_splits(photos)
        store = cache or Path(torch.hub.get_dir()) / "timm_bcos" / "features"
        backbone = model_options.load(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they are in the result
            model, result = fit_probe(backbone, train, validation, cache=store, batch_size=batch_size, seed=seed)
        for remark in result.warnings:
            typer.echo(f"warning: {remark}", err=True)
        typer.echo(_counts(result))
        typer.echo(str(result))

        def write() -> int:
            save_model(model, out, label_names=list(result.class_names))
            _write_report(out, result)
            return _write_figures(out, model, result, validation or train)

        figures = on_main(write)
    typer.echo(f"wrote {out}, with {figures} figures of what speaks for each class: class_*.png")
    typer.echo(f"next: timm-bcos explain PHOTO --model local-dir:{out}, or timm-bcos demo --model local-dir:{out}")


def _refuse_inside(out: Path, photos: Path) -> None:
    """Refuse to write among the photos, where the next run would take the model for a class."""
    from ...errors import InputError

    if out.resolve() == photos.resolve() or photos.resolve() in out.resolve().parents:
        raise InputError(f"--out {out} lies in {photos}: choose a directory outside of the photos")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is not a directory")


def _counts(result: "ProbeResult") -> str:
    counts = zip(result.class_names, result.training_counts, strict=True)
    shown = ", ".join(f"{name} {count}" for name, count in counts)
    return f"{sum(result.training_counts)} training photos of {len(result.class_names)} classes: {shown}"


def _write_report(out: Path, result: "ProbeResult") -> None:
    import json

    from ...files import atomic_path

    with atomic_path(out / "probe.json") as path:
        path.write_text(json.dumps(result.summary(), indent=2), encoding="utf-8")


def _write_figures(out: Path, model: Any, result: "ProbeResult", photos: "ClassFolders") -> int:
    """Write a figure per class with its most confident photos, and return how many there are."""
    import torch

    from ...data.datasets import image_loader
    from ...evaluation.contact_sheet import plot_class
    from ...explanation.visualization import save_figure
    from ..outputs import slug

    load, device, written = image_loader(model, photos), next(model.parameters()).device, 0
    for old in out.glob("class_*.png"):
        old.unlink()
    for label, name in enumerate(result.class_names):
        rows = result.most_confident(label, SHOWN)
        if rows:
            x = torch.stack([load(result.indices[row])[0] for row in rows]).to(device)
            probabilities = result.probability[rows, label].tolist()
            figure = plot_class(model, x, label, name, probabilities)
            save_figure(figure, out / f"class_{label:03}_{slug(name)[:100]}.png")
            written += 1
    return written
