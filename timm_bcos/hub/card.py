"""The model card of a published network: what it is, how to load and explain it, how good it is, under which terms."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import timm
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image
from torch import nn

from ..conversion.converted import BcosModel
from ..data.photos import open_photo
from ..errors import InputError
from ..explaining.explanation import Explanation
from ..explaining.forward import explain_targets
from ..models.classes import class_names
from ..models.interface import BcosNetwork, TimmModel
from .stats import measure_stats

__all__ = ["Card", "Evaluation", "write_card"]

PICTURE = "explanation.png"
TAGS = ["timm", "image-classification", "b-cos", "explainable-ai"]

TEXT = """\
---
{metadata}
---
# {name}

> **Import `timm_bcos` first.** The code that the Hub offers for timm models lacks this import, and timm then ends with
> `Unknown model ({architecture})`:

```python
import timm, timm_bcos
model = timm.create_model("hf-hub:{repo_id}", pretrained=True)
```

{description}

It is a B-cos network: its logits are one input-dependent linear map of the image, and the row of that map that belongs
to a class, a picture in colour, explains the class exactly. The contributions of all pixels, plus the network's
constants, sum up to the logit.
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
## Licence

{licence}

## Citation

{citations}
"""

BCOS = """\
@inproceedings{bohle2022bcos,
  title = {B-cos Networks: Alignment is All We Need for Interpretability},
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
  title = {B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable},
  author = {Arya, Shreyash and Rao, Sukrut and B{\\"o}hle, Moritz and Schiele, Bernt},
  booktitle = {NeurIPS},
  year = {2024}
}"""


@dataclass(frozen=True)
class Evaluation:
    """An accuracy and how it was measured.

    Attributes:
        accuracy: Top-1, in per cent.
        dataset: What it was measured on.
        command: What measured it.
    """

    accuracy: float
    dataset: str
    command: str = ""


@dataclass(frozen=True)
class Card:
    """What a model card says beside what the network itself tells.

    Attributes:
        description: One sentence or more: trained on what, from what, how.
        evaluation: Its accuracy.
        licence: As the Hugging Face Hub calls it.
        notes: Further terms.
        photos: Image files that the card shows explanations of.
        datasets: What it was trained on, as the Hub calls these data sets, for instance 'imagenet-1k'.
        base_model: The network on the Hub whose weights its training started from, 'ORGANISATION/NAME'. By default what
            a checkpoint of train.py tells; a network in memory does not know it.
    """

    description: str = ""
    evaluation: Evaluation | None = None
    licence: str = "apache-2.0"
    notes: Sequence[str] = ()
    photos: Sequence[str | PathLike[str]] = field(default=())
    datasets: Sequence[str] = ()
    base_model: str | None = None


def write_card(model: BcosNetwork, folder: Path, repo_id: str, card: Card) -> None:
    """Write README.md and, if there are photos, the picture that it shows.

    Args:
        model: A B-cos network in eval mode.
        folder: Where to.
        repo_id: 'ORGANISATION/NAME' on the Hub.
        card: What to say.
    """
    if card.photos:
        explain_photos(model, card.photos).save(folder / PICTURE, class_names(model))
    text = TEXT.format(
        metadata=_metadata(repo_id, card),
        name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        architecture=model.pretrained_cfg["architecture"],
        description=card.description or f"`{_architecture(model)}` as a B-cos network.",
        picture=f"\n![Explanations of photos]({PICTURE})\n" if card.photos else "",
        details=_details(model, card),
        evaluation=_evaluation(card.evaluation),
        licence="\n".join([f"{card.licence}.", *(f"{note}." for note in card.notes)]),
        citations="\n\n".join(f"```bibtex\n{entry}\n```" for entry in _citations(model)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def explain_photos(model: nn.Module, paths: Sequence[str | PathLike[str]]) -> Explanation:
    """One explanation of each photo's most probable class, photos read as the network's cfg says."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    device = next(model.parameters()).device
    photos = [transform(_open(Path(path)))[None].to(device) for path in paths]
    return Explanation.stack([e for x in photos for e in explain_targets(model, x, top=1)])


def _open(path: Path) -> Image.Image:
    try:
        return open_photo(path)
    except InputError as error:
        raise InputError(f"photo {path} of the card: {error}") from error


def _metadata(repo_id: str, card: Card) -> str:
    return ModelCardData(
        library_name="timm",
        license=card.licence,
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


def _details(model: BcosNetwork, card: Card) -> str:
    """In the form of timm's own cards."""
    stats = [f"  - {name}: {value}" for name, value in measure_stats(model).lines().items()]
    more = {
        "Architecture": _architecture(model),
        "Classes": str(model.num_classes),
        "Dataset": ", ".join(card.datasets),
        "Base model": card.base_model and f"[{card.base_model}](https://huggingface.co/{card.base_model})",
    }
    lines = [f"- **{name}:** {value}" for name, value in more.items() if value]
    return "\n".join(["- **Model Type:** Image classification", "- **Model Stats:**", *stats, *lines])


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
