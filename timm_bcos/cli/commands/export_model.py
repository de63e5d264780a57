"""`timm-bcos export`: a model for programs without timm."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..exceptions import quiet_libraries
from ..options import Device, ModelOptions, expand_groups

__all__ = ["export"]

SUFFIXES = (".pt2", ".onnx")


@expand_groups
def export(
    model_options: ModelOptions,
    device: Device = "cpu",
    out: Annotated[
        Path,
        typer.Option(help="File to write: NAME.pt2 for the model with explanations, NAME.onnx for the model alone."),
    ] = Path("explainer.pt2"),
) -> None:
    """Export a model as one program for torch.export (with its explanation) or ONNX (logits); any batch size.

    A .pt2 program takes images (N, C, H, W) in [0, 1] and classes (N,), -1 for the predicted one, and returns
    logits, weights and contribution map.
    """
    import torch

    from ...errors import InputError

    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: choose a format by its suffix, {' or '.join(SUFFIXES)}")
    with quiet_libraries():
        model = model_options.load(device)
        x = torch.rand(2, *model.pretrained_cfg["input_size"], device=device)
        (_export_program if out.suffix == ".pt2" else _export_onnx)(model, x, out)
    typer.echo(f"wrote {out}, for images of {x.shape[-2]} × {x.shape[-1]} pixels")


def _export_program(model: Any, x: Any, out: Path) -> None:
    import torch

    from ...explanation.export import export_explainer
    from ...files import atomic_path

    program = export_explainer(model, x)
    with atomic_path(out) as path:
        torch.export.save(program, path)


def _export_onnx(model: Any, x: Any, out: Path) -> None:
    import torch

    from ...errors import InputError
    from ...files import atomic_path

    batch = torch.export.Dim("batch", min=1)
    options: dict[str, Any] = dict(
        dynamo=True, dynamic_shapes=({0: batch},), output_names=["logits"], external_data=False, verbose=False
    )
    try:
        with atomic_path(out) as path:
            torch.onnx.export(model, (x,), path, **options)
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}: pip install 'timm_bcos[onnx]'") from error
