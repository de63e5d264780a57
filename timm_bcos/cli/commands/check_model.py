"""`timm-bcos check`: whether a network's explanations are exact."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..exceptions import quiet_libraries
from ..options import Checkpoint, Model, NetworkChoice

if TYPE_CHECKING:
    from ...explanation.exactness import ExactnessReport

__all__ = ["check"]


def check(
    model: Model = None,
    checkpoint: Checkpoint = None,
    b: Annotated[float | None, typer.Option(min=1, help="Exponent B of a conversion; 2 if not given.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Image size; the network's own if not given.")] = None,
) -> None:
    """Measure whether a network's explanations are exact, and if not, name the module that breaks them.

    A timm model is converted with B = 2 (or --b), without biases. Named without a checkpoint, a network is untrained:
    whether it is exact depends on its architecture.
    """
    with quiet_libraries():
        network, is_trained = _network(NetworkChoice(model, checkpoint), b)
        verdict, side = _measure(network.eval().double(), size, is_trained)
    name = model or checkpoint or network.pretrained_cfg["architecture"]
    typer.echo(f"{name}: {'exact' if verdict.exact else 'not exact'} in float64, image of {side} pixels")
    typer.echo(f"  completeness error  {verdict.completeness_error:.1e}")
    typer.echo(f"  logit shift         {verdict.logit_shift:.1e}")
    typer.echo(f"  image share         {verdict.image_share:.3f}")
    if not verdict.exact:
        typer.echo(f"  breaks at           {verdict.breaks_at or 'no single module'}")
        for violation in verdict.violations:
            typer.echo(f"  violation              {violation}")
        raise typer.Exit(1)


def _network(choice: NetworkChoice, b: float | None) -> tuple[Any, bool]:
    """The network, and whether it is trained."""
    from ...errors import InputError
    from ...models.loading import create_model, load_model

    if b is not None and not math.isfinite(b):
        raise InputError(f"--b {b}: give a number of at least 1")
    conversion = dict(bias=False) if b is None else dict(bias=False, b=b)
    if choice.model is not None and choice.checkpoint is None:
        return create_model(choice.model, conversion), False
    return load_model(choice.model, choice.checkpoint, **conversion), True


def _measure(network: Any, size: int | None, is_trained: bool) -> tuple["ExactnessReport", int]:
    """The verdict and the image's size."""
    from ...errors import BcosError, InputError
    from ...explanation.exactness import calibrate, check, random_image
    from ...files import first_line

    shape = network.pretrained_cfg.get("input_size", (3, 224, 224))
    x = random_image(network.in_chans, (size, size) if size else shape[-2:]).double()
    try:
        return check(network if is_trained else calibrate(network, x), x), x.shape[-1]
    except BcosError:
        raise
    except Exception as error:  # as kernels larger than an image, or images that patches do not divide
        place = f"an image of {x.shape[-2]} × {x.shape[-1]} pixels"
        raise InputError(f"the network fails on {place}: {first_line(error)}; choose another --size") from error
