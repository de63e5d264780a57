"""`timm-bcos publish`: publish a trained model on the Hugging Face Hub, with a demo."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..options import Checkpoint, Classes, Model, NetworkChoice

__all__ = ["publish"]

Photos = Annotated[list[Path] | None, typer.Option("--photo", help="Photo to explain on the model card; repeatable.")]


def publish(
    repo_id: Annotated[
        str,
        typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face Hub, created if it does not exist."),
    ],
    model: Model = None,
    checkpoint: Checkpoint = None,
    classes: Classes = None,
    photo: Photos = None,
    description: Annotated[str, typer.Option(help="Training data, initial weights and procedure.")] = "",
    accuracy: Annotated[float | None, typer.Option(min=0, max=100, help="Top-1 accuracy in percent.")] = None,
    dataset: Annotated[str, typer.Option(help="Data set of the accuracy.")] = "",
    command: Annotated[str, typer.Option(help="Command that produced the accuracy.")] = "",
    trained_on: Annotated[
        list[str] | None,
        typer.Option(help="Training data set by its name on the Hub, for instance imagenet-1k; repeatable."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Repository ORG/NAME of the initial weights. (default: as recorded by train.py)")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="License by its name on the Hub. (default: the license of published weights, or apache-2.0)"),
    ] = None,
    note: Annotated[list[str] | None, typer.Option(help="Additional license terms; repeatable.")] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16"] | None, typer.Option(help="Data type of the saved weights.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Directory to write the files to instead of publishing them.")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Also publish a Space ORG/NAME that runs `timm-bcos demo`.")
    ] = False,
) -> None:
    """Publish a model on the Hugging Face Hub: weights, config, a model card, and with --space a demo.

    After `import timm_bcos`, `timm.create_model("hf-hub:ORG/NAME", pretrained=True)` has it.

    With --folder, the Space's files are in its subfolder `space`.
    """
    import torch

    from ...hub.card import Card, Evaluation, find_base_model
    from ...hub.repository import publish as publish_network
    from ...hub.repository import save_repository
    from ...hub.space import publish_space, save_space
    from ...models.class_names import read_class_names

    _refuse_half_an_accuracy(accuracy, dataset, command)
    network = NetworkChoice(model, checkpoint).load()
    terms = network.pretrained_cfg if checkpoint is None else {}  # of the published weights
    license = license or terms.get("license") or "apache-2.0"
    card = Card(
        description,
        None if accuracy is None else Evaluation(accuracy, dataset, command),
        license,
        note or terms.get("notes") or (),
        photo or (),
        trained_on or (),
        base_model or find_base_model(model, checkpoint),
    )
    labels = read_class_names(classes, network.num_classes) if classes else None
    precision = getattr(torch, dtype) if dtype else None
    photos = photo or ()
    if folder:
        save_repository(network, folder, repo_id, card, label_names=labels, dtype=precision)
        if space:
            save_space(folder / "space", repo_id, repo_id, photos=photos, license=license)
        typer.echo(f"wrote {folder}")
        return
    typer.echo(publish_network(network, repo_id, card, label_names=labels, dtype=precision, private=private))
    if space:
        typer.echo(publish_space(repo_id, repo_id, photos=photos, license=license, private=private))


def _refuse_half_an_accuracy(accuracy: float | None, dataset: str, command: str) -> None:
    from ...errors import InputError

    if accuracy is None and (dataset or command):
        raise InputError(f"--{'dataset' if dataset else 'command'} without a figure: give --accuracy too")
    if accuracy is not None and not dataset:
        raise InputError("--accuracy alone says little: give --dataset too, what it was measured on")
