"""License terms of weights that were trained from published ones: they inherit license and notes."""

from typing import Any

import timm
from timm.models import parse_model_name

__all__ = ["derived_cfg", "started_from", "weights_name"]

OTHER_WEIGHTS = ("pretrained_path", "initial_checkpoint")  # arguments of train.py for files of unknown origin
ORIGIN = "fine-tuned from "  # start of the note that names the published weights
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


def derived_cfg(cfg: dict[str, Any], origin: str | None) -> dict[str, Any]:
    """The pretrained cfg of weights after training: with the terms of the published weights, but not their description.

    Args:
        cfg: Pretrained cfg of the model.
        origin: Name of the published weights; None if the terms are unknown.

    Returns:
        A new cfg. Its license is None if the terms are unknown.
    """
    notes = tuple(cfg.get("notes") or ()) if origin else ()
    is_named = any(note.startswith(ORIGIN) for note in notes)
    if origin and not is_named:
        notes = (ORIGIN + origin, *notes)
    license = cfg.get("license") if origin else None
    return {**cfg, **dict.fromkeys(DROPPED), "license": license, "notes": notes}
