"""Reading weight files safely: safetensors, or PyTorch files of plain tensors, never arbitrary pickles."""

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .formats import convert_official_weights, convert_plain_weights

__all__ = ["load_exactly", "load_weights", "read_state_dict", "read_training_arguments"]

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where timm's train.py and others put the weights


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` file or of a PyTorch file, timm's training checkpoints included.

    Raises:
        CheckpointError: For a missing, truncated or foreign file, naming it.
    """
    content = _read(Path(path))
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    is_mapping = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not is_mapping or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict (a mapping from names to tensors)")
    return {name.removeprefix("module."): value for name, value in content.items()}


def read_training_arguments(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The arguments of timm's train.py that made a checkpoint; None for other weight files.

    Raises:
        CheckpointError: For a missing, truncated or foreign file.
    """
    content = _read(Path(path))
    arguments = content.get("args") if isinstance(content, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else None


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        return _parse(path)
    except Exception as error:  # broken bytes may mean anything to the readers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no safetensors file nor PyTorch file of plain tensors: {reason}") from error


def _parse(path: Path) -> Any:
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
    """Load a checkpoint of this network, of the plain one that it was converted from, or of an official release.

    Raises:
        CheckpointError: If a name or shape differs, naming the first; the model keeps its weights.
    """
    weights = convert_official_weights(read_state_dict(path), model)
    load_exactly(model, convert_plain_weights(weights, model), str(path))


def load_exactly(model: nn.Module, weights: dict[str, Tensor], source: str, fresh: Collection[str] = ()) -> None:
    """Load a state dict whose names and shapes are the model's.

    Args:
        model: The network; changed only if everything fits.
        weights: Its state dict.
        source: Where they came from, for errors.
        fresh: Names that may be missing, and keep their initial values.

    Raises:
        CheckpointError: Naming the first difference.
    """
    own, kind = model.state_dict(), type(model).__name__
    for name, value in own.items():
        # files written before torch 0.4.1 lack the counters of batch norms
        if name in fresh or (name not in weights and name.endswith("num_batches_tracked")):
            continue
        if name not in weights:
            raise CheckpointError(f"{source} has no {name!r}, which this {kind} needs: another architecture?")
        if weights[name].shape != value.shape:
            found, wanted = tuple(weights[name].shape), tuple(value.shape)
            raise CheckpointError(f"{source} has {name!r} of shape {found}, this {kind} needs {wanted}")
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise CheckpointError(f"{source} has {unknown[0]!r}, which this {kind} does not know: another architecture?")
    model.load_state_dict(weights, strict=False)
