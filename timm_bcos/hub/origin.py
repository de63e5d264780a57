"""From which network on the Hub the training of another one started."""

from pathlib import Path

import timm
from timm.models import parse_model_name

from ..weights.readers import read_training_arguments

__all__ = ["find_base_model"]

OTHER_WEIGHTS = ("pretrained_path", "initial_checkpoint")  # of train.py: files, of which nobody knows the origin


def find_base_model(name: str | None = None, checkpoint: Path | None = None) -> str | None:
    """The 'ORGANISATION/NAME' of the weights that a network was made from, or None if that is not known.

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
