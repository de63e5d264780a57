"""Pretrained weights: from wherever a timm cfg says, verified, read safely, and refused with a reason."""

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
from ..conversion.inspection import name_in_backbone
from ..conversion.settings import contradictions, in_words, is_settings
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
    """Fetch a weight file into the cache, with a progress bar, unless it is there; verify it in either case.

    Args:
        url: An address whose last part names the file, or an address and a name. Ten hex digits (8 to 64) after a dash
            at the end of the name are the start of its SHA-256.
        cache_dir: None for torch's cache.

    Returns:
        Where the file is.

    Raises:
        CheckpointError: Without network, or for a file with other contents, which is removed.
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
    """Compare with the digits in the file's name; where there are none, tell what came."""
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
) -> None:
    """Load what a pretrained cfg points at; a classifier for other classes than the cfg's stays fresh.

    Args:
        model: The network; changed only if everything fits.
        cfg: timm's pretrained cfg, as a dict.
        convert: Turns other formats into the model's.
        cache_dir: Where downloads go; None for torch's and the Hugging Face Hub's caches.
        changed: Settings that the user has chosen for this network: other ones of the weights are no mistake then, but
            the beginning of a training.

    Raises:
        CheckpointError: If nothing can be had, verified or read, or it is of another network or another function.
    """
    source, weights = _read(cfg, cache_dir)
    image_channels = (cfg.get("input_size") or (3,))[0]
    weights = adapt_image_channels(convert(dict(weights), model), model, image_channels)
    if model.num_classes == 0:
        weights = _without_head(weights, model, cfg.get("classifier"))
    fresh = set() if model.num_classes == cfg.get("num_classes") else _heads_of_other_size(weights, model)
    weights = {key: value for key, value in weights.items() if key not in fresh}
    load_exactly(model, _allow(weights, model, changed, source), source, fresh)


def _allow(weights: StateDict, model: Any, changed: Collection[str], source: str) -> StateDict:
    """The weights without their settings, if those differ only where the user has chosen so; that is told."""
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


def fill_backbone(backbone: nn.Module, network: nn.Module) -> None:
    """Give one of timm's feature backbones the weights of the whole network, whose layers are called otherwise there.

    Raises:
        CheckpointError: If the network lacks some.
    """
    own = backbone.state_dict()
    found = {
        name_in_backbone(name, own): value for name, value in network.state_dict().items() if not is_settings(name)
    }
    missing = [name for name in own if name not in found and not is_settings(name)]
    if missing:
        raise CheckpointError(f"the whole {type(network).__name__} has no {missing[0]!r}, which its backbone needs")
    backbone.load_state_dict({name: value for name, value in found.items() if name in own})


def _read(cfg: dict[str, Any], cache_dir: str | Path | None) -> tuple[str, StateDict]:
    """The weights, and their source in words; which source counts is timm's order."""
    origin, file, hub_id = cfg.get("source"), cfg.get("file"), cfg.get("hf_hub_id")
    if origin == "local-dir":
        return str(file), _told(str(file), lambda: private.load_state_dict_from_path(str(file)))
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
    return source, _told(source, lambda: load_state_dict_from_hf(hub_id, **name, cache_dir=cache_dir))


def _told(source: str, read: Callable[[], StateDict]) -> StateDict:
    """The Hub's client and timm raise errors of many families; ours names the source."""
    try:
        return read()
    except Exception as error:
        raise CheckpointError(f"cannot load weights from {source}: {first_line(error)}; or {BY_HAND}") from error


def _read_or_remove(path: Path) -> StateDict:
    """A download that cannot be read must not stay in the cache."""
    try:
        return read_state_dict(path)
    except CheckpointError:
        path.unlink(missing_ok=True)
        raise
