"""`timm-bcos demo`: the page in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A B-cos network, or a timm model, converted to one that computes the same; offered before the two "
            "that come with the package."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights, of the B-cos network or of the plain one; train.py's say of which model."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line, or a directory of a directory per class.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Where to serve; if not given, the first free one from 7860 on."),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also at a public address for a week, through Gradio's servers.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
) -> None:
    """Serve a page on which photos are explained, until Ctrl-C.

    Example: timm-bcos demo --model bcosv2_resnet50 --port 8000
    """
    try:
        from ..page.app import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise InputError("the page needs Gradio: pip install 'timm_bcos[demo]'") from error
    from .devices import find_device
    from .failures import quiet_libraries

    with quiet_libraries():
        launch(model, checkpoint, classes, port=port, share=share, device=find_device(device))
