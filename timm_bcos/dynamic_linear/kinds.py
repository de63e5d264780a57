"""How a tensor depends on the image, remembered by the memory that holds it, so that views inherit it."""

import weakref
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

from .._compat import private

__all__ = ["Kind", "Kinds", "is_zero", "memory_key", "records_graph", "within_transforms"]

StorageWeakRef = private.StorageWeakRef


class Kind(IntEnum):
    """How a value depends on the image; of several operands the highest counts."""

    CONSTANT = 0  # a parameter or buffer of the model, or made of such
    UNVERIFIED = 1  # believed to be constant, since nothing shows that it depends on the image
    GATE = 2  # depends on the image, off the linear path
    PATH = 3  # on the linear path, behind what reads the image
    IMAGE = 4  # on the linear path, before what reads the image


class Kinds:
    """The kind of what each storage holds.

    A tensor that requires a gradient is on the linear path; one that shares memory with such a tensor, but requires no
    gradient (`detach`, `torch.no_grad`), is a gate.
    """

    def __init__(self) -> None:
        self._found: dict[int, _Content] = {}

    def get(self, x: Tensor) -> Kind:
        """Kind of a tensor; UNVERIFIED for one that nobody has set, or that was changed since."""
        known = self._known(x)
        stored = Kind.UNVERIFIED if known is None else known.kind
        if records_graph(x):
            return Kind.IMAGE if stored is Kind.IMAGE else Kind.PATH
        if stored is Kind.CONSTANT and not self.is_current(x):
            return Kind.UNVERIFIED
        return min(stored, Kind.GATE)

    def is_current(self, x: Tensor) -> bool:
        """Whether the kind of this memory is known, and nothing else has written to it since."""
        known = self._known(x)
        return known is not None and known.version == _version(x) and known.on_path >= records_graph(x)

    def is_stale(self, x: Tensor) -> bool:
        """Whether something else has written to this memory since its kind was set."""
        return self._known(x) is not None and not self.is_current(x)

    def set(self, x: Tensor, kind: Kind, maker: str = "") -> None:
        """Say what a tensor's memory holds from now on, and which function has written it."""
        self._found[memory_key(x)] = _Content(_reference(x), kind, maker, _version(x), records_graph(x))

    def maker(self, x: Tensor) -> str:
        """Name of the function that wrote a tensor's memory."""
        known = self._known(x)
        return known.maker if known else ""

    def _known(self, x: Tensor) -> "_Content | None":
        known = self._found.get(memory_key(x))
        if known is not None and isinstance(known.owner, weakref.ref) and known.owner() is not x:
            return None
        return known


@dataclass(frozen=True)
class _Content:
    owner: Any
    kind: Kind
    maker: str
    version: int
    on_path: bool  # an autograd function of somebody's own computes off the path, and returns what is on it


def _version(x: Tensor) -> int:
    x = within_transforms(x)
    return 0 if x.is_inference() else x._version


def memory_key(x: Tensor) -> int:
    """The same for all tensors that share memory; of tensors without memory of their own (sparse ones), the object's.

    Addresses are not used again while `Kinds` holds a weak reference to them.
    """
    x = within_transforms(x)
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(x)


def within_transforms(x: Tensor) -> Tensor:
    """The tensor that `torch.func` has wrapped."""
    while private.is_functorch_wrapped_tensor(x):
        x = private.get_unwrapped(x)
    return x


def records_graph(x: Tensor) -> bool:
    """Whether autograd records what becomes of a tensor; `torch.vmap` hides that from `requires_grad`."""
    return within_transforms(x).requires_grad


def is_zero(x: Tensor) -> bool:
    """Whether a tensor holds zeros alone."""
    return not bool(within_transforms(x).any())


def _reference(x: Tensor) -> Any:
    x = within_transforms(x)
    try:
        return StorageWeakRef(x.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return weakref.ref(x)
