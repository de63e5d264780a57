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
    """List the B-cos models: name and tag, parameters in millions, published top-1 in percent, image size in pixels.

    An image size such as 256 → 224 means: resize the shorter side to 256 pixels, then crop 224.

    Other timm models become B-cos models with `timm-bcos convert`, or in Python with `bcosify`.
    """
    from ...errors import TargetError
    from ...models.loading import list_bcos_models

    is_empty = True
    for model in list_bcos_models(pattern, pretrained=pretrained):
        if is_empty:
            typer.echo(HEADER.rstrip())
            is_empty = False
        typer.echo(_row(model))
    if is_empty:
        raise TargetError(f"no model is called {pattern!r}: `timm-bcos models` lists all models")


def _row(model: "Listed") -> str:
    image = f"{model.resize} → {model.size}" if model.resize else str(model.size)
    parameters, top1 = f"{model.parameters:.1f}", str(model.top1 or "")
    return ROW.format(model.tagged_name, parameters, top1, image, model.note).rstrip()
