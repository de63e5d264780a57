"""`timm-bcos convert`: convert a timm model to a B-cos model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..exceptions import quiet_libraries
from ..options import MODEL_PANEL, Checkpoint

__all__ = ["convert"]


def convert(
    model: Annotated[str | None, typer.Option(help="Name of a timm model.", rich_help_panel=MODEL_PANEL)] = None,
    checkpoint: Checkpoint = None,
    b: Annotated[
        float, typer.Option(min=1, help="Exponent B. With 1 and --bias the model computes the same as before.")
    ] = 2.0,
    bias: Annotated[bool, typer.Option(help="Keep biases, which explanations do not attribute to the image.")] = False,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Turn biases of batch norms with a built-in activation into reference biases; remove the others.",
        ),
    ] = False,
    positions: Annotated[
        Literal["keep", "attention"],
        typer.Option(
            help="Position embeddings of vision transformers: keep, or use in attention queries and keys only."
        ),
    ] = "keep",
    antialias: Annotated[
        bool,
        typer.Option(
            "--antialias", help="Add low-pass filters before strided layers, which removes checkerboard artifacts."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for config.json and model.safetensors.")] = Path("converted"),
) -> None:
    """Convert a model with its weights, and write a directory that timm loads as `local-dir:DIRECTORY`.

    Unless B is 1 and biases are kept, the converted model needs fine-tuning.
    """
    from ...errors import InputError
    from ...hub.repository import save_model
    from ...models.loading import load_model

    if model is None and checkpoint is None:
        raise InputError("no model given: name one with --model, or give a checkpoint of train.py with --checkpoint")
    if bias and reference:
        raise InputError("--bias adds biases and --reference does not: choose one of them")
    biases = "reference" if reference else bias
    with quiet_libraries():
        converted = load_model(model, checkpoint, b=b, bias=biases, positions=positions, antialias=antialias).eval()
        save_model(converted, out)
    typer.echo(f"wrote {out}: timm.create_model('local-dir:{out}', pretrained=True)")
