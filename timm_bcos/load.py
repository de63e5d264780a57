"""Networks by name or from a checkpoint, and the names of their classes: what the command line and scripts share."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import timm.utils

from .checkpoints import load_weights, read_state_dict, read_training_arguments
from .embedded import DEFAULT_NETWORK
from .errors import CheckpointError, InputError, TargetError

__all__ = ["class_names", "create_model", "find_class", "load_model", "load_plain_model", "read_class_names"]

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
    if name.startswith(("hf-hub:", "local-dir:")) or (name.startswith("bcos") and timm.is_model(name)):
        return timm.create_model(name, **kwargs)
    if timm.is_model(name):
        overlay = kwargs.get("pretrained_cfg_overlay", {})
        statistics = {key: overlay.pop(key) for key in ("mean", "std") if key in overlay}  # which the stem takes over
        changes = conversion or dict(b=1, bias=True)
        return timm.create_model("bcosify", arch=name, **{**statistics, **changes}, **kwargs)
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    raise TargetError(f"timm knows no model {name!r}; close names: {', '.join(near) or 'none'}")


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


def class_names(network: Any, path: Path | None = None) -> list[str]:
    """Names of a network's classes: from a file, its cfg, or timm's ImageNet tables; numbers where there are none.

    Raises:
        InputError: If the file names another number of classes.
    """
    count = network.num_classes
    if path is not None:
        return read_class_names(path, count)
    labels = network.pretrained_cfg.get("label_names")
    if labels and len(labels) == count:
        return list(labels)
    if count == 1000:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(i).split(",")[0] for i in range(count)]
    return [f"class {i}" for i in range(count)]


def read_class_names(path: Path, count: int) -> list[str]:
    """Class names from a file, one a line, or from a directory, which has a directory of images per class.

    Raises:
        InputError: If there is neither, or with another number of classes than `count`.
    """
    try:
        names = _class_directories(path) if path.is_dir() else path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"no class names in {path}: {error}") from error
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} classes, the model has {count}")
    return names


def _class_directories(path: Path) -> list[str]:
    """In the order of timm's image folders."""
    return sorted((entry.name for entry in path.iterdir() if entry.is_dir()), key=timm.utils.natural_key)


def find_class(wanted: str, names: list[str], count: int) -> int:
    """The index of a class given by number, name, or a part of one name.

    Raises:
        TargetError: If there is none, or several.
    """
    if wanted.isdecimal():
        if int(wanted) < count:
            return int(wanted)
        raise TargetError(f"class {wanted}: the model has {count} classes, counted from 0")
    lower = [name.lower() for name in names]
    matches = [i for i, name in enumerate(lower) if name == wanted.lower()]
    matches = matches or [i for i, name in enumerate(lower) if wanted.lower() in name]
    if len(matches) == 1:
        return matches[0]
    near = [names[i] for i in matches[:5]] or difflib.get_close_matches(wanted.lower(), lower, n=3)
    problem = "several classes match" if matches else "no class is called"
    raise TargetError(f"{problem} {wanted!r}: {', '.join(near) or 'give its index'}")
