"""Models by name or from a checkpoint, for the command line and scripts."""

from collections.abc import Callable, Collection, Iterator, Mapping
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
from ..conversion.settings import adopt_logit_bias
from ..errors import BcosError, CheckpointError, InputError, NotFineTunedWarning, TargetError
from ..files import first_line
from ..weights.catalog import DEFAULT_MODEL, EMBEDDED, PUBLISHED
from ..weights.readers import load_state, read_state_dict, read_training_arguments
from ..weights.terms import derived_cfg, started_from, weights_name
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
    """A model created by timm, for type hints only: models are no instances of this class.

    Attributes:
        num_classes: Number of classes, K.
        in_chans: Number of image channels.
        pretrained_cfg: timm's pretrained cfg: source of the weights, and preprocessing of images.
    """

    num_classes: int
    in_chans: int
    pretrained_cfg: dict[str, Any]


class TimmBcosModel(BcosModel, TimmModel):
    """A converted model, for type hints only."""


Create = Callable[..., Any]  # creates a model from its name and timm's keywords

# Arguments of train.py that are fields of a pretrained cfg, and those that are arguments of the model.
DATA_ARGUMENTS = ("input_size", "crop_pct", "interpolation")
MODEL_ARGUMENTS = dict(gp="global_pool", bn_eps="bn_eps", bn_momentum="bn_momentum")


def load_model(name: str | None = None, checkpoint: Path | None = None, **conversion: object) -> TimmBcosModel:
    """Load a B-cos model with weights. Plain timm models are converted.

    Args:
        name: timm's name of the model. None for the model of a checkpoint of timm's train.py, or, without a checkpoint,
            for the model that comes with this package.
        checkpoint: File of weights, of the B-cos model or of the plain one; None for published weights.
        conversion: Fields of `BcosConfig` for a plain model; by default the conversion computes the same.

    Raises:
        CheckpointError: If weights cannot be read or do not fit, or if the checkpoint is of another model or B.
        InputError: If timm cannot create the model.
        TargetError: If timm does not know the name.
    """
    if checkpoint is None:
        return _with_published_weights(DEFAULT_MODEL if name is None else name, conversion)
    create = partial(create_model, conversion=conversion, checkpoint=checkpoint)
    return _with_weights(name, checkpoint, create, chosen=conversion)


def load_plain_model(name: str | None = None, checkpoint: Path | None = None) -> TimmModel:
    """Load a timm model with weights, without a conversion.

    Args:
        name: See `load_model`.
        checkpoint: See `load_model`.

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
    """Load a timm model, without a conversion, by its name or from a checkpoint.

    Args:
        choice: Path of a checkpoint, or timm's name of a model.
        name: timm's name of the model, for a checkpoint that does not contain it.

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
    """`timm.create_model`, followed by a conversion if the model is plain.

    Args:
        name: timm's name of the model.
        conversion: Fields of `BcosConfig` for a plain model; if empty, the conversion computes the same.
        checkpoint: Weights of the plain model, which bias="reference" needs for its shifts; None without them.
        kwargs: Arguments of `timm.create_model`.

    Raises:
        InputError: If timm cannot create the model, or its B is not that of `conversion`.
        TargetError: If timm does not know the name.
    """
    if architecture(name) in ENTRY_POINTS:
        model = _created(timm.create_model, name, **kwargs)
    else:
        overlay = kwargs.get("pretrained_cfg_overlay", {})
        statistics = {key: overlay.pop(key) for key in ("mean", "std") if key in overlay}  # for the stem
        changes = conversion or dict(b=1, bias=True)
        if changes.get("bias") == "reference" and checkpoint is not None and kwargs.get("device") != "meta":
            kwargs |= dict(pretrained=True, pretrained_cfg_overlay=overlay | dict(file=str(checkpoint)))
        model = _created(timm.create_model, "bcosify", arch=name, **{**statistics, **changes}, **kwargs)
    asked, own = conversion.get("b"), model.bcos_config.b
    if asked is not None and own != asked:
        raise InputError(f"{name} has B = {own:g}, not {asked:g}: leave B out, or name a plain timm model to convert")
    return model


def _created(create: Create, name: str, **kwargs: object) -> Any:
    """Call `create`; timm, the Hub's client and architectures raise errors of many types, which become `InputError`."""
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


