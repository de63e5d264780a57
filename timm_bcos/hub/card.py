"""The model card of a published model: description, code to load and explain it, accuracy, license, citations."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image
from timm.models import parse_model_name
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..conversion.converted import BcosModel
from ..data.photos import open_photo
from ..errors import InputError
from ..explanation.api import explain_targets
from ..explanation.exactness import random_image
from ..explanation.result import Explanation
from ..models.class_names import class_names
from ..models.loading import TimmBcosModel, TimmModel
from ..weights.readers import read_training_arguments
from ..weights.terms import origin_of, started_from

__all__ = [
    "Card",
    "Evaluation",
    "ModelStats",
    "find_base_model",
    "measure_stats",
    "with_terms",
    "write_card",
]


def find_base_model(name: str | None = None, checkpoint: Path | None = None) -> str | None:
    """Find the repository of a model's initial weights.

    Args:
        name: timm name of a model with published weights.
        checkpoint: Checkpoint of train.py, instead of a name.

    Returns:
        'ORGANIZATION/NAME', or None if it is unknown.
    """
    if checkpoint is None:
        return _address(name) if name else None
    origin = started_from(read_training_arguments(checkpoint) or {})
    return _address(origin) if origin else None


def _address(name: str) -> str | None:
    source, place = parse_model_name(name)
    if source is not None:
        return place.partition("@")[0] if source == "hf-hub" else None
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.hf_hub_id if cfg else None


aten = torch.ops.aten
PRODUCTS = (
    aten.convolution,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
)  # operations whose outputs count as activations


@dataclass(frozen=True)
class ModelStats:
    """Size of a model, and its operations for one image.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulate operations of convolutions, linear layers and matrix products.
        activations: Number of values that these return.
        image_size: Height and width of the image in pixels.
    """

    parameters: int
    macs: int
    activations: int
    image_size: tuple[int, int]

    def lines(self) -> dict[str, str]:
        """The lines of timm's model cards, in millions and billions."""
        return {
            "Params (M)": _short(self.parameters / 1e6),
            "GMACs": _short(self.macs / 1e9),
            "Activations (M)": _short(self.activations / 1e6),
            "Image size": " x ".join(map(str, self.image_size)),
        }


def measure_stats(model: TimmModel) -> ModelStats:
    """Count the operations of a forward pass with one image.

    timm also counts norm layers, so its GMACs are a few percent higher; its activations are the same.

    Args:
        model: B-cos or plain model in eval mode.
    """
    height, width = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    image = random_image(model.in_chans, (height, width)).to(next(model.parameters()).device)
    operations = FlopCounterMode(display=False)
    outputs = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PRODUCTS, _count_outputs))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), operations, outputs:  # attention as matrix products
        model(image)
    return ModelStats(
        sum(parameter.numel() for parameter in model.parameters()),
        operations.get_total_flops() // 2,
        outputs.get_total_flops(),
        (height, width),
    )


def _count_outputs(*_: object, out_shape: torch.Size, **__: object) -> int:
    return math.prod(out_shape)


def _short(number: float) -> str:
    """One decimal as in timm's cards, or two significant digits below 1."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


PICTURE = "explanation.png"
TAGS = ["timm", "image-classification", "b-cos", "explainable-ai"]

TEXT = """\
---
{metadata}
---
# {name}

> **Import `timm_bcos` first.** The Hub's code snippet for timm models lacks this import, and timm then raises
> `Unknown model ({architecture})`:

```python
import timm, timm_bcos
model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
```

{description}

It is a B-cos model: for each image x, it computes W(x)·x + constants. The row of W(x) that belongs to a class explains
the class exactly and can be shown in color. The contributions of all pixels, plus the model's constants, sum up to the
logit.
{picture}
## Explain an image

```python
import timm, timm_bcos
from PIL import Image

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.open("photo.jpg").convert("RGB")
explanation = timm_bcos.explain(model, transform(image)[None])
explanation.save("why.png")
```

## Model Details

{details}
{evaluation}
## License

{license}

## Citation

