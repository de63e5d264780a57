"""Reading weight files safely: safetensors, or PyTorch files of plain tensors, never arbitrary pickles."""

import argparse
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.converted import BcosModel
from ..conversion.settings import is_settings, refuse_contradictions
from ..errors import CheckpointError
from ..files import first_line
from .formats import convert_official_weights, convert_plain_weights

__all__ = ["load_exactly", "load_state", "load_weights", "read_state_dict", "read_training_arguments"]

_logger = logging.getLogger(__name__)

AVERAGED = ("state_dict_ema", "model_ema")
NESTED = (*AVERAGED, "state_dict", "model")  # where timm's train.py and others put the weights


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` file or of a PyTorch file, including timm's training checkpoints.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, damaged, or not a file of weights.
    """
    content = _weights_in(_read(Path(path)), path)
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, content.items())):
        raise CheckpointError(f"{path} holds no state dict (a mapping from names to tensors)")
    for name, value in content.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "a meta tensor, without values" if value.is_meta else f"a {value.layout} {value.dtype} tensor"
            raise CheckpointError(f"{path} has {name!r} as {kind}: save plain dense tensors")
    return {_without_wrappers(name): value for name, value in content.items()}


def _without_wrappers(name: str) -> str:
    """A name without the prefixes of DataParallel and torch.compile."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _weights_in(content: object, path: str | os.PathLike[str]) -> object:
    """The weights of a checkpoint; of several, the averaged ones, as in timm."""
    if not isinstance(content, dict):
        return content
    found = [key for key in NESTED if isinstance(content.get(key), dict)]
    if not found:
        return content
    if found[0] in AVERAGED and len(found) > 1:
        _logger.warning("%s: taking its averaged (EMA) weights, %r, not %r", path, found[0], found[-1])
    return content[found[0]]


def read_training_arguments(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the arguments of timm's train.py from a checkpoint; None for other weight files.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is missing, damaged, or not a file of weights.
    """
    content = _read(Path(path))
    arguments = content.get("args") if isinstance(content, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else None


def _read(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        return _parse(path)
    except Exception as error:  # damaged files cause errors of many types
        raise CheckpointError(
            f"{path} is no safetensors file nor PyTorch file of plain tensors: {first_line(error)}"
        ) from error


def _parse(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    with torch.serialization.safe_globals([argparse.Namespace]):  # train.py stores its arguments
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint of a model, of the plain model that it was converted from, or of an official release.

    Args:
        model: The model, which is changed only if everything fits.
        path: The file.

    Raises:
        CheckpointError: If the file cannot be read, or if a name or shape differs.
    """
    load_state(model, read_state_dict(path), str(path))


def load_state(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights that have been read; see `load_weights`.

    Args:
        model: The model, which is changed only if everything fits.
        weights: State dict of the model, of the plain model or of an official release.
        source: Source of the weights, for errors.

    Raises:
        CheckpointError: If a name or shape differs.
    """
    names = {_without_wrappers(name): name for name in model.state_dict()}  # the model may be compiled, too
    weights = {names.get(name, name): value for name, value in weights.items()}
    try:
        converted = convert_plain_weights(convert_official_weights(weights, model), model)
    except (IndexError, RuntimeError, ValueError) as error:  # fitting names with other shapes
        raise CheckpointError(
            f"{source} is of another model than {type(model).__name__}: {first_line(error)}"
        ) from error
    load_exactly(model, converted, source)


def load_exactly(model: nn.Module, weights: dict[str, Tensor], source: str, fresh: Collection[str] = ()) -> None:
    """Load a state dict whose names and shapes must be the model's.

    Args:
        model: The model, which is changed only if everything fits.
        weights: State dict of the model.
        source: Source of the weights, for errors.
        fresh: Names that may be missing, whose values stay.

    Raises:
        CheckpointError: If names, shapes or settings differ; it names the first difference.
    """
    if isinstance(model, BcosModel):
        refuse_contradictions(model, model.bcos_config, weights, source=source)
    own, kind = model.state_dict(), type(model).__name__
    for name, value in own.items():
        if name not in fresh and not is_settings(name):
            _check_weight(name, weights, value, source, kind)
    unknown = [name for name in weights if name not in own and not is_settings(name)]
    if unknown:
        raise CheckpointError(f"{source} has {unknown[0]!r}, which this {kind} does not know: another architecture?")
    model.load_state_dict(weights, strict=False)


def _check_weight(name: str, weights: dict[str, Tensor], own: Tensor, source: str, kind: str) -> None:
    """Refuse a weight that is missing or does not fit."""
    if name not in weights:
        if name.endswith("num_batches_tracked"):  # missing in files written before torch 0.4.1
            return
        raise CheckpointError(f"{source} has no {name!r}, which this {kind} needs: another architecture?")
    if weights[name].shape != own.shape:
        found, wanted = tuple(weights[name].shape), tuple(own.shape)
        raise CheckpointError(f"{source} has {name!r} of shape {found}, this {kind} needs {wanted}")
    _refuse_wrong_numbers(weights[name], own, f"{source} has {name!r}")


def _refuse_wrong_numbers(value: Tensor, own: Tensor, found: str) -> None:
    """Refuse numbers that can be loaded, but make no sense in a model."""
    if not own.is_floating_point():
        return
    if not value.is_floating_point():
        raise CheckpointError(
            f"{found} in {value.dtype}, not in floating point: quantized weights must be restored first"
        )
    if own.isfinite().all() and not value.isfinite().all():
        what = "values that are not numbers (NaN)" if value.isnan().any() else "infinite values"
        raise CheckpointError(f"{found} with {what}: its training diverged, or the file is damaged")
