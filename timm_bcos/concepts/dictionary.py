"""A dictionary of concepts: directions that a layer's features are written in, and how much there is of each."""

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..files import atomic_path

__all__ = ["GATES", "Concepts"]

GATES = ("none", "top", "nearest")


@dataclass(frozen=True)
class Concepts:
    """K concepts of a layer with C channels: a feature vector a is Σ u_k · d_k + rest, where u = gate ⊙ (E · a).

    Without a gate, u is linear in a; a gate decides which concepts are there, and scales as a gate does: for its own
    image, u is linear in a in any case.

    Attributes:
        layer: Path of the layer, as in `model.named_modules()`.
        decoder: (K, C) rows d_k.
        encoder: (K, C) rows of E.
        gate: 'none'; 'top' for the `active` largest positive u of each position (FaCT, NeurIPS 2025, after k-sparse
            autoencoders, https://arxiv.org/abs/2406.04093); 'nearest' for the one with the largest cosine (clusters).
        active: Of 'top'.
        method: How the concepts were found, in a word.
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
            raise InputError(f"a decoder of shape {shapes[0]} and an encoder of shape {shapes[1]}: both are (K, C)")
        if not bool(self.decoder.isfinite().all() and self.encoder.isfinite().all()):
            raise InputError("a concept holds numbers that are not finite")
        if self.gate not in GATES:
            raise InputError(f"gate={self.gate!r}: one of {', '.join(GATES)}")
        if self.gate == "top" and not 1 <= self.active <= len(self):
            raise InputError(f"active={self.active}: between 1 and the number of concepts, {len(self)}")

    @classmethod
    def from_matrix(cls, layer: str, directions: Tensor, method: str = "matrix") -> "Concepts":
        """Concepts along given directions (K, C), with the coefficients of least squares.

        What the directions do not span is the remainder of every decomposition.
        """
        if directions.ndim != 2 or not directions.is_floating_point():
            raise InputError(f"directions of shape {tuple(directions.shape)}: give a floating-point matrix (K, C)")
        if bool((directions == 0).all(1).any()):
            raise InputError("a concept's direction is 0")
        return cls(layer, directions, torch.linalg.pinv(directions.double()).T.to(directions), method=method)

    @classmethod
    def of_channels(cls, layer: str, channels: int) -> "Concepts":
        """Each channel as a concept."""
        return cls(layer, torch.eye(channels), torch.eye(channels), method="channels")

    def __len__(self) -> int:
        return len(self.decoder)

    def to(self, like: Tensor) -> "Concepts":
        """On the device and in the dtype of a tensor."""
        return replace(self, decoder=self.decoder.to(like), encoder=self.encoder.to(like))

    def scores(self, features: Tensor) -> Tensor:
        """(N, K, P) E · a, before the gate, for features (N, C, P)."""
        return torch.einsum("kc,ncp->nkp", self.encoder, features)

    def gates(self, features: Tensor) -> Tensor:
        """(N, K, P) which concepts are there: 0 or 1, for features (N, C, P)."""
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
        """(N, K, P) how strongly each concept is there, for features (N, C, P)."""
        return self.gates(features) * self.scores(features)

    def decode(self, strengths: Tensor) -> Tensor:
        """(N, C, P) the part of the features that concepts (N, K, P) make up."""
        return torch.einsum("kc,nkp->ncp", self.decoder, strengths)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        notes = dict(layer=self.layer, gate=self.gate, active=str(self.active), method=self.method)
        tensors = dict(decoder=self.decoder.contiguous().cpu(), encoder=self.encoder.contiguous().cpu())
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, notes)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Concepts":
        """Read what `save` has written.

        Raises:
            InputError: For any other file.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                notes = file.metadata() or {}
                matrices = {name: file.get_tensor(name) for name in ("decoder", "encoder")}
            active = int(notes["active"])
            return cls(notes["layer"], **matrices, gate=notes["gate"], active=active, method=notes["method"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: no concepts that timm-bcos has saved ({error})") from error
