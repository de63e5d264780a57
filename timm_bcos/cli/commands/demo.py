"""`timm-bcos demo`: the demo in a browser."""

from typing import Annotated

import typer

from ..exceptions import quiet_libraries
from ..options import Classes, Device, ModelOptions, expand_groups

__all__ = ["demo"]


@expand_groups
def demo(
    model_options: ModelOptions,
    classes: Classes = None,
    device: Device = "cpu",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the demo. (default: the first free port from 7860)"),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve at a public address for a week, through Gradio's servers.")
    ] = False,
) -> None:
    """Start the demo app, which explains photos in the browser. Stop it with Ctrl-C.

    The demo offers the given model and the three embedded models.
    """
    from ...errors import InputError

    try:
        from ...demo.app import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise InputError("the demo needs Gradio: pip install 'timm_bcos[demo]'") from error
    from ..options import find_device

    with quiet_libraries():
        model, checkpoint = model_options.model, model_options.checkpoint
        launch(model, checkpoint, classes, port=port, share=share, device=find_device(device))
