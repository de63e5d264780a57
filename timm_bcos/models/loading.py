"""Networks by name or from a checkpoint, and the names of their classes: what the command line and scripts share."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.utils

from ..errors import CheckpointError, InputError, TargetError
from ..weights.embedded import DEFAULT_NETWORK
from ..weights.readers import load_weights, read_state_dict, read_training_arguments
from .bcos_models import ENTRY_POINTS, architecture

__all__ = ["create_model", "load_model", "load_plain_model"]

# arguments of train.py that are fields of a pretrained cfg, and those that it hands to the network
DATA_ARGUMENTS = ("input_size", "crop_pct", "interpolation")
MODEL_ARGUMENTS = dict(gp="global_pool", bn_eps="bn_eps", bn_momentum="bn_momentum")


def load_model(name: str | None = None, checkpoint: Path | None = None, **conversion: Any) -> Any:
    """A B-cos network with weights; a timm model is converted to one.

    Args:
        name: timm's. None for the one that a checkpoint of timm's train.py was trained as, or without a checkpoint for
            the network that comes with this package.
        checkpoint: Weights, of the B-cos network or of the plain one; None for the published ones.
        conversion: `BcosConfig` fields for a timm model; by default it computes the same as before.

    Raises:
        CheckpointError: For weights that cannot be had or do not fit.
        TargetError: For a name that timm does not know.
    """
    if checkpoint is None:
        return _with_published_weights(name or DEFAULT_NETWORK, conversion)
    return _with_weights(name, checkpoint, partial(create_model, conversion=conversion))


def load_plain_model(name: str | None = None, checkpoint: Path | None = None) -> Any:
    """A timm model as it is, B-cos or not, with weights; arguments as in `load_model`.

    Raises:
        InputError: Without a name and a checkpoint.
    """
    if checkpoint is not None:
        return _with_weights(name, checkpoint, timm.create_model)
    if name is None:
        raise InputError("no network given: name one with --model, or give a checkpoint of train.py with --checkpoint")
    return timm.create_model(name, pretrained=True)


def create_model(name: str, conversion: dict[str, Any], **kwargs: Any) -> Any:
    """`timm.create_model`, with plain networks converted.

    Args:
        name: timm's.
        conversion: `BcosConfig` fields for a plain network; without any it computes the same as before.
        kwargs: For `timm.create_model`.
    """
    if architecture(name) in ENTRY_POINTS:
        return timm.create_model(name, **kwargs)
    overlay = kwargs.get("pretrained_cfg_overlay", {})
    statistics = {key: overlay.pop(key) for key in ("mean", "std") if key in overlay}  # which the stem takes over
    changes = conversion or dict(b=1, bias=True)
    return timm.create_model("bcosify", arch=name, **{**statistics, **changes}, **kwargs)


def _with_weights(name: str | None, checkpoint: Path, create: Callable[..., Any]) -> Any:
    if name is not None:
        network = create(name, **_classes_of(checkpoint, partial(create, name)))
    else:
        trained = read_training_arguments(checkpoint)
        if trained is None or not {"model", "num_classes"} <= trained.keys():
            raise CheckpointError(f"{checkpoint} does not say of which network it is: name it with --model")
        network = _as_trained(trained, create)
    load_weights(network, checkpoint)
    return network


def _with_published_weights(name: str, conversion: dict[str, Any]) -> Any:
    try:
        return create_model(name, conversion, pretrained=True)
    except TargetError:
        raise
    except Exception as error:  # timm, the Hub client and urllib each raise their own
        raise CheckpointError(
            f"no weights for {name}: {str(error).splitlines()[0]}; give a file with --checkpoint"
        ) from error


def _as_trained(trained: dict[str, Any], create: Callable[..., Any]) -> Any:
    """The network that train.py created; images are evaluated as there."""
    names = DATA_ARGUMENTS if trained["model"].startswith("bcos") else (*DATA_ARGUMENTS, "mean", "std")
    given = {key: trained[key] for key in names if trained.get(key)}
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    channels = trained.get("in_chans") or (trained.get("input_size") or (3,))[0]
    if trained.get("img_size"):
        overlay.setdefault("input_size", (channels, trained["img_size"], trained["img_size"]))
    shape = dict(num_classes=trained["num_classes"], in_chans=channels)
    told = {name: trained.get(key) for key, name in MODEL_ARGUMENTS.items()} | trained.get("model_kwargs", {})
    kwargs = {key: value for key, value in told.items() if value is not None}
    return create(trained["model"], pretrained_cfg_overlay=overlay, **{**shape, **kwargs})


def _classes_of(checkpoint: Path, create: Callable[..., Any]) -> dict[str, Any]:
    """A checkpoint may have been trained on other classes than the architecture's default."""
    weights = read_state_dict(checkpoint)
    network = create(device="meta")
    head = network.get_classifier()
    name = next((n for n, m in network.named_modules() if m is head), "")
    found = weights.get(f"{name}.weight")
    if found is None:
        return {}
    rows = found.shape[0]
    is_plain = found.shape != head.weight.shape and found.ndim != head.weight.ndim
    return dict(num_classes=rows if is_plain else rows // getattr(head, "max_out", 1))
