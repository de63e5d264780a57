"""Vision transformers whose position embeddings and class tokens act in the attention only.

In an ordinary vision transformer these constants are added to the tokens, so part of each logit comes from them instead
of the image (`Explanation.bias`). With `BcosConfig(positions="attention")` they are added to queries and keys only,
which determine the weights of values, so the image explains the whole logit. Class tokens start at 0.

Each attention layer computes the constants itself from the model's parameters and the grid of tokens. A forward pass
stores nothing in the model, so passes in several threads, and passes that gradient checkpointing repeats, do not
interfere.

Rotary positions (EVA-02, DINOv3) rotate queries and keys and are not added to tokens, so they are not changed.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import timm_models
from ..errors import ModelStateError, UnsupportedModuleError
from ..nn.layers import BcosLinear
from ..nn.module_utils import clone, first_output

__all__ = ["POSITIONED", "PositionedQkv", "Positions", "attention_paths", "on_grid_of"]

POSITIONED = (timm_models.VisionTransformer, timm_models.Eva)  # models that add constants to tokens in `_pos_embed`

Grid = tuple[int, int]
_GRID: ContextVar[Grid] = ContextVar("grid of tokens in the block that is running")


class Positions:
    """A vision transformer's additive constants, which its attention layers share.

    Attributes:
        embedding: The model with the same parameters, but without layers other than the patch embedding and rotary
            positions. Dropout is applied to tokens outside of it.
    """

    def __init__(self, model: Any) -> None:
        self.embedding = clone(model)
        self.embedding.__dict__["_parameters"] = model._parameters
        needed = ("patch_embed", "rope")  # for the grid, and for rotary positions
        self.embedding.__dict__["_modules"] = {name: m for name, m in model._modules.items() if name in needed}
        self.embedding.__dict__["pos_drop"] = _no_dropout

    def tokens(self, like: Tensor) -> Tensor:
        """The constants (1, L, D) for the model's grid, or for that of the running block if the image size can vary."""
        model = self.embedding
        if not model.dynamic_img_size:
            rows, columns = model.patch_embed.grid_size
            return self._embed(like.new_zeros(1, rows * columns, model.embed_dim))
        grid = _GRID.get(None)
        if grid is None:
            raise ModelStateError("an attention layer ran by itself: with dynamic_img_size it needs the model's grid")
        return self._embed(like.new_zeros(1, *grid, model.embed_dim))

    def contents(self, patches: Tensor) -> Tensor:
        """Embedded patches (N, L, D) without the constants of the embedding, which is an affine map."""
        return self._embed(patches) - self._embed(patches.new_zeros((1,) + patches.shape[1:]))

    def _embed(self, patches: Tensor) -> Tensor:
        tokens: Tensor = first_output(self.embedding._pos_embed(patches))  # rotary positions come second
        return tokens


def _no_dropout(tokens: Tensor) -> Tensor:
    """Replaces the dropout. It is not a module, because `torch.fx` would look for that in the model."""
    return tokens


class PositionedQkv(BcosLinear):
    """Projection to queries, keys and values that adds the model's constants to queries and keys.

    Attributes:
        positions: Constants of the model.

    Shape: (N, L, D) to (N, L, 3 · D'), in the order queries, keys, values.
    """

    positions: Positions

    @classmethod
    def from_linear(cls, qkv: BcosLinear, positions: Positions) -> "PositionedQkv":
        """A clone of a layer, with the same parameters, that adds positions."""
        new = clone(qkv)
        new.__class__ = cls
        new.positions = positions  # type: ignore[assignment]
        return new  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.respond(x).chunk(3, dim=-1)
        query_position, key_position, _ = self.respond(self.positions.tokens(self.weight)).chunk(3, dim=-1)
        return torch.cat([query + query_position, key + key_position, value], dim=-1)


class _OnGrid(nn.Module):
    """A block for one forward pass, whose attention layers can read the grid of that pass (`_GRID`)."""

    def __init__(self, block: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.block = block
        self.grid = grid

    def forward(self, *args: object, **kwargs: object) -> object:
        token = _GRID.set(self.grid)
        try:
            return self.block(*args, **kwargs)
        finally:
            _GRID.reset(token)


def on_grid_of(blocks: nn.Sequential, patches: Tensor) -> nn.Sequential:
    """Blocks for the tokens of patches (N, H, W, D)."""
    return nn.Sequential(*(_OnGrid(block, (patches.shape[1], patches.shape[2])) for block in blocks))


def attention_paths(model: nn.Module) -> list[str]:
    """Paths of the projections to queries, keys and values in one of timm's vision transformers.

    Raises:
        UnsupportedModuleError: For any other model.
    """
    if isinstance(model, POSITIONED) and isinstance(model.patch_drop, nn.Identity | NoneType):
        paths = list(_projections(model))
        if paths:
            return paths
    problem = (
        f"(root): positions='attention' needs a vision transformer of timm's with qkv projections and no patch "
        f"dropout, not {type(model).__name__}; use positions='keep'"
    )
    raise UnsupportedModuleError([problem])


def _projections(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and getattr(module, "q_bias", None) is None:
            yield f"{name}.qkv"
