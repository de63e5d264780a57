"""`timm-bcos models`: the registered models."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ...models.loading import Listed

__all__ = ["models"]

ROW = "{:<45} {:>10} {:>9} {:>10}  {}"
HEADER = ROW.format("name", "params (M)", "top-1 (%)", "image (px)", "")


def models(
    pattern: Annotated[str, typer.Argument(help="Pattern of model names with * and ?, as in timm.list_models.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="List only models with pretrained weights.")] = False,
) -> None:
    """List the B-cos models: name and tag, parameters in millions, published top-1 in per cent, image size in pixels.

    Any other timm model becomes a B-cos model by `timm-bcos convert`, or by the name `bcosify`.
    """
    from ...errors import TargetError
    from ...models.loading import list_bcos_models

    is_empty = True
    for network in list_bcos_models(pattern, pretrained=pretrained):
        if is_empty:
            typer.echo(HEADER.rstrip())
            is_empty = False
        typer.echo(_row(network))
    if is_empty:
        raise TargetError(f"no network is called {pattern!r}: `timm-bcos models` lists all, 'bcosv2_*' a family")


def _row(network: "Listed") -> str:
    image = f"{network.resize} → {network.size}" if network.resize else str(network.size)
    parameters, top1 = f"{network.parameters:.1f}", str(network.top1 or "")
    return ROW.format(network.tagged_name, parameters, top1, image, network.note).rstrip()
