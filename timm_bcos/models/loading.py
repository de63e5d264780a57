"""Networks by name or from a checkpoint, and the names of their classes: what the command line and scripts share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, cast
from warnings import warn

import timm
import timm.utils
from timm.models import parse_model_name, split_model_name_tag
from torch import Tensor, nn

from ..conversion.converted import BcosModel
from ..errors import BcosError, CheckpointError, InputError, NotFineTunedWarning, TargetError
from ..files import first_line
from ..weights.catalog import DEFAULT_NETWORK, EMBEDDED, PUBLISHED
from ..weights.readers import load_state, read_state_dict, read_training_arguments
from .architectures import ARCHITECTURES
from .bcos_models import ENTRY_POINTS, architecture

__all__ = [
    "Listed",
    "TimmBcosModel",
    "TimmModel",
    "create_model",
    "list_bcos_models",
    "load_model",
    "load_named",
    "load_plain_model",
]


class TimmModel(nn.Module):
    """A network that timm has created; for hints alone, no network is an instance.

    Attributes:
        num_classes: K.
        in_chans: Image channels.
        pretrained_cfg: Where its weights are from, and how images are made ready for it.
    """

    num_classes: int
    in_chans: int
    pretrained_cfg: dict[str, Any]


class TimmBcosModel(BcosModel, TimmModel):
    """Such a network after its conversion."""


Create = Callable[..., Any]  # a network from its name and timm's keywords

# arguments of train.py that are fields of a pretrained cfg, and those that it hands to the network
DATA_ARGUMENTS = ("input_size", "crop_pct", "interpolation")
MODEL_ARGUMENTS = dict(gp="global_pool", bn_eps="bn_eps", bn_momentum="bn_momentum")


def load_model(name: str | None = None, checkpoint: Path | None = None, **conversion: object) -> TimmBcosModel:
    """A B-cos network with weights; a timm model is converted to one.

    Args:
        name: timm's. None for the one that a checkpoint of timm's train.py was trained as, or without a checkpoint for
            the network that comes with this package.
        checkpoint: Weights, of the B-cos network or of the plain one; None for the published ones.
        conversion: `BcosConfig` fields for a timm model; by default it computes the same as before.

    Raises:
        CheckpointError: For weights that cannot be had or do not fit, or a checkpoint that was trained as another
            network or at another B.
        InputError: For a network that timm cannot create.
        TargetError: For a name that timm does not know.
    """
    if checkpoint is None:
        return _with_published_weights(DEFAULT_NETWORK if name is None else name, conversion)
    return _with_weights(name, checkpoint, partial(create_model, conversion=conversion, checkpoint=checkpoint))


def load_plain_model(name: str | None = None, checkpoint: Path | None = None) -> TimmModel:
    """A timm model as it is, B-cos or not, with weights; arguments as in `load_model`.

    Raises:
        InputError: Without a name and a checkpoint.
    """
    if checkpoint is not None:
        return _with_weights(name, checkpoint, timm.create_model)
    if name is None:
        raise InputError("no model given: name one with --model, or give a checkpoint of train.py with --checkpoint")
    _check_hub(name)
    return _created(timm.create_model, name, pretrained=True)


def load_named(choice: str, name: str | None = None) -> TimmModel:
    """A model, B-cos or not, from one word: the path of a checkpoint, or a name of timm's.

    Args:
        choice: What to load.
        name: timm's name of the model, for checkpoints without one.

    Raises:
        CheckpointError: For weights that cannot be loaded.
        InputError: For a model that timm cannot create.
    """
    path = Path(choice)
    if not path.is_file():
        return load_plain_model(choice)
    arguments = read_training_arguments(path)
    return load_plain_model(None if arguments and "model" in arguments else name, path)


def create_model(
    name: str, conversion: Mapping[str, object], checkpoint: Path | None = None, **kwargs: Any
) -> TimmBcosModel:
    """`timm.create_model`, with plain networks converted.

    Args:
        name: timm's.
        conversion: `BcosConfig` fields for a plain network; without any it computes the same as before.
        checkpoint: Of the plain network, if gates are to begin at its answers to gray.
        kwargs: For `timm.create_model`.

    Raises:
        InputError: For a network that timm cannot create, or of another B than `conversion` asks for.
        TargetError: For a name that timm does not know.
    """
    if architecture(name) in ENTRY_POINTS:
        network = _created(timm.create_model, name, **kwargs)
    else:
        overlay = kwargs.get("pretrained_cfg_overlay", {})
        statistics = {key: overlay.pop(key) for key in ("mean", "std") if key in overlay}  # which the stem takes over
        changes = conversion or dict(b=1, bias=True)
        if changes.get("bias") == "reference" and checkpoint is not None and kwargs.get("device") != "meta":
            kwargs |= dict(pretrained=True, pretrained_cfg_overlay=overlay | dict(file=str(checkpoint)))
        network = _created(timm.create_model, "bcosify", arch=name, **{**statistics, **changes}, **kwargs)
    asked, own = conversion.get("b"), network.bcos_config.b
    if asked is not None and own != asked:
        raise InputError(f"{name} has B = {own:g}, not {asked:g}: leave B out, or name a plain timm model to convert")
    return network


def _created(create: Create, name: str, **kwargs: object) -> Any:
    """Errors of timm, the Hub's client and architectures are of many families."""
    try:
        return create(name, **kwargs)
    except BcosError:
        raise
    except Exception as error:
        raise InputError(f"cannot create {kwargs.get('arch', name)}: {first_line(error)}") from error


