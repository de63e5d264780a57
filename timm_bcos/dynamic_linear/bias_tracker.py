"""Who adds what to an output: the image, the constants of the model, and what is neither.

With all dynamic weights fixed a model is linear in its image and in its additive constants (biases, shifts, position
embeddings, class tokens, literals) jointly. What a constant c that is added to y contributes to a logit is
gradient of the logit by y · c; multiplied by a factor α = 1 of each image it is d logit / d α, so that one backward
pass gives it for all images.

A value that depends on the image but is not on its linear path (a gate, a statistic) may scale the path. Where it is
*added* to it, it is neither the image's linear contribution nor a constant: the explanation is not exact. The same
holds for functions that are not known. Both are noted with a factor of their own, whose gradient exists only if an
output depends on it: what adds to attention logits, which end in a gate, does no harm.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .boundaries import Boundary
from .kinds import is_zero, within_transforms
from .registry import Function
from .violations import Violation

__all__ = ["AmbiguousBatch", "BiasTracker", "Noted", "by_image", "changed_constants", "function_name"]


class AmbiguousBatch(Exception):  # noqa: N818  (a signal: the images are explained one by one instead)
    """A constant is added to a tensor whose layout does not tell which part belongs to which image."""

    violations: tuple[Violation, ...] = ()


class _Context(FunctionCtx):
    """What forward leaves to backward."""

    images: int
    addend: Tensor


class _Tap(torch.autograd.Function):
    """Passes y on as it is; the gradient of `factor` is what `addend`, a part of y, contributes for each image."""

    @staticmethod
    def forward(y: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y, factor, ctx.addend = inputs
        ctx.images = len(factor)
        ctx.mark_dirty(y)  # no view: layers that work in place may follow

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, by_image(grad, ctx.addend, ctx.images), None

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None, ...], y: Tensor, factor: Tensor, addend: Tensor) -> object:
        """`torch.vmap`'s dimension in front, where those of an addend broadcast behind it."""
        y = y.movedim(in_dims[0] or 0, 0).clone()
        if in_dims[2] is not None:
            addend = addend.movedim(in_dims[2], 0)
            addend = addend.reshape(len(addend), *(1,) * (y.ndim - addend.ndim), *addend.shape[1:])
        return _Tap.apply(y, factor, addend), 0


class _Marked(torch.autograd.Function):
    """A constant as an operand that carries a gradient: `addend` times a factor for each image."""

    @staticmethod
    def forward(addend: Tensor, factor: Tensor) -> Tensor:
        return addend.clone()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.addend, ctx.images = inputs[0], len(inputs[1])

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor]:
        return None, by_image(grad, ctx.addend, ctx.images)

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None, ...], addend: Tensor, factor: Tensor) -> object:
        return _Marked.apply(addend.movedim(in_dims[0] or 0, 0), factor), 0


def by_image(grad: Tensor, addend: Tensor, images: int) -> Tensor:
    """(N,) Σ grad · addend over all that belongs to an image, broadcasting the addend."""
    if grad.is_complex():  # torch's gradient of a real value by z is conjugate
        grad = grad.conj()
    if grad.ndim == 0:
        product = grad * addend
        return (product.real if product.is_complex() else product).reshape(1)
    addend = addend.reshape((1,) * (grad.ndim - addend.ndim) + addend.shape)
    axis = _image_axis(grad, images)
    grad, addend = grad.movedim(axis, 0), addend.movedim(axis, 0)
    repeated = [d for d in range(1, grad.ndim) if addend.shape[d] == 1 != grad.shape[d]]
    if repeated:  # first, so that the product is small
        grad = grad.sum(repeated, keepdim=True)
    product = torch.where(grad == 0, 0, grad * addend)  # infinities that nobody has taken
    return (product.real if product.is_complex() else product).reshape(images, -1).sum(1)


def _image_axis(y: Tensor, images: int) -> int:
    """Where the images lie: in front, or second where a sequence's positions come first.

    A wrong guess does not go unnoticed: contributions do not add up, and `explain` takes images one by one.
    """
    for axis, size in enumerate(y.shape[:2]):
        if size and size % images == 0:
            return axis
    if images == 1:
        return 0
    raise AmbiguousBatch


@dataclass(frozen=True)
class Noted:
    """A constant as it was added.

    Attributes:
        function: Name of the function that added it.
        values: Tensors and numbers that it was computed from.
        place: Module that added it; None if places are not recorded.
        offset: Offset of the part to which it was added in place.
    """

    function: str
    values: tuple[object, ...]
    place: Violation | None
    offset: int = 0

    def is_zero(self) -> bool:
        """Whether it adds nothing, so that it does not matter whether the function was called."""
        return all(is_zero(v) if isinstance(v, Tensor) else not v for v in self.values)

    def is_like(self, other: "Noted") -> bool:
        """Whether both may be the same call."""
        return self.function == other.function and len(self.values) == len(other.values)

    def equals(self, other: "Noted") -> bool:
        """Whether both are the same numbers, to the last bit; of uniform tensors the shape may differ."""
        return self.offset == other.offset and all(map(_is_same, self.values, other.values))


