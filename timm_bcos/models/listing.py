"""The registered networks as rows of a table: names, weights, sizes, published accuracies."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import timm

from ..weights.catalogue import PUBLISHED
from ..weights.embedded import EMBEDDED
from .interface import TimmModel
from .networks import NETWORKS

__all__ = ["Listed", "list_networks"]


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


def list_networks(pattern: str = "*", *, pretrained: bool = False) -> Iterator[Listed]:
    """The registered networks, a row per weight file, in the order of the papers.

    Args:
        pattern: Of names, as in `timm.list_models`.
        pretrained: Only networks with weights.
    """
    for name in NETWORKS:
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
