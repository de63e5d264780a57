"""The model card of a published network: what it is, how to load and explain it, how good it is, under which terms."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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

__all__ = [
    "Card",
    "Evaluation",
    "ModelStats",
    "find_base_model",
    "measure_stats",
    "write_card",
]

OTHER_WEIGHTS = ("pretrained_path", "initial_checkpoint")  # of train.py: files, of which nobody knows the origin


def find_base_model(name: str | None = None, checkpoint: Path | None = None) -> str | None:
    """The 'ORGANIZATION/NAME' of the weights that a network was made from, or None if that is not known.

    Args:
        name: timm's, of a plain or B-cos network that is taken with its published weights.
        checkpoint: Of train.py, instead; others do not tell.
    """
    if checkpoint is None:
        return _address(name) if name else None
    trained = read_training_arguments(checkpoint) or {}
    if not trained.get("pretrained") or any(trained.get(key) for key in OTHER_WEIGHTS):
        return None
    kwargs = trained.get("model_kwargs") or {}
    return _address(str(kwargs.get("arch", trained.get("model"))))


def _address(name: str) -> str | None:
    source, place = parse_model_name(name)
    if source is not None:
        return place.partition("@")[0] if source == "hf-hub" else None
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.hf_hub_id if cfg else None


aten = torch.ops.aten
PRODUCTS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)  # what activations are the outputs of


@dataclass(frozen=True)
class ModelStats:
    """The size of a network and the work for one image.

    Attributes:
        parameters: How many numbers it has learned.
        macs: Multiply-accumulates of convolutions, linear layers and matrix products.
        activations: Numbers that these put out.
        image_size: Height and width of the image, in pixels.
    """

    parameters: int
    macs: int
    activations: int
    image_size: tuple[int, int]

    def lines(self) -> dict[str, str]:
        """As timm's cards name them: in millions and billions."""
        return {
            "Params (M)": _short(self.parameters / 1e6),
            "GMACs": _short(self.macs / 1e9),
            "Activations (M)": _short(self.activations / 1e6),
            "Image size": " x ".join(map(str, self.image_size)),
        }


def measure_stats(model: TimmModel) -> ModelStats:
    """Count while one image of the network's own size passes through it.

    timm counts the arithmetic of norm layers too: its GMACs are a few per cent more, its activations the same.

    Args:
        model: In eval mode, plain or B-cos.
    """
    height, width = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    image = random_image(model.in_chans, (height, width)).to(next(model.parameters()).device)
    operations = FlopCounterMode(display=False)
    outputs = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PRODUCTS, _count_outputs))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), operations, outputs:  # attention as its matrix products
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
    """One decimal, as timm; of small networks two digits."""
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


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
to a class, a picture in color, explains the class exactly. The contributions of all pixels, plus the network's
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
## License

{license}

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
        license: As the Hugging Face Hub calls it.
        notes: Further terms.
        photos: Image files that the card shows explanations of.
        datasets: What it was trained on, as the Hub calls these data sets, for instance 'imagenet-1k'.
        base_model: The network on the Hub whose weights its training started from, 'ORGANIZATION/NAME'. By default what
            a checkpoint of train.py tells; a network in memory does not know it.
    """

    description: str = ""
    evaluation: Evaluation | None = None
    license: str = "apache-2.0"
    notes: Sequence[str] = ()
    photos: Sequence[str | PathLike[str]] = field(default=())
    datasets: Sequence[str] = ()
    base_model: str | None = None


def write_card(model: TimmBcosModel, folder: Path, repo_id: str, card: Card) -> None:
    """Write README.md and, if there are photos, the picture that it shows.

    Args:
        model: A B-cos network in eval mode.
        folder: Where to.
        repo_id: 'ORGANIZATION/NAME' on the Hub.
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
        license="\n".join([f"{card.license}.", *(f"{note}." for note in card.notes)]),
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
