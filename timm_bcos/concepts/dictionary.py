"""A dictionary of concepts: directions of a layer's features, and the coefficients of features along them."""

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError
from ..files import atomic_path

__all__ = ["GATES", "Concepts"]

GATES = ("none", "top", "nearest")


@dataclass(frozen=True)
class Concepts:
    """K concepts of a layer with C channels: a feature vector a is Σ u_k · d_k + rest, where u = gate ⊙ (E · a).

    The gate is 0 or 1 and selects the active concepts. For a given image it is constant, so u is linear in a.

    Attributes:
        layer: Path of the layer, as in `model.named_modules()`.
        decoder: Directions d_k, rows of a matrix (K, C).
        encoder: Matrix E (K, C).
        gate: 'none'; 'top' for the `active` largest positive coefficients of each position (FaCT, NeurIPS 2025, after
            k-sparse autoencoders, https://arxiv.org/abs/2406.04093); 'nearest' for the concept with the largest cosine
            (clusters).
        active: Number of active concepts per position, for the gate 'top'.
        method: Name of the method that found the concepts.
    """

    layer: str
    decoder: Tensor
    encoder: Tensor
    gate: str = "none"
    active: int = 0
    method: str = "matrix"

    def __post_init__(self) -> None:
        shapes = [tuple(matrix.shape) for matrix in (self.decoder, self.encoder)]
        if self.decoder.ndim != 2 or shapes[0] != shapes[1] or 0 in shapes[0]:
            raise InputError(f"decoder {shapes[0]}, encoder {shapes[1]}: give two matrices of the same shape (K, C)")
        if not bool(self.decoder.isfinite().all() and self.encoder.isfinite().all()):
            raise InputError("decoder or encoder has numbers that are not finite")
        if self.gate not in GATES:
            raise InputError(f"gate={self.gate!r}: choose one of {', '.join(GATES)}")
        if self.gate == "top" and not 1 <= self.active <= len(self):
            raise InputError(f"active={self.active}: give a number from 1 to the number of concepts, {len(self)}")

    @classmethod
    def from_matrix(cls, layer: str, directions: Tensor, method: str = "matrix") -> "Concepts":
        """Concepts along given directions (K, C), with least-squares coefficients.

        Decompositions report the part of the features outside their span as the rest.
        """
        if directions.ndim != 2 or not directions.is_floating_point():
            raise InputError(f"directions of shape {tuple(directions.shape)}: give a floating-point matrix (K, C)")
        if bool((directions == 0).all(1).any()):
            raise InputError("a direction is 0: leave it out")
        return cls(layer, directions, torch.linalg.pinv(directions.double()).T.to(directions), method=method)

    @classmethod
    def of_channels(cls, layer: str, channels: int) -> "Concepts":
        """Each channel as a concept."""
        return cls(layer, torch.eye(channels), torch.eye(channels), method="channels")

    def __len__(self) -> int:
        return len(self.decoder)

    def to(self, like: Tensor) -> "Concepts":
        """Convert to the device and dtype of a tensor."""
        return replace(self, decoder=self.decoder.to(like), encoder=self.encoder.to(like))

    def scores(self, features: Tensor) -> Tensor:
        """Coefficients E · a (N, K, P) before the gate, for features (N, C, P)."""
        return torch.einsum("kc,ncp->nkp", self.encoder, features)

    def gates(self, features: Tensor) -> Tensor:
        """Gates (N, K, P), 1 for active concepts and 0 otherwise, for features (N, C, P)."""
        if self.gate == "nearest":
            unit = torch.nn.functional.normalize(self.decoder, dim=1)
            cosines = torch.einsum("kc,ncp->nkp", unit, features)
            return torch.zeros_like(cosines).scatter_(1, cosines.argmax(1, keepdim=True), 1.0)
        scores = self.scores(features)
        if self.gate == "none":
            return torch.ones_like(scores)
        best = scores.topk(self.active, dim=1).indices
        return torch.zeros_like(scores).scatter_(1, best, 1.0) * (scores > 0)

    def encode(self, features: Tensor) -> Tensor:
        """Coefficients (N, K, P) after the gate, for features (N, C, P)."""
        return self.gates(features) * self.scores(features)

    def decode(self, strengths: Tensor) -> Tensor:
        """Features (N, C, P) from coefficients (N, K, P)."""
        return torch.einsum("kc,nkp->ncp", self.decoder, strengths)

    def save(self, path: str | PathLike[str]) -> None:
        """Save as a safetensors file."""
        notes = dict(layer=self.layer, gate=self.gate, active=str(self.active), method=self.method)
        tensors = dict(decoder=self.decoder.contiguous().cpu(), encoder=self.encoder.contiguous().cpu())
        with atomic_path(path) as temporary:
            temporary.write_bytes(_with_sorted_header(save(tensors, notes)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Concepts":
        """Load a file from `save`.

        Raises:
            InputError: If it is another file.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                notes = file.metadata() or {}
                matrices = {name: file.get_tensor(name) for name in ("decoder", "encoder")}
            active = int(notes["active"])
            return cls(notes["layer"], **matrices, gate=notes["gate"], active=active, method=notes["method"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a file of concepts from timm-bcos ({error})") from error


def _with_sorted_header(contents: bytes) -> bytes:
    """The contents of a safetensors file with a sorted header, so that equal concepts are equal files."""
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.dumps(json.loads(contents[8:end]), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors are aligned
    return len(header).to_bytes(8, "little") + header + contents[end:]
