"""Transformers whose position embeddings and class tokens steer the attention only.

In a transformer as it is, such constants are added to the tokens, so that part of every logit is theirs and not the
image's (`Explanation.bias`). With `BcosConfig(positions="attention")` they enter queries and keys, which only weigh the
values: the image then explains the whole logit. A token that is nothing but a constant, like a class token, starts at 0
and collects what it attends to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from ..nn.layers import BcosLinear
from ..nn.modules import clone

__all__ = ["PositionedQkv", "Positions", "attention_blocks", "confine_positions"]


class Positions:
    """The constants of the forward pass under way, shared by a network's attention layers; never copied nor saved."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"tokens": None}

    def split_off(self, embed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Embed tokens without the constants that `embed`, an affine map, adds; those are kept for the attention."""
        self.tokens = embed(x.detach() * 0)
        return embed(x) - self.tokens


class PositionedQkv(BcosLinear):
    """A projection to queries, keys and values whose queries and keys also see the positions.

    Attributes:
        positions: What `Positions.split_off` left.

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
        tokens = self.positions.tokens
        if tokens is None:
            raise RuntimeError("the attention ran without the network's embedding before it")
        query, key, value = self.respond(x).chunk(3, dim=-1)
        query_position, key_position, _ = self.respond(tokens).chunk(3, dim=-1)
        return torch.cat([query + query_position, key + key_position, value], dim=-1)


def attention_blocks(model: Any) -> list[Any]:
    """The attention layers of a vision transformer in timm's manner, with `_pos_embed` and `qkv` projections.

    Raises:
        UnsupportedModuleError: For any other network.
    """
    blocks = [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear)]
    drops_patches = not isinstance(getattr(model, "patch_drop", None), nn.Identity)
    if blocks and hasattr(model, "_pos_embed") and not drops_patches:
        return blocks
    problem = (
        f"(root): positions='attention' needs a vision transformer with _pos_embed, qkv projections and no patch "
        f"dropout, not {type(model).__name__}; use positions='keep'"
    )
    raise UnsupportedModuleError([problem])


def confine_positions(model: Any) -> None:
    """Let a converted vision transformer's constants act in its attention only; see this module's description."""
    model.positions = Positions()
    for block in attention_blocks(model):
        block.qkv = PositionedQkv.from_linear(block.qkv, model.positions)