def _is_same(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (one == other or (one != one and other != other))  # NaN
    if one.shape == other.shape:
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    values = torch.cat([one.reshape(-1), other.reshape(-1)])
    return bool((values == values[0]).all()) if len(values) else True


class BiasTracker:
    """The factors of one forward pass.

    Args:
        model: The model that runs.
        images: N.
        like: A tensor of the dtype and device of the factors.
        names_places: Whether constants are noted with the module that adds them, which takes time.

    Attributes:
        constants: (N,) factor of all additive constants.
        suspects: A factor and its violation for each place that adds what is no constant, or is not known.
        boundaries: Boundaries at which the image is read, in the order of execution.
        noted: Recorded constants, in the order of execution.
        has_escaped: Whether a value that depends on the image has left torch, as a number or a shape.
        needs_another_image: Whether something was booked as a constant that only another image can show to be one.
    """

    def __init__(self, model: nn.Module, images: int, like: Tensor, names_places: bool = False) -> None:
        self.model = model
        self.constants = self._factor(images, like)
        self.suspects: list[tuple[Tensor, Violation]] = []
        self.boundaries: list[Boundary] = []
        self.noted: list[Noted] = []
        self.has_escaped = self.needs_another_image = False
        self._names_places = names_places

    @staticmethod
    def _factor(images: int, like: Tensor) -> Tensor:
        dtype = like.dtype.to_real() if like.is_complex() else like.dtype
        return torch.ones(images, dtype=dtype, device=like.device, requires_grad=True)

    def note_escape(self) -> None:
        """Remember that a value that depends on the image may have become a number or a shape."""
        self.has_escaped = self.needs_another_image = True

    def note(self, func: Function, values: Sequence[object], is_given: bool, offset: int = 0) -> None:
        """Remember a constant, to be compared with what another image gives.

        Args:
            func: Function that adds it.
            values: Tensors and numbers that it is made of; nobody changes them later.
            is_given: Whether it is made of parameters and buffers alone, as they are.
            offset: Offset of the part that it is added to.
        """
        if not is_given:
            self.needs_another_image = True
        place = self.place(func, "changes") if self._names_places else None
        made_of = tuple(within_transforms(value) if isinstance(value, Tensor) else value for value in values)
        self.noted.append(Noted(function_name(func), made_of, place, offset))

    def tap(self, y: Tensor, addend: Tensor) -> Tensor:
        """Note that y, a result that nobody has seen yet, has a constant addend."""
        whole = within_transforms(y)
        if whole.ndim:
            _image_axis(whole, len(self.constants))
        elif len(self.constants) > 1:
            raise AmbiguousBatch
        return _Tap.apply(y, self.constants, addend.detach())

    def mark(self, addend: Tensor) -> Tensor:
        """A constant operand, noted; it needs a place for each image, as class tokens have."""
        whole = within_transforms(addend)
        if len(self.constants) > 1 and (whole.ndim == 0 or len(whole) % len(self.constants)):
            raise AmbiguousBatch
        return _Marked.apply(addend.detach(), self.constants)

    def suspect(self, y: Tensor, kind: str, func: Function | str, addend: Tensor | None = None) -> Tensor:
        """Note a result whose dependence on the image is not, or not known to be, a dynamic linear map.

        Args:
            y: The result.
            kind: Kind of the violation.
            func: Function that computed it.
            addend: The part of y that is added; y itself then changes in place.
        """
        factor = self._factor(len(self.constants), self.constants)
        self.suspects.append((factor, self.place(func, kind)))
        if addend is None:  # made by who knows what, which may need it unchanged
            return _Tap.apply(y.clone(), factor, y.detach())
        return _Tap.apply(y, factor, addend.detach())

    def place(self, func: Function | str, kind: str = "unknown") -> Violation:
        """The module whose code is running, as a violation."""
        return Violation(_running_module(self.model), function_name(func), kind)


def changed_constants(one: BiasTracker, other: BiasTracker) -> list[Violation]:
    """What was booked as a constant, but is not the same for two images.

    Args:
        one: Tracker of the forward pass of one image.
        other: Tracker of another image's, with `names_places`.
    """
    here, there = ([noted for noted in tracker.noted if not noted.is_zero()] for tracker in (one, other))
    found: list[Violation] = []
    for mine, yours in zip_longest(here, there):
        if mine is None or yours is None or not mine.is_like(yours):
            place = yours or mine
            found.append(replace(place.place or Violation("", place.function, "calls"), kind="calls"))
            break  # from here on the two passes cannot be compared
        if not mine.equals(yours):
            found.append(yours.place or Violation("", yours.function, "changes"))
    readings = zip(one.boundaries, other.boundaries, strict=False)
    if len(one.boundaries) != len(other.boundaries) or not all(a.loses_as(b) for a, b in readings):
        found.append(Violation("", "its shares of white differ", "reads"))
    return list(dict.fromkeys(found))


def function_name(func: Function | str) -> str:
    """The name of a torch function; of an attribute's getter, the attribute's."""
    if isinstance(func, str):
        return func
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _running_module(model: nn.Module) -> str:
    """Path of the innermost module whose code is running in this thread.

    Read from the call stack: hooks on modules would be seen by whoever else uses them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return names[id(owner)]
        frame = frame.f_back
    return ""
