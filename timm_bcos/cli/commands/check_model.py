"""`timm-bcos check`: whether a model's explanations are exact, and whether a conversion agrees with its original."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..exceptions import quiet_libraries
from ..options import DataOptions, ModelOptions, OptionalDataOptions, expand_groups

if TYPE_CHECKING:
    from ...explanation.exactness import ExactnessReport

__all__ = ["check"]

RANDOM_IMAGES = 16


@expand_groups
def check(
    model_options: ModelOptions,
    data_options: OptionalDataOptions,
    b: Annotated[
        float | None,
        typer.Option(min=1, help="Exponent B of the conversion of a timm model. (default: 2; with --against: 1)"),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image size in pixels. (default: the model's)")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare the logits with those of this original model, a timm name or a checkpoint, instead of "
            "checking the explanations."
        ),
    ] = None,
) -> None:
    """Check that a model's explanations are exact; if not, name the module that breaks exactness.

    A timm model is converted with B = 2 (or --b), without biases. Without a checkpoint the model is untrained:
    exactness depends on the architecture only.

    With --against, compare a conversion with its original on the images of --data-dir, or on 16 random images.
    A timm model is then converted so that it computes the same.
    """
    if against is not None:
        _compare(model_options, b, against, data_options if data_options.data_dir else None)
        return
    with quiet_libraries():
        model, is_trained = _load(model_options, b)
        report, side = _measure(model.eval().double(), size, is_trained)
    name = model_options.model or model_options.checkpoint or model.pretrained_cfg["architecture"]
    typer.echo(f"{name}: {'exact' if report.exact else 'not exact'} in float64, image of {side} pixels")
    typer.echo(f"  completeness error  {report.completeness_error:.1e}")
    typer.echo(f"  logit shift         {report.logit_shift:.1e}")
    typer.echo(f"  image share         {report.image_share:.3f}")
    if not report.exact:
        typer.echo(f"  breaks at           {report.breaks_at or 'no single module'}")
        for violation in report.violations:
            typer.echo(f"  violation           {violation}")
        raise typer.Exit(1)


def _compare(options: ModelOptions, b: float | None, against: str, data: DataOptions | None) -> None:
    """Print how closely a conversion agrees with its original."""
    from ...evaluation.comparison import agreement
    from ...models.loading import load_model, load_named

    _check_exponent(b)
    conversion: dict[str, Any] = {} if b is None else dict(b=b, bias=True)
    with quiet_libraries():
        model: Any = load_model(options.model, options.checkpoint, **conversion).eval()
        original: Any = load_named(against, options.model).eval()
        found = agreement(model, original, _batches(model, data))
    typer.echo(f"predictions agree on {found.same} of {found.images} images")
    typer.echo(f"largest relative difference of logits {found.difference:.1e}")
    if data is not None:
        for name, right in (("model", found.first_right), ("original", found.second_right)):
            typer.echo(f"{name:<9} top-1 {100 * right / found.images:.1f} % ({right} of {found.images})")


def _batches(model: Any, data: DataOptions | None) -> Any:
    """Images and labels of the data set, or random images, whose labels are not used."""
    import torch

    from ...data.datasets import image_batches

    if data is None:
        x = torch.rand(RANDOM_IMAGES, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        return [(x, torch.zeros(RANDOM_IMAGES))]
    labeled = data.load(model.num_classes)
    return ((x, y) for _, x, y in image_batches(model, labeled, range(len(labeled)), 32, "images"))


def _check_exponent(b: float | None) -> None:
    from ...errors import InputError

    if b is not None and not math.isfinite(b):
        raise InputError(f"--b {b}: give a number of at least 1")


def _load(options: ModelOptions, b: float | None) -> tuple[Any, bool]:
    """The model, and whether it is trained."""
    from ...models.loading import create_model, load_model

    _check_exponent(b)
    conversion = dict(bias=False) if b is None else dict(bias=False, b=b)
    if options.model is not None and options.checkpoint is None:
        return create_model(options.model, conversion), False
    return load_model(options.model, options.checkpoint, **conversion), True


def _measure(model: Any, size: int | None, is_trained: bool) -> tuple["ExactnessReport", int]:
    """The report and the image size."""
    from ...errors import BcosError, InputError
    from ...explanation.exactness import calibrate, check, random_image
    from ...files import first_line

    shape = model.pretrained_cfg.get("input_size", (3, 224, 224))
    x = random_image(model.in_chans, (size, size) if size else shape[-2:]).double()
    try:
        return check(model if is_trained else calibrate(model, x), x), x.shape[-1]
    except BcosError:
        raise
    except Exception as error:  # for instance a kernel larger than the image, or patches that do not divide it
        image = f"an image of {x.shape[-2]} × {x.shape[-1]} pixels"
        raise InputError(f"the model fails on {image}: {first_line(error)}; choose another --size") from error
