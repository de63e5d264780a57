"""From a trained network to the Hugging Face Hub: weights, timm's config and a model card, in one commit."""

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
from .card import Card, find_base_model, write_card

__all__ = [
    "AUTO_MAP",
    "MODULE",
    "publish",
    "save_network",
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
    """Upload a folder's files to a repository, which is created if it does not exist.

    Args:
        folder: All of its files.
        repo_id: 'ORGANIZATION/NAME'.
        token: Access token; None takes the one that `hf auth login` has stored.
        private: For a new repository.
        revision: Branch to commit to.
        create_pr: Open a pull request instead.
        kind: What `huggingface_hub.create_repo` takes for Spaces: `repo_type`, `space_sdk`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PublishError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="timm_bcos", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, **kind)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type=kind.get("repo_type"), revision=revision,
            create_pr=create_pr, commit_message=f"Published with timm_bcos {__version__}",
        )  # fmt: skip
    except Exception as error:  # the client's own, its HTTP library's and the system's
        raise PublishError(
            f"cannot publish to {repo_id}: {first_line(error)}; check the name, the network and the token "
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
"""B-cos networks of timm in transformers: importing timm_bcos registers them. Needs `pip install timm_bcos`."""

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
    """Write it into a folder."""
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
    """Publish a network on the Hugging Face Hub, from where `timm.create_model('hf-hub:REPO', pretrained=True)` has it.

    Args:
        model: A B-cos network that timm can create again by name (`bcosify` networks included), or a checkpoint of
            timm's train.py.
        repo_id: 'ORGANIZATION/NAME'; created if it does not exist.
        card: What the model card says.
        label_names: One per class, stored in the config.
        dtype: Of the stored weights, for instance torch.float16; None leaves them as they are.
        token: Access token; None takes the one that `hf auth login` has stored.
        private: For a new repository.
        revision: Branch to commit to.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        PublishError: If the Hub cannot be reached or refuses.
        ModelStateError: If timm could not create the network again.
        CheckpointError: For a broken checkpoint.
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
    """Write what `publish` uploads: `model.safetensors`, `config.json`, `README.md` and its picture.

    And `bcos_timm.py`, which transformers asks for with `trust_remote_code=True`.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads it; that is tried, and must give the same weights.

    Args:
        model: As in `publish`.
        folder: A directory, made if need be.
        repo_id: What the card says of its address.
        card: What else the card says.
        label_names: One per class.
        dtype: Of the stored weights.

    Raises:
        ModelStateError: If timm could not create the network again; the folder stays as it is.
        CheckpointError: For a broken checkpoint.
        InputError: For another number of label names than classes.
    """
    network: Any = model if isinstance(model, nn.Module) else load_model(None, Path(model))
    card = card or Card()
    if not isinstance(model, nn.Module) and card.base_model is None:
        card = dataclasses.replace(card, base_model=find_base_model(checkpoint=Path(model)))

    def add(again: TimmBcosModel, unfinished: Path) -> None:
        write_card(again, unfinished, repo_id, card)
        write_module(unfinished)

    config = dict(auto_map=AUTO_MAP, pretrained_cfg=dict(license=card.license))
    _save(network, Path(folder), label_names, dtype, config, add)


def save_network(
    network: TimmBcosModel,
    folder: str | PathLike[str],
    *,
    label_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model.safetensors` and `config.json` alone.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` loads them.

    Args:
        network: A B-cos network that timm can create again by name.
        folder: A directory, made if need be.
        label_names: One per class.
        dtype: Of the stored weights.

    Raises:
        ModelStateError: If timm could not create the network again; the folder stays as it is.
        InputError: For another number of label names than classes.
    """
    _save(network, Path(folder), label_names, dtype, {}, lambda again, unfinished: None)


def _save(
    network: TimmBcosModel,
    folder: Path,
    label_names: list[str] | None,
    dtype: torch.dtype | None,
    config: dict[str, Any],
    add: Callable[[TimmBcosModel, Path], None],
) -> None:
    """Files are made, with those that `add` makes of the network loaded again, then moved into the folder together."""
    architecture = _architecture(network)
    stored = copy.deepcopy(network).eval().to(dtype=dtype)
    stored.pretrained_cfg = {**network.pretrained_cfg, "architecture": architecture.pop("architecture")}
    own_labels = network.pretrained_cfg.get("label_names")
    if not label_names and own_labels and len(own_labels) == network.num_classes:
        label_names = list(own_labels)
    if label_names and len(label_names) != network.num_classes:
        raise InputError(f"{len(label_names)} label names for a network of {network.num_classes} classes")
    more = config | (dict(label_names=label_names) if label_names else {})
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        timm.models.save_for_hf(stored, unfinished, more, model_args=architecture, safe_serialization=True)
        _leave_classes_to_the_config(Path(unfinished) / "config.json")
        again = _load_again(Path(unfinished))
        _compare(_with_weights_of(network, stored), again)
        add(again.to(next(network.parameters()).device), Path(unfinished))
        for file in sorted(Path(unfinished).iterdir()):
            file.replace(folder / file.name)


def _leave_classes_to_the_config(path: Path) -> None:
    """timm reads the number of classes there, and transformers passes it on beside the arguments: once is enough."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _architecture(model: nn.Module) -> dict[str, object]:
    """How timm creates the network: 'architecture', and arguments beside those that timm records by itself."""
    if not isinstance(model, BcosModel):
        raise ModelStateError(f"{type(model).__name__} is no B-cos network: convert it with timm_bcos.bcosify")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    if name.startswith("bcos"):
        _refuse_local(getattr(model, "_model_args", None) or {})
        return dict(architecture=name, **_changes(model.bcos_config, name))
    if not timm.is_model(name):
        raise ModelStateError(
            f"timm cannot create a {type(model).__name__} by name: register its function with "
            f"timm.models.register_model, then convert it"
        )
    return dict(architecture="bcosify", arch=name, **_changes(model.bcos_config, "bcosify"))


def _refuse_local(arguments: dict[str, object]) -> None:
    arch = str(arguments.get("arch", ""))
    if arch.startswith("local-dir:"):
        raise ModelStateError(f"nobody else has {arch}: create the network with arch= its architecture's own name")


def _changes(config: BcosConfig, name: str) -> dict[str, object]:
    """What a registered network has to be told beside its defaults; tags, which transformers drops, tell nothing."""
    own = ARCHITECTURES[name].config if name in ARCHITECTURES else BcosConfig.finetune(b=config.b, bias=config.bias)
    default, chosen = dataclasses.asdict(own), dataclasses.asdict(config)
    return {key: chosen[key] for key in chosen if key in ("b", "bias") or chosen[key] != default[key]}


def _load_again(folder: Path) -> TimmBcosModel:
    try:
        return cast(TimmBcosModel, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    except CheckpointError as error:
        raise ModelStateError(
            f"saved and loaded again it is another network, its logits differ: {error}; nothing has been published"
        ) from error
    except Exception as error:  # whatever timm says to arguments that do not describe the network
        raise ModelStateError(f"timm cannot create this network from its config: {error}") from error


def _with_weights_of(network: TimmBcosModel, stored: TimmBcosModel) -> TimmBcosModel:
    """The network with weights rounded as they are stored, and nothing else: constants are not stored."""
    rounded = copy.deepcopy(network).eval().float().cpu()
    rounded.load_state_dict(stored.state_dict())
    return rounded


@torch.no_grad()
def _compare(stored: TimmBcosModel, again: TimmBcosModel) -> None:
    own, other = stored.state_dict(), again.state_dict()
    changed = [name for name, value in own.items() if name not in other or not torch.equal(value, other[name])]
    x = random_image(stored.in_chans, again.pretrained_cfg["input_size"][-2:])
    if changed or not torch.allclose(_logits(stored, x), _logits(again, x), rtol=1e-5):
        what = f"{changed[0]!r} differs" if changed else "its logits differ"
        raise ModelStateError(f"saved and loaded again it is another network, {what}: nothing has been published")


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return first_output(model(x))  # type: ignore[no-any-return]
