"""Transformers whose position embeddings and class tokens steer the attention only.

In a transformer as it is, such constants are added to the tokens, so that part of every logit is theirs and not the
image's (`Explanation.bias`). With `BcosConfig(positions="attention")` they enter queries and keys, which only weigh the
values: the image then explains the whole logit. A token that is nothing but a constant, like a class token, starts at 0
and collects what it attends to.

No forward pass leaves anything behind for the attention layers to find. Each computes the constants anew, from the
network's parameters and the grid of tokens, so that forward passes of several threads, and those that gradient
checkpointing repeats, do not see each other.

Rotary positions (EVA-02, DINOv3) turn queries and keys and are added to nothing, so they stay as they are.
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

POSITIONED = (
    timm_models.VisionTransformer,
    timm_models.Eva,
)  # networks that add constants to their tokens in `_pos_embed`

Grid = tuple[int, int]
_GRID: ContextVar[Grid] = ContextVar("grid of the tokens that the running block has")


class Positions:
    """A vision transformer's additive constants, from its parameters; shared by its attention layers.

    Attributes:
        embedding: The network with the same parameters, always, but with no layers besides the patch embedding, whose
            grid it asks for, and rotary positions. Dropout acts on the tokens' contents, outside.
    """

    def __init__(self, model: Any) -> None:
        self.embedding = clone(model)
        self.embedding.__dict__["_parameters"] = model._parameters
        asked = ("patch_embed", "rope")  # for the grid, and for rotary positions
        self.embedding.__dict__["_modules"] = {name: m for name, m in model._modules.items() if name in asked}
        self.embedding.__dict__["pos_drop"] = _whole

    def tokens(self, like: Tensor) -> Tensor:
        """The constants (1, L, D) of the network's grid, or of the running block's where grids vary."""
        model = self.embedding
        if not model.dynamic_img_size:
            rows, columns = model.patch_embed.grid_size
            return self._embed(like.new_zeros(1, rows * columns, model.embed_dim))
        grid = _GRID.get(None)
        if grid is None:
            raise ModelStateError("an attention layer ran by itself: with dynamic_img_size it needs the network's grid")
        return self._embed(like.new_zeros(1, *grid, model.embed_dim))

    def contents(self, patches: Tensor) -> Tensor:
        """What the network's embedding, an affine map, makes of patches without its constants, (N, L, D)."""
        return self._embed(patches) - self._embed(patches.new_zeros((1,) + patches.shape[1:]))

    def _embed(self, patches: Tensor) -> Tensor:
        tokens: Tensor = first_output(self.embedding._pos_embed(patches))  # rotary positions come second
        return tokens


def _whole(tokens: Tensor) -> Tensor:
    """What stands for the dropout; no module, which `torch.fx` would look for in the network."""
    return tokens


class PositionedQkv(BcosLinear):
    """A projection to queries, keys and values whose queries and keys also see the positions.

    Attributes:
        positions: Of the network.

    Shape: (N, L, D) to (N, L, 3 · D'), queries and keys first.
    """

    positions: Positions

    @classmethod
    def from_linear(cls, qkv: BcosLinear, positions: Positions) -> "PositionedQkv":
        """The same layer, parameters included, with positions."""
        new = clone(qkv)
        new.__class__ = cls
        new.positions = positions  # type: ignore[assignment]
        return new  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.respond(x).chunk(3, dim=-1)
        query_position, key_position, _ = self.respond(self.positions.tokens(self.weight)).chunk(3, dim=-1)
        return torch.cat([query + query_position, key + key_position, value], dim=-1)


class _OnGrid(nn.Module):
    """A block for one forward pass: whoever runs it, and when, its attention finds the grid of that pass."""

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
    """The blocks, for tokens that come from patches (N, H, W, D)."""
    return nn.Sequential(*(_OnGrid(block, (patches.shape[1], patches.shape[2])) for block in blocks))


def attention_paths(model: nn.Module) -> list[str]:
    """The attention layers' projections to queries, keys and values in a vision transformer of timm's.

    Raises:
        UnsupportedModuleError: For any other network.
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
