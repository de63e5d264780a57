"""Publishing models on the Hugging Face Hub: weights, timm's config and a model card, in one commit."""

import copy
import dataclasses
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import timm
import torch
from torch import nn

from .. import __version__
from ..conversion.config import BcosConfig
from ..conversion.converted import BcosModel
from ..errors import CheckpointError, InputError, ModelStateError, PublishError
from ..explanation.exactness import random_image
from ..files import first_line
from ..models.architectures import ARCHITECTURES
from ..models.loading import TimmBcosModel, load_model
from ..nn.module_utils import first_output
from .card import Card, find_base_model, with_terms, write_card

__all__ = [
    "AUTO_MAP",
    "MODULE",
    "publish",
    "save_model",
    "save_repository",
    "upload_folder",
    "write_module",
]


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    **kind: Any,
) -> str:
    """Upload the files of a directory to a repository, which is created if it does not exist.

    Args:
        folder: Directory to upload.
        repo_id: Repository 'ORGANIZATION/NAME'.
        token: Access token; None for the one that `hf auth login` stores.
        private: Create the repository as private.
        revision: Branch to commit to.
        create_pr: Open a pull request instead of committing.
        kind: Arguments of `huggingface_hub.create_repo` for Spaces: `repo_type`, `space_sdk`.

    Returns:
        URL of the commit or pull request.

    Raises:
        PublishError: If the Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="timm_bcos", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, **kind)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type=kind.get("repo_type"), revision=revision,
            create_pr=create_pr, commit_message=f"Published with timm_bcos {__version__}",
        )  # fmt: skip
    except Exception as error:  # from the client, its HTTP library, or the system
        raise PublishError(
            f"cannot publish to {repo_id}: {first_line(error)}; check the name, the connection and the token "
            f"(`hf auth login`, or token=...)"
        ) from error
    return str(commit.pr_url or commit.commit_url)


MODULE = "bcos_timm.py"
AUTO_MAP = {
    "AutoConfig": "bcos_timm.BcosTimmConfig",
    "AutoImageProcessor": "bcos_timm.BcosTimmImageProcessor",
    "AutoModel": "bcos_timm.BcosTimmModel",
    "AutoModelForImageClassification": "bcos_timm.BcosTimmForImageClassification",
}
SOURCE = '''\
"""B-cos models of timm in transformers. Importing timm_bcos registers them: `pip install timm_bcos`."""

import timm_bcos  # noqa: F401
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor


class BcosTimmConfig(TimmWrapperConfig):
    pass


class BcosTimmImageProcessor(TimmWrapperImageProcessor):
    pass


class BcosTimmModel(TimmWrapperModel):
    config_class = BcosTimmConfig


class BcosTimmForImageClassification(TimmWrapperForImageClassification):
    config_class = BcosTimmConfig
'''


def write_module(folder: Path) -> None:
    """Write the module that transformers loads with `trust_remote_code=True` into a directory."""
    (folder / MODULE).write_text(SOURCE, encoding="utf-8")


def publish(
    model: nn.Module | str | PathLike[str],
    repo_id: str,
    card: Card | None = None,
    *,
    label_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish a model on the Hugging Face Hub. Load it with `timm.create_model('hf-hub:REPO', pretrained=True)`.

    Args:
        model: A B-cos model that timm can create by name, including `bcosify` models; or a checkpoint of timm's
            train.py.
        repo_id: Repository 'ORGANIZATION/NAME', created if it does not exist.
        card: Contents of the model card.
        label_names: Class names, stored in the config.
        dtype: Data type of the saved weights, for instance torch.float16; None to keep it.
        token: Access token; None for the one that `hf auth login` stores.
        private: Create the repository as private.
        revision: Branch to commit to.
        create_pr: Open a pull request instead of committing.

    Returns:
        URL of the commit or pull request.

    Raises:
        PublishError: If the Hub cannot be reached or refuses the upload.
        ModelStateError: If timm cannot create the model from its config.
        CheckpointError: If the checkpoint is broken.
        InputError: If no license is given and that of the weights is unknown.
    """
    with TemporaryDirectory() as folder:
        save_repository(model, folder, repo_id, card, label_names=label_names, dtype=dtype)
        return upload_folder(
            Path(folder), repo_id, token=token, private=private, revision=revision, create_pr=create_pr
        )