{citations}
"""

BCOS = """\
@inproceedings{bohle2022bcos,
  title = {B-cos Models: Alignment is All We Need for Interpretability},
  author = {B{\\"o}hle, Moritz and Fritz, Mario and Schiele, Bernt},
  booktitle = {CVPR},
  year = {2022}
}"""
BCOS_V2 = """\
@article{bohle2024bcos,
  title = {B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers},
  author = {B{\\"o}hle, Moritz and Singh, Navdeeppal and Fritz, Mario and Schiele, Bernt},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2024}
}"""
BCOSIFICATION = """\
@inproceedings{arya2024bcosification,
  title = {B-cosification: Transforming Deep Neural Models to be Inherently Interpretable},
  author = {Arya, Shreyash and Rao, Sukrut and B{\\"o}hle, Moritz and Schiele, Bernt},
  booktitle = {NeurIPS},
  year = {2024}
}"""


@dataclass(frozen=True)
class Evaluation:
    """An accuracy and its origin.

    Attributes:
        accuracy: Top-1 accuracy in percent.
        dataset: Data set of the accuracy.
        command: Command that produced the accuracy.
    """

    accuracy: float
    dataset: str
    command: str = ""


@dataclass(frozen=True)
class Card:
    """Contents of a model card that the model itself does not contain.

    Attributes:
        description: Training data, initial weights and procedure.
        evaluation: Accuracy.
        license: License by its name on the Hugging Face Hub. Default: that of the weights that the model started from.
        notes: License terms in addition to those of these weights.
        photos: Image files to explain on the card.
        datasets: Training data sets by their names on the Hub, for instance 'imagenet-1k'.
        base_model: Repository 'ORGANIZATION/NAME' of the initial weights. Default: as recorded in a checkpoint of
            train.py, or by `fit_probe`.
    """

    description: str = ""
    evaluation: Evaluation | None = None
    license: str | None = None
    notes: Sequence[str] = ()
    photos: Sequence[str | PathLike[str]] = field(default=())
    datasets: Sequence[str] = ()
    base_model: str | None = None


def with_terms(card: Card, model: TimmModel) -> Card:
    """The card with the license, notes and base model of the model's pretrained cfg, where it has none of its own.

    Args:
        card: Contents of the card.
        model: The model, whose pretrained cfg knows the terms of the weights that it was trained from.

    Raises:
        InputError: If no license is given and the terms of the weights are unknown.
    """
    cfg = model.pretrained_cfg
    license = card.license or cfg.get("license")
    if not license:
        raise InputError(
            "the license of these weights is unknown: give one with --license (in Python, Card(license=...)), and "
            "respect the terms of the weights that training started from"
        )
    origin = origin_of(cfg)
    base_model = card.base_model or (_address(origin) if origin else None)
    notes = tuple(dict.fromkeys((*(cfg.get("notes") or ()), *card.notes)))
    return replace(card, license=license, notes=notes, base_model=base_model)


def write_card(model: TimmBcosModel, folder: Path, repo_id: str, card: Card) -> None:
    """Write README.md and, if there are photos, a figure of their explanations.

    Args:
        model: A B-cos model in eval mode.
        folder: Directory to write to.
        repo_id: Repository 'ORGANIZATION/NAME' on the Hub.
        card: Contents of the card.

    Raises:
        InputError: If no license is given and the terms of the weights are unknown.
    """
    card = with_terms(card, model)
    if card.photos:
        explain_photos(model, card.photos).save(folder / PICTURE, class_names(model))
    text = TEXT.format(
        metadata=_metadata(repo_id, card),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        architecture=model.pretrained_cfg["architecture"],
        description=card.description or f"`{_architecture(model)}` as a B-cos model.",
        picture=f"\n![Explanations of photos]({PICTURE})\n" if card.photos else "",
        details=_details(model, card),
        evaluation=_evaluation(card.evaluation),
        license="\n".join([f"{card.license}.", *(f"{note}." for note in card.notes)]),
        citations="\n\n".join(f"```bibtex\n{entry}\n```" for entry in _citations(model)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def explain_photos(model: nn.Module, paths: Sequence[str | PathLike[str]]) -> Explanation:
    """Explanations of the most probable class of each photo."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    device = next(model.parameters()).device
    photos = [transform(_open(Path(path)))[None].to(device) for path in paths]
    return Explanation.stack([e for x in photos for e in explain_targets(model, x, top=1)])


def _open(path: Path) -> Image.Image:
    try:
        return open_photo(path)
    except InputError as error:
        raise InputError(f"photo {path} for the model card: {error}") from error


def _metadata(repo_id: str, card: Card) -> str:
    return ModelCardData(
        library_name="timm",
        license=card.license,
        pipeline_tag="image-classification",
        tags=TAGS,
        datasets=list(card.datasets) or None,
        base_model=card.base_model,
        metrics=["accuracy"] if card.evaluation else None,
        model_name=repo_id.rpartition("/")[2] if card.evaluation else None,
        eval_results=_results(card.evaluation),
    ).to_yaml()


def _results(evaluation: Evaluation | None) -> list[EvalResult] | None:
    if evaluation is None:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=re.sub(r"[^\w./-]+", "-", evaluation.dataset.lower()).strip("-"),
            dataset_name=evaluation.dataset,
            metric_type="accuracy",
            metric_name="Top-1 accuracy (%)",
            metric_value=evaluation.accuracy,
        )
    ]


def _details(model: TimmBcosModel, card: Card) -> str:
    """The section in the format of timm's model cards."""
    stats = [f"  - {name}: {value}" for name, value in measure_stats(model).lines().items()]
    more = {
        "Architecture": _architecture(model),
        "Classes": str(model.num_classes),
        "Dataset": ", ".join(card.datasets),
        "Base model": _base_model(model, card),
    }
    lines = [f"- **{name}:** {value}" for name, value in more.items() if value]
    return "\n".join(["- **Model Type:** Image classification", "- **Model Stats:**", *stats, *lines])


def _base_model(model: TimmModel, card: Card) -> str | None:
    """A link to the base model on the Hub, or its name if it comes with this package."""
    if card.base_model:
        return f"[{card.base_model}](https://huggingface.co/{card.base_model})"
    origin = origin_of(model.pretrained_cfg)
    return f"`{origin}`" if origin else None


def _architecture(model: TimmModel) -> str:
    config = model.pretrained_cfg
    arch = getattr(model, "_model_args", {}).get("arch")
    return f"{config.get('architecture')}{f' of {arch}' if arch else ''}"


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    measured = f", measured by\n\n```bash\n{evaluation.command}\n```" if evaluation.command else "."
    return f"\n## Accuracy\n\n{evaluation.accuracy:.2f} % top-1 on {evaluation.dataset}{measured}\n"


def _citations(model: BcosModel) -> list[str]:
    config = model.bcos_config
    if not config.normalize_weight:
        return [BCOS, BCOSIFICATION]
    return [BCOS] if config.norm == "remove" else [BCOS, BCOS_V2]
