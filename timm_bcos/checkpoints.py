"""Reading weight files safely: safetensors, or PyTorch files of plain tensors, never arbitrary pickles."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bcos_models import convert_plain_weights
from .errors import CheckpointError

__all__ = ["load_weights", "read_state_dict"]

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where timm's train.py and others put the weights


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` file or of a PyTorch file, timm's training checkpoints included.

    Raises:
        CheckpointError: For a missing, truncated or foreign file, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = _read(path)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is no safetensors file nor PyTorch file of plain tensors: {reason}") from error
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict (a mapping from names to tensors)")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _read(path: Path) -> Any:
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
    """Load a checkpoint of this network, or of the plain one that it was converted from.

    Raises:
        CheckpointError: If a name or shape differs, naming the first; the model keeps its weights.
    """
    state_dict = convert_plain_weights(read_state_dict(path), model)
    own = model.state_dict()
    for name, value in own.items():
        if name not in state_dict:
            raise CheckpointError(f"{path} has no {name!r}, which {type(model).__name__} needs: another architecture?")
        if state_dict[name].shape != value.shape:
            found, wanted = tuple(state_dict[name].shape), tuple(value.shape)
            raise CheckpointError(f"{path} has {name!r} of shape {found}, {type(model).__name__} needs {wanted}")
    unknown = [name for name in state_dict if name not in own]
    if unknown:
        raise CheckpointError(f"{path} has {unknown[0]!r}, which {type(model).__name__} does not know")
    model.load_state_dict(state_dict)
