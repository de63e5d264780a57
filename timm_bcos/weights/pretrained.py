"""Pretrained weights: from the source in a timm cfg, verified, read safely and checked against the model."""

import logging
import re
import warnings
from collections.abc import Callable, Collection
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from .._compat import private
from ..conversion.config import BcosConfig
from ..conversion.inspection import name_in_backbone
from ..conversion.settings import adopt_logit_bias, contradictions, in_words, is_settings
from ..errors import CheckpointError, NotFineTunedWarning
from ..files import first_line, sha256
from .formats import adapt_image_channels, classifier_names
from .readers import load_exactly, read_state_dict

__all__ = [
    "BY_HAND",
    "download",
    "fill_backbone",
    "load_pretrained",
]

_logger = logging.getLogger(__name__)

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
BY_HAND = "pass a file with pretrained_cfg_overlay=dict(file=PATH)"


def download(url: str | tuple[str, str], cache_dir: str | Path | None = None) -> Path:
    """Download a weight file into the cache unless it is there, and verify its hash.

    Args:
        url: Address whose last part is the name of the file, or an address and a name. 8 to 64 hex digits after a dash
            at the end of the name are the start of the file's SHA-256.
        cache_dir: Directory of downloads; None for torch's cache.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: If the download fails, or if the hash is wrong; then the file is removed.
    """
    address, name = (url, url.rpartition("/")[2]) if isinstance(url, str) else url
    path = Path(cache_dir or private.get_cache_dir()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _logger.info("Downloading %s to %s", address, path)
        try:
            torch.hub.download_url_to_file(address, str(path))
        except (OSError, ValueError, HTTPException) as error:  # urllib's errors are OSErrors
            raise CheckpointError(f"cannot download {address}: {first_line(error)}; or {BY_HAND}") from error
    _verify(path, address)
    return path


def _verify(path: Path, address: str) -> None:
    """Compare the hash with the digits in the file's name; log the hash if there are none."""
    found = sha256(path)
    expected = HASH_IN_NAME.search(path.name)
    if expected is None:
        _logger.warning("No hash is published for %s; the SHA-256 of %s is %s", address, path, found)
    elif not found.startswith(expected[1]):
        path.unlink()
        raise CheckpointError(
            f"{address} should have a SHA-256 that starts with {expected[1]}, the file has {found[:16]}…: it was cut "
            f"short or changed, and has been removed; try again, or {BY_HAND}"
        )


StateDict = dict[str, Tensor]


def load_pretrained(
    model: Any,
    cfg: dict[str, Any],
    convert: Callable[[StateDict, nn.Module], StateDict],
    cache_dir: str | Path | None = None,
    changed: Collection[str] = (),
    trained: BcosConfig | None = None,
) -> None:
    """Load the weights of a pretrained cfg. A classifier for another number of classes keeps its random weights.

    Args:
        model: The model, which is changed only if everything fits.
        cfg: timm's pretrained cfg, as a dict.
        convert: Function that converts weights of other formats to the model's.
        cache_dir: Directory of downloads; None for the caches of torch and the Hugging Face Hub.
        changed: Names of settings that the user chose. If the weights were trained with other values of these, there
            is a warning instead of an error.
        trained: Config of weights that hold no settings; None for the model's own.

    Raises:
        CheckpointError: If weights cannot be downloaded, verified or read, or if they are of another model, or of one
            with other settings.
    """
    source, weights = _read(cfg, cache_dir)
    image_channels = (cfg.get("input_size") or (3,))[0]
    weights = adapt_image_channels(convert(dict(weights), model), model, image_channels)
    if model.num_classes == 0:
        weights = _without_head(weights, model, cfg.get("classifier"))
    fresh = set() if model.num_classes == cfg.get("num_classes") else _heads_of_other_size(weights, model)
    weights = {key: value for key, value in weights.items() if key not in fresh}
    adopt_logit_bias(model, weights, changed, trained)
    load_exactly(model, _without_chosen_settings(weights, model, changed, source), source, fresh)


def _without_chosen_settings(weights: StateDict, model: Any, changed: Collection[str], source: str) -> StateDict:
    """Remove the settings of the weights, with a warning, if they differ only in settings that the user chose."""
    found = contradictions(model, model.bcos_config, weights)
    chosen = {*changed, *(("gamma", "gamma_scale") if {"gamma", "gamma_scale"} & {*changed} else ())}
    if not found or any(one.name not in chosen for one in found):
        return weights
    theirs, own = in_words(found, "theirs"), in_words(found, "own")
    warnings.warn(
        f"{source} was trained with {theirs}: with {own} it is another function, whose predictions are not those of "
        f"the weights: fine-tune it",
        NotFineTunedWarning,
        stacklevel=2,
    )
    return {name: value for name, value in weights.items() if not is_settings(name)}


def _without_head(weights: StateDict, model: nn.Module, names: str | tuple[str, ...] | None) -> StateDict:
    own = model.state_dict()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))
    return {key: value for key, value in weights.items() if key in own or not key.startswith(heads)}