def _with_weights(name: str | None, checkpoint: Path, create: Create, chosen: Collection[str] = ()) -> Any:
    weights, trained = read_state_dict(checkpoint), read_training_arguments(checkpoint)
    if trained is not None and {"model", "num_classes"} <= trained.keys():
        _refuse_another_name(name, trained, checkpoint)
        _warn_of_normalization(trained, checkpoint)
        model = _as_trained(trained, create, checkpoint)
        _set_probability(model, trained, chosen)
    elif name is None:
        raise CheckpointError(f"{checkpoint} does not say of which model it is: name it with --model")
    else:
        model = create(name, **_classes_of(weights, partial(create, name)))
    if isinstance(model, BcosModel):
        adopt_logit_bias(model, weights, chosen)
    load_state(model, weights, str(checkpoint))
    origin = started_from(trained or {})
    model.pretrained_cfg = derived_cfg(model.pretrained_cfg, origin and weights_name(origin))
    return model


def _set_probability(model: nn.Module, trained: dict[str, Any], chosen: Collection[str]) -> None:
    """Set the function from logits to probabilities to that of the training's loss, unless the user chose it."""
    is_chosen = "probability" in {*chosen, *(trained.get("model_kwargs") or {})}
    if isinstance(model, BcosModel) and trained.get("bce_loss") is not None and not is_chosen:
        model.bcos_config = model.bcos_config.change(probability="sigmoid" if _uses_bce(trained) else "softmax")


def _uses_bce(trained: dict[str, Any]) -> bool:
    """Whether train.py used binary cross-entropy: it ignores --bce-loss without smoothed or mixed targets."""
    is_mixed = trained.get("mixup") or trained.get("cutmix") or trained.get("cutmix_minmax")
    is_smoothed = trained.get("smoothing", 0.1)  # train.py's default
    return bool(trained["bce_loss"] and (is_mixed or is_smoothed) and not trained.get("jsd_loss"))


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
    """Refuse a name that is not the checkpoint's: weights of the same shapes may fit, but compute something else."""
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
    """The model that train.py created, with its preprocessing."""
    try:
        name, kwargs = _arguments_of(trained)
        return create(name, **kwargs)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: its training arguments describe no model that can be made: {first_line(error)}"
        ) from error


def _arguments_of(trained: dict[str, Any]) -> tuple[str, dict[str, object]]:
    name: str = trained["model"]
    names = DATA_ARGUMENTS if name.startswith("bcos") else (*DATA_ARGUMENTS, "mean", "std")
    fields = {key: trained[key] for key in names if trained.get(key)}
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    channels = trained.get("in_chans") or (trained.get("input_size") or (3,))[0]
    if trained.get("img_size"):
        overlay.setdefault("input_size", (channels, trained["img_size"], trained["img_size"]))
    shape = dict(num_classes=trained["num_classes"], in_chans=channels)
    given = {name: trained.get(key) for key, name in MODEL_ARGUMENTS.items()} | (trained.get("model_kwargs") or {})
    kwargs = {key: value for key, value in given.items() if value is not None}
    return name, dict(pretrained_cfg_overlay=overlay, **{**shape, **kwargs})


def _classes_of(weights: dict[str, Tensor], create: Create) -> dict[str, int]:
    """Arguments for the number of classes of a checkpoint; none if its weights have no classifier."""
    model = create(device="meta")
    head = model.get_classifier()
    name = next((n for n, m in model.named_modules() if m is head), "")
    found = weights.get(f"{name}.weight")
    if found is None or found.ndim == 0:
        return {}
    rows = found.shape[0]
    is_plain = found.shape != head.weight.shape and found.ndim != head.weight.ndim
    return dict(num_classes=rows if is_plain else rows // getattr(head, "max_out", 1))


@dataclass(frozen=True)
class Listed:
    """A registered model with one of its published weights.

    Attributes:
        name: timm's name of the model.
        tag: Tag of the weights; empty without weights.
        parameters: Number of parameters, in millions.
        top1: Published accuracy in percent; None if there is none.
        resize: Length to which the shorter side of images is resized, in pixels; None if it is not known.
        size: Height and width of the input, in pixels.
        note: Remark on weights that come with this package.
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
        """The name for `timm.create_model`."""
        return f"{self.name}.{self.tag}" if self.tag else self.name


def list_bcos_models(pattern: str = "*", *, pretrained: bool = False) -> Iterator[Listed]:
    """The registered models, a row per weight file, in the order of the papers.

    Args:
        pattern: Pattern of names, as in `timm.list_models`.
        pretrained: Whether to list only models with weights.
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