def _check_hub(name: str) -> None:
    """Fail fast if weights must be downloaded and the Hub cannot be reached: its client retries for a minute.

    Raises:
        InputError: If the Hub cannot be reached, and its cache has no files of the model.
    """
    from huggingface_hub import constants, get_session, snapshot_download

    source, identifier = parse_model_name(name)
    cfg = None if source else timm.get_pretrained_cfg(name, allow_unregistered=True)
    repo_id = identifier.partition("@")[0] if source == "hf-hub" else cfg and cfg.hf_hub_id
    if not repo_id:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the HTTP library; any response means that the Hub can be reached
        try:
            snapshot_download(repo_id, local_files_only=True)
        except Exception:
            raise InputError(
                f"the Hugging Face Hub cannot be reached ({first_line(error)}) and its cache has no files of {repo_id}"
            ) from error


def _with_weights(name: str | None, checkpoint: Path, create: Create) -> Any:
    weights, trained = read_state_dict(checkpoint), read_training_arguments(checkpoint)
    if trained is not None and {"model", "num_classes"} <= trained.keys():
        _refuse_another_name(name, trained, checkpoint)
        _warn_of_normalization(trained, checkpoint)
        network = _as_trained(trained, create, checkpoint)
    elif name is None:
        raise CheckpointError(f"{checkpoint} does not say of which network it is: name it with --model")
    else:
        network = create(name, **_classes_of(weights, partial(create, name)))
    load_state(network, weights, str(checkpoint))
    return network


def _warn_of_normalization(trained: dict[str, Any], checkpoint: Path) -> None:
    """B-cos models read pixels in [0, 1]. Plain models are normalized as in their training, without a warning."""
    given = {f"--{name}": trained[name] for name in ("mean", "std") if trained.get(name)}
    is_changed = any(value != plain for key, plain in (("--mean", 0), ("--std", 1)) for value in given.get(key, ()))
    if str(trained["model"]).startswith("bcos") and is_changed:
        options = " ".join(f"{option} {' '.join(map(str, values))}" for option, values in given.items())
        warn(
            f"{checkpoint} was trained with {options}, but B-cos models read pixels in [0, 1]: its predictions here "
            f"differ from those in training. Train again without --mean and --std",
            NotFineTunedWarning,
            stacklevel=2,
        )


def _refuse_another_name(name: str | None, trained: dict[str, Any], checkpoint: Path) -> None:
    """Another network may have weights of the same shapes, and another B: it would compute something else."""
    own = trained["model"]
    if name is None or split_model_name_tag(name)[0] == split_model_name_tag(str(own))[0]:
        return
    details = "".join(f", {key}={value}" for key, value in (trained.get("model_kwargs") or {}).items())
    raise CheckpointError(f"{checkpoint} was trained as {own}{details}, not as {name}: leave --model out")


