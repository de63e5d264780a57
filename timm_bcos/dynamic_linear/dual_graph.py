"""Explanations that are trained: gates of the linear path are taken from a second stream, where they have gradients.

In explanation mode gates are constants, so that the gradient by the image is W(x). But W(x) depends on the parameters
through the weights on the path *and* through the gates. Inside `DualGraph` each tensor on the path has a counterpart
with the same values, computed from the image as in training, which the image's gradient does not reach. What
explanation mode takes for a constant is the counterpart: it stops the gradient by the image, and has one by the
parameters. W(x), a gradient by the image, can then be differentiated by the parameters in full.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .registry import METADATA, STREAMS, Function, named

__all__ = ["DualGraph"]

DRAWING = frozenset(
    named(
        "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu "
        "rrelu_ fractional_max_pool2d fractional_max_pool3d"
    )
)
WRITING = frozenset(named("__setitem__ __iadd__ __isub__ __imul__ __itruediv__"))


class DualGraph(TorchFunctionMode):
    """Computes each function of the path twice, on the path and beside it; explanation mode is entered inside.

    Args:
        leaf: The images, where the path begins.
    """

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self._counterparts = WeakIdKeyDictionary()
        self._counterparts[leaf] = leaf.detach()

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in METADATA or not _any(self.is_path, [*args, *kwargs.values()]):
            return func(*args, **kwargs)
        beside = _mapped(self.counterpart, [*args, *kwargs.values()])
        if _writes(func) and not self.is_path(args[0]):
            beside[0] = args[0].clone()
        names = list(kwargs)
        with _drawing_alike(args[0]) if func in DRAWING else nullcontext():
            usual = func(*beside[: len(args)], **dict(zip(names, beside[len(args) :], strict=True)))
        result = func(*args, **kwargs)
        if result is None and args:  # `x[i] = y`
            self._pair(args[0], beside[0])
        self._pair(result, usual)
        return result

    @contextmanager
    def active(self) -> Iterator["DualGraph"]:
        """Let handlers take gates from the second stream."""
        token = STREAMS.set(self)
        try:
            with self:
                yield self
        finally:
            STREAMS.reset(token)

    def is_path(self, x: Tensor) -> bool:
        """Whether x is on the linear path."""
        return x in self._counterparts

    def counterpart(self, x: Tensor) -> Tensor:
        """The same values in the second stream; of what is not on the path, x itself."""
        found: Tensor = self._counterparts.get(x, x)
        return found

    def leave(self, x: Tensor, value: Tensor) -> None:
        """Write a gate's value into a tensor of the path, which it then no longer is."""
        x.copy_(value)
        self._counterparts.pop(x, None)

    def _pair(self, result: object, usual: object) -> None:
        if isinstance(result, Tensor) and isinstance(usual, Tensor):
            if result.requires_grad:
                self._counterparts[result] = usual
        elif isinstance(result, list | tuple) and isinstance(usual, list | tuple):
            for one, other in zip(result, usual, strict=True):
                self._pair(one, other)


def _writes(func: Function) -> bool:
    name = func.__name__
    return func in WRITING or (name.endswith("_") and not name.endswith("__"))


@contextmanager
def _drawing_alike(x: Tensor) -> Iterator[None]:
    """What is drawn at random inside is drawn again after it."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _any(holds: Callable[[Tensor], bool], values: object) -> bool:
    if isinstance(values, Tensor):
        return holds(values)
    return isinstance(values, list | tuple) and any(_any(holds, value) for value in values)


def _mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if type(values) is list or type(values) is tuple:
        return type(values)(_mapped(function, value) for value in values)
    return values
