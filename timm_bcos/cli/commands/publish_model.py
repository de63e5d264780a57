"""`timm-bcos publish`: publish a trained model on the Hugging Face Hub, with a demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..options import Classes, ModelOptions, expand_groups

if TYPE_CHECKING:
    from ...hub.card import Card, Evaluation

__all__ = ["publish"]


@dataclass(frozen=True)
class AccuracyOptions:
    """An accuracy to state on the model card."""

    accuracy: Annotated[float | None, typer.Option(min=0, max=100, help="Top-1 accuracy in percent.")] = None
    dataset: Annotated[str, typer.Option(help="Data set of the accuracy.")] = ""
    command: Annotated[str, typer.Option(help="Command that produced the accuracy.")] = ""

    def evaluation(self) -> "Evaluation | None":
        """The accuracy for the card, if one is given.

        Raises:
            InputError: If the accuracy or its data set is missing.
        """
        from ...errors import InputError
        from ...hub.card import Evaluation

        if self.accuracy is None:
            if self.dataset or self.command:
                raise InputError(f"--{'dataset' if self.dataset else 'command'} without --accuracy: give both")
            return None
        if not self.dataset:
            raise InputError("--accuracy without --dataset: name the data set that it was measured on")
        return Evaluation(self.accuracy, self.dataset, self.command)


@dataclass(frozen=True)
class CardOptions:
    """The other contents of the model card."""

    photo: Annotated[
        list[Path] | None, typer.Option("--photo", help="Photo to explain on the model card; repeatable.")
    ] = None
    description: Annotated[str, typer.Option(help="Training data, initial weights and procedure.")] = ""
    trained_on: Annotated[
        list[str] | None,
        typer.Option(help="Training data set by its name on the Hub, for instance imagenet-1k; repeatable."),
    ] = None
    base_model: Annotated[
        str | None, typer.Option(help="Repository ORG/NAME of the initial weights. (default: as recorded by train.py)")
    ] = None
    license: Annotated[
        str | None,
        typer.Option(help="License by its name on the Hub. (default: the license of the initial weights, if known)"),
    ] = None
    note: Annotated[list[str] | None, typer.Option(help="Additional license terms; repeatable.")] = None

    def card(self, model: Any, source: ModelOptions, evaluation: "Evaluation | None") -> "Card":
        """The model card of a model that was loaded from `source`."""
        from ...hub.card import Card, find_base_model, with_terms

        given = Card(
            description=self.description,
            evaluation=evaluation,
            license=self.license,
            notes=self.note or (),
            photos=self.photo or (),
            datasets=self.trained_on or (),
            base_model=self.base_model or find_base_model(source.model, source.checkpoint),
        )
        return with_terms(given, model)


@expand_groups
def publish(
    repo_id: Annotated[
        str,
        typer.Argument(metavar="ORG/NAME", help="Repository on the Hugging Face Hub, created if it does not exist."),
    ],
    model_options: ModelOptions,
    card_options: CardOptions,
    accuracy_options: AccuracyOptions,
    classes: Classes = None,
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

    After `import timm_bcos`, load it with `timm.create_model("hf-hub:ORG/NAME", pretrained=True)`.

    With --folder, the Space's files are in its subdirectory `space`.
    """
    import torch

    from ...hub import repository
    from ...hub.space import publish_space, save_space
    from ...models.class_names import read_class_names

    evaluation = accuracy_options.evaluation()
    model = model_options.load()
    card = card_options.card(model, model_options, evaluation)
    example: dict[str, Any] = dict(photos=card.photos, license=card.license)  # of the Space
    labels = read_class_names(classes, model.num_classes) if classes else None
    weights: dict[str, Any] = dict(label_names=labels, dtype=getattr(torch, dtype) if dtype else None)
    if folder:
        repository.save_repository(model, folder, repo_id, card, **weights)
        if space:
            save_space(folder / "space", repo_id, repo_id, **example)
        typer.echo(f"wrote {folder}")
        return
    typer.echo(repository.publish(model, repo_id, card, **weights, private=private))
    if space:
        typer.echo(publish_space(repo_id, repo_id, **example, private=private))