def _heads_of_other_size(weights: StateDict, model: nn.Module) -> set[str]:
    own = model.state_dict()
    keys = {f"{name}.{kind}" for name in classifier_names(model) for kind in ("weight", "bias")}
    return {key for key in keys & own.keys() & weights.keys() if weights[key].shape != own[key].shape}


def fill_backbone(backbone: nn.Module, model: nn.Module) -> None:
    """Load the weights of a whole model into its feature backbone of timm's, whose layers have other names.

    Args:
        backbone: The backbone, which is changed.
        model: The whole model.

    Raises:
        CheckpointError: If the model lacks weights of the backbone.
    """
    own = backbone.state_dict()
    found = {name_in_backbone(name, own): value for name, value in model.state_dict().items() if not is_settings(name)}
    missing = [name for name in own if name not in found and not is_settings(name)]
    if missing:
        raise CheckpointError(f"the whole {type(model).__name__} has no {missing[0]!r}, which its backbone needs")
    backbone.load_state_dict({name: value for name, value in found.items() if name in own})


def _read(cfg: dict[str, Any], cache_dir: str | Path | None) -> tuple[str, StateDict]:
    """A description of the weights' source, and the weights. The order of sources is timm's."""
    origin, file, hub_id = cfg.get("source"), cfg.get("file"), cfg.get("hf_hub_id")
    if origin == "local-dir":
        return str(file), _read_or_raise(str(file), lambda: private.load_state_dict_from_path(str(file)))
    if origin != "hf-hub" and cfg.get("state_dict"):
        return "the given state dict", cfg["state_dict"]
    if origin != "hf-hub" and file:
        return str(file), read_state_dict(file)
    if hub_id:
        try:
            return _read_from_hub(hub_id, cfg, cache_dir)
        except CheckpointError as error:
            if not cfg.get("url"):
                raise
            _logger.warning("%s; trying %s", error, cfg["url"])
    if cfg.get("url"):
        path = download(cfg["url"], cache_dir)
        return str(path), _read_or_remove(path)
    raise CheckpointError(f"no weights are published for {cfg.get('architecture', 'this model')}: {BY_HAND}")


def _read_from_hub(hub_id: str, cfg: dict[str, Any], cache_dir: str | Path | None) -> tuple[str, StateDict]:
    name = {"filename": cfg["hf_hub_filename"]} if cfg.get("hf_hub_filename") else {}
    source = f"hf-hub:{hub_id}"
    return source, _read_or_raise(source, lambda: load_state_dict_from_hf(hub_id, **name, cache_dir=cache_dir))


def _read_or_raise(source: str, read: Callable[[], StateDict]) -> StateDict:
    """Call `read`; timm and the Hub's client raise errors of many types, which become `CheckpointError`."""
    try:
        return read()
    except Exception as error:
        raise CheckpointError(f"cannot load weights from {source}: {first_line(error)}; or {BY_HAND}") from error


def _read_or_remove(path: Path) -> StateDict:
    """Read a download; remove it from the cache if that fails."""
    try:
        return read_state_dict(path)
    except CheckpointError:
        path.unlink(missing_ok=True)
        raise
