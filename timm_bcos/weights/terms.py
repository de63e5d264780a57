"""License terms of weights that were trained from published ones: they inherit license and notes."""

from typing import Any

import timm
from timm.models import parse_model_name

__all__ = ["derived_cfg", "origin_of", "started_from", "weights_name"]

OTHER_WEIGHTS = ("pretrained_path", "initial_checkpoint")  # arguments of train.py for files of unknown origin
ORIGIN = "base model: "  # start of the note that names the published weights
DROPPED = (
    "tag", "description", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source",
)  # fmt: skip


def weights_name(name: str) -> str:
    """The name of published weights with their tag, for instance 'resnet50.a1_in1k'.

    Args:
        name: timm's name of the model with or without a tag, 'hf-hub:ORG/NAME' or 'local-dir:PATH'.
    """
    source, place = parse_model_name(name)
    cfg = None if source else timm.get_pretrained_cfg(place, allow_unregistered=True)
    return f"{place.partition('.')[0]}.{cfg.tag}" if cfg and cfg.tag else name


def started_from(trained: dict[str, Any]) -> str | None:
    """The published weights that a training with timm's train.py started from.

    Args:
        trained: Arguments of train.py, as in its checkpoints.

    Returns:
        timm's name of the model, as given; None if it started from random weights or from a file.
    """
    if not trained.get("pretrained") or any(trained.get(key) for key in OTHER_WEIGHTS):
        return None
    kwargs = trained.get("model_kwargs") or {}
    return str(kwargs.get("arch", trained.get("model")))


def origin_of(cfg: dict[str, Any]) -> str | None:
    """The name of the published weights that a model was trained from, as `derived_cfg` noted it; None if unknown."""
    notes = [str(note) for note in cfg.get("notes") or ()]
    return next((note.removeprefix(ORIGIN) for note in notes if note.startswith(ORIGIN)), None)


def derived_cfg(cfg: dict[str, Any], origin: str | None) -> dict[str, Any]:
    """The pretrained cfg of weights after training: with the terms of the published weights, but not their description.

    Args:
        cfg: Pretrained cfg of the model.
        origin: Name of the published weights; None if the terms are unknown.

    Returns:
        A new cfg. Its license is None if the terms are unknown.
    """
    if origin is None:
        terms = dict(license=None, notes=())
    else:
        notes = tuple(cfg.get("notes") or ())
        terms = dict(license=cfg.get("license"), notes=notes if origin_of(cfg) else (ORIGIN + origin, *notes))
    return {**cfg, **dict.fromkeys(DROPPED), **terms}