def save_repository(
    model: nn.Module | str | PathLike[str],
    folder: str | PathLike[str],
    repo_id: str,
    card: Card | None = None,
    *,
    label_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the files that `publish` uploads.

    These are `model.safetensors`, `config.json`, `README.md` with its figure, and `bcos_timm.py`, which transformers
    loads with `trust_remote_code=True`. The files are loaded again with
    `timm.create_model('local-dir:FOLDER', pretrained=True)` and compared with the model before they are kept.

    Args:
        model: Model or checkpoint, as in `publish`.
        folder: Directory to write to; created if necessary.
        repo_id: Repository 'ORGANIZATION/NAME' that the card names.
        card: Other contents of the model card.
        label_names: Class names.
        dtype: Data type of the saved weights.

    Raises:
        ModelStateError: If timm cannot create the model from its config; the directory is then unchanged.
        CheckpointError: If the checkpoint is broken.
        InputError: If the number of class names is not the number of classes, or if no license is given and that of
            the weights is unknown.
    """
    card = card or Card()
    if isinstance(model, nn.Module):
        loaded = cast(TimmBcosModel, model)
    else:
        loaded = load_model(None, Path(model))
        card = dataclasses.replace(card, base_model=card.base_model or find_base_model(checkpoint=Path(model)))
    _architecture(loaded)  # first, to refuse models that timm cannot create
    card = with_terms(card, loaded)

    def add(again: TimmBcosModel, unfinished: Path) -> None:
        write_card(again, unfinished, repo_id, card)
        write_module(unfinished)

    config = dict(auto_map=AUTO_MAP, pretrained_cfg=dict(license=card.license, notes=tuple(card.notes)))
    _save(loaded, Path(folder), label_names, dtype, config, add)


def save_model(
    model: TimmBcosModel,
    folder: str | PathLike[str],
    *,
    label_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`.

    Load them with `timm.create_model('local-dir:FOLDER', pretrained=True)`.

    Args:
        model: A B-cos model that timm can create by name.
        folder: Directory to write to; created if necessary.
        label_names: Class names.
        dtype: Data type of the saved weights.

    Raises:
        ModelStateError: If timm cannot create the model from its config; the directory is then unchanged.
        InputError: If the number of class names is not the number of classes.
    """
    _save(model, Path(folder), label_names, dtype, {}, lambda again, unfinished: None)


def _save(
    model: TimmBcosModel,
    folder: Path,
    label_names: list[str] | None,
    dtype: torch.dtype | None,
    config: dict[str, Any],
    add: Callable[[TimmBcosModel, Path], None],
) -> None:
    """Write all files to a temporary directory, load and compare the model, call `add`, and move the files together."""
    architecture = _architecture(model)
    stored = copy.deepcopy(model).eval().to(dtype=dtype)
    stored.pretrained_cfg = {**model.pretrained_cfg, "architecture": architecture.pop("architecture")}
    own_labels = model.pretrained_cfg.get("label_names")
    if not label_names and own_labels and len(own_labels) == model.num_classes:
        label_names = list(own_labels)
    if label_names and len(label_names) != model.num_classes:
        raise InputError(f"{len(label_names)} label names for a model of {model.num_classes} classes")
    more = config | (dict(label_names=label_names) if label_names else {})
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        timm.models.save_for_hf(stored, unfinished, more, model_args=architecture, safe_serialization=True)
        _leave_classes_to_the_config(Path(unfinished) / "config.json")
        again = _load_again(Path(unfinished))
        _compare(_with_weights_of(model, stored), again)
        add(again.to(next(model.parameters()).device), Path(unfinished))
        for file in sorted(Path(unfinished).iterdir()):
            file.replace(folder / file.name)


def _leave_classes_to_the_config(path: Path) -> None:
    """Remove the number of classes from the arguments; transformers would pass it twice."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _architecture(model: nn.Module) -> dict[str, object]:
    """'architecture' and the arguments that timm needs to create the model, besides those that timm records itself."""
    if not isinstance(model, BcosModel):
        raise ModelStateError(f"{type(model).__name__} is not a B-cos model: convert it with timm_bcos.bcosify")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if name.startswith("bcos"):
        _refuse_local(getattr(model, "_model_args", None) or {})
        return dict(architecture=name, **_changes(model, name))
    if not timm.is_model(name):
        raise ModelStateError(
            f"timm cannot create a {type(model).__name__} by name: register its function with "
            f"timm.models.register_model, then convert it"
        )
    return dict(architecture="bcosify", arch=name, **_changes(model, "bcosify"))


def _refuse_local(arguments: dict[str, object]) -> None:
    arch = str(arguments.get("arch", ""))
    if arch.startswith("local-dir:"):
        raise ModelStateError(
            f"arch={arch!r} exists on this machine only: create the model with the name of its architecture as arch="
        )


def _changes(model: BcosModel, name: str) -> dict[str, object]:
    """The settings that differ from the registered model's defaults. transformers drops tags, so they do not count.

    timm records the arguments that a model was created with, so settings among them are given even if they are defaults
    again, for instance the temperature of a new classifier.
    """
    config = model.bcos_config
    given = {"b", "bias", *(getattr(model, "_model_args", None) or {})}
    own = ARCHITECTURES[name].config if name in ARCHITECTURES else BcosConfig.finetune(b=config.b, bias=config.bias)
    default, chosen = dataclasses.asdict(own), dataclasses.asdict(config)
    return {key: chosen[key] for key in chosen if key in given or chosen[key] != default[key]}


def _load_again(folder: Path) -> TimmBcosModel:
    try:
        return cast(TimmBcosModel, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    except CheckpointError as error:
        raise ModelStateError(f"the saved model differs after loading: {error}; nothing has been published") from error
    except Exception as error:  # timm raises various errors for invalid arguments
        raise ModelStateError(f"timm cannot create this model from its config: {error}") from error


def _with_weights_of(model: TimmBcosModel, stored: TimmBcosModel) -> TimmBcosModel:
    """The model with its weights rounded as they are saved. Constants are not saved, so they stay as they are."""
    rounded = copy.deepcopy(model).eval().float().cpu()
    rounded.load_state_dict(stored.state_dict())
    return rounded


@torch.no_grad()
def _compare(stored: TimmBcosModel, again: TimmBcosModel) -> None:
    own, other = stored.state_dict(), again.state_dict()
    changed = [name for name, value in own.items() if name not in other or not torch.equal(value, other[name])]
    x = random_image(stored.in_chans, again.pretrained_cfg["input_size"][-2:])
    if changed or not torch.allclose(_logits(stored, x), _logits(again, x), rtol=1e-5):
        what = f"{changed[0]!r} differs" if changed else "its logits differ"
        raise ModelStateError(f"the saved model differs after loading, {what}: nothing has been published")


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return first_output(model(x))