def _with_published_weights(name: str, conversion: Mapping[str, object]) -> TimmBcosModel:
    try:
        _check_hub(name)
        return create_model(name, conversion, pretrained=True)
    except TargetError:
        raise
    except Exception as error:  # timm, the Hub client and urllib each raise their own
        raise CheckpointError(f"no weights for {name}: {first_line(error)}; give a file with --checkpoint") from error


def _as_trained(trained: dict[str, Any], create: Create, checkpoint: Path) -> TimmModel:
    """The network that train.py created; images are evaluated as there."""
    try:
        name, kwargs = _arguments_of(trained)
        return create(name, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: its training arguments describe no network that can be made: {first_line(error)}"
        ) from error


def _arguments_of(trained: dict[str, Any]) -> tuple[str, dict[str, object]]:
    name: str = trained["model"]
    names = DATA_ARGUMENTS if name.startswith("bcos") else (*DATA_ARGUMENTS, "mean", "std")
    given = {key: trained[key] for key in names if trained.get(key)}
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    channels = trained.get("in_chans") or (trained.get("input_size") or (3,))[0]
    if trained.get("img_size"):
        overlay.setdefault("input_size", (channels, trained["img_size"], trained["img_size"]))
    shape = dict(num_classes=trained["num_classes"], in_chans=channels)
    told = {name: trained.get(key) for key, name in MODEL_ARGUMENTS.items()} | (trained.get("model_kwargs") or {})
    kwargs = {key: value for key, value in told.items() if value is not None}
    return name, dict(pretrained_cfg_overlay=overlay, **{**shape, **kwargs})


def _classes_of(weights: dict[str, Tensor], create: Create) -> dict[str, int]:
    """A checkpoint may have been trained on other classes than the architecture's default."""
    network = create(device="meta")
    head = network.get_classifier()
    name = next((n for n, m in network.named_modules() if m is head), "")
    found = weights.get(f"{name}.weight")
    if found is None or found.ndim == 0:
        return {}
    rows = found.shape[0]
    is_plain = found.shape != head.weight.shape and found.ndim != head.weight.ndim
    return dict(num_classes=rows if is_plain else rows // getattr(head, "max_out", 1))


@dataclass(frozen=True)
class Listed:
    """A network, with one of its weights if it has any.

    Attributes:
        name: timm's.
        tag: Of the weights; empty where there are none.
        parameters: In millions.
        top1: Published accuracy in per cent, where there is one.
        resize: What images' shorter side is resized to, in pixels; None where the weights do not say it.
        size: Height and width of the input, in pixels.
        note: On weights that come with this package.
    """

    name: str
    tag: str
    parameters: float
    top1: float | None
    resize: int | None
    size: int
    note: str = ""

    @property
    def tagged_name(self) -> str:
        """What `timm.create_model` takes."""
        return f"{self.name}.{self.tag}" if self.tag else self.name


def list_bcos_models(pattern: str = "*", *, pretrained: bool = False) -> Iterator[Listed]:
    """The registered networks, a row per weight file, in the order of the papers.

    Args:
        pattern: Of names, as in `timm.list_models`.
        pretrained: Only networks with weights.
    """
    for name in ARCHITECTURES:
        tags = _tags(name)
        wanted = [tag for tag in tags or [""] if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.{tag}", pattern)]
        if wanted and (tags or not pretrained):
            yield from _rows(name, wanted)


def _tags(name: str) -> list[str]:
    embedded = [tag for known, _, tag in (tagged.partition(".") for tagged in EMBEDDED) if known == name]
    return embedded + [file.tag for file in PUBLISHED.get(name, ())]


def _rows(name: str, tags: list[str]) -> Iterator[Listed]:
    files = {file.tag: file for file in PUBLISHED.get(name, ())}
    for tag in tags:
        model = cast(TimmModel, timm.create_model(f"{name}.{tag}" if tag else name, device="meta"))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        size = model.pretrained_cfg["input_size"][-1]
        file = files.get(tag)
        top1, resize = (file.top1, file.resize) if file else (None, None)
        embedded = EMBEDDED.get(f"{name}.{tag}")
        note = f"comes with the package; {embedded['description']}" if embedded else ""
        yield Listed(name, tag, parameters, top1, resize, size, note)
