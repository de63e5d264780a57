"""Who adds what to an output: the image, the constants of the network, and what is neither.

With all dynamic weights fixed a network is linear in its image and in its additive constants (biases, shifts, position
embeddings, class tokens, literals) jointly. What a constant c that is added to y contributes to a logit is
gradient of the logit by y · c; multiplied by a factor α = 1 of each image it is d logit / d α, so that one backward
pass gives it for all images.

A value that depends on the image but is not on its linear path (a gate, a statistic) may scale the path. Where it is
*added* to it, it is neither the image's linear contribution nor a constant: the explanation is not exact. The same
holds for functions that nobody has declared. Both are noted with a factor of their own, whose gradient exists only if
an output depends on it: what adds to attention logits, which end in a gate, does no harm.
"""

import sys
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .table import Function

__all__ = ["Account", "AmbiguousBatch", "Defect"]


class AmbiguousBatch(Exception):  # noqa: N818  (a signal: the images are explained one by one instead)
    """A constant is added to a tensor whose layout does not tell which part belongs to which image."""


@dataclass(frozen=True)
class Defect:
    """A place where a network is not dynamic linear.

    Attributes:
        module: Path of the module whose forward calls the function, '' for the root.
        function: Name of the torch function.
        kind: 'added' for an image-dependent value that is added, 'unknown' for a function that is not declared,
            'unseen' for a program of which torch shows the result alone, read in `module`, and 'escaped' for a value
            that leaves torch as a number.
    """

    module: str
    function: str
    kind: str

    def __str__(self) -> str:
        where = self.module or "the network itself"
        return f"{where}: {TEXTS[self.kind].format(self.function)}"


TEXTS = {
    "added": "{} adds a value that depends on the image but is not on its linear path (a gate or a statistic)",
    "unknown": "{} is not known to be linear; tell with timm_bcos.declare what it is",
    "unseen": "reads what {} makes, a program that explanation mode does not see into",
    "escaped": "{} makes a number of a value that depends on the image",
}


class _Context(FunctionCtx):
    """What forward leaves to backward."""

    images: int
    saved_tensors: tuple[Tensor, ...]


class _Tap(torch.autograd.Function):
    """Passes y on as it is; the gradient of `factor` is what `addend`, a part of y, contributes for each image."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
        ctx.save_for_backward(addend)
        ctx.images = len(factor)
        ctx.mark_dirty(y)  # no view: layers that work in place may follow
        return y

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (addend,) = ctx.saved_tensors
        return grad, _by_image(grad, addend, ctx.images), None


class _Marked(torch.autograd.Function):
    """A constant as an operand that carries a gradient: `addend` times a factor for each image."""

    @staticmethod
    def forward(ctx: _Context, addend: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(addend)
        ctx.images = len(factor)
        return addend.clone()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (addend,) = ctx.saved_tensors
        return None, _by_image(grad, addend, ctx.images)


def _by_image(grad: Tensor, addend: Tensor, images: int) -> Tensor:
    """(N,) Σ grad · addend over all that belongs to an image, broadcasting the addend."""
    if grad.ndim == 0:
        return (grad * addend).reshape(1)
    addend = addend.reshape((1,) * (grad.ndim - addend.ndim) + addend.shape)
    axis = _image_axis(grad, images)
    grad, addend = grad.movedim(axis, 0), addend.movedim(axis, 0)
    repeated = [d for d in range(1, grad.ndim) if addend.shape[d] == 1 != grad.shape[d]]
    if repeated:  # first, so that the product is small
        grad = grad.sum(repeated, keepdim=True)
    product = grad * addend
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


class Account:
    """The factors of one forward pass.

    Args:
        model: The network that runs.
        images: N.
        like: A tensor of the dtype and device of the factors.

    Attributes:
        constants: (N,) factor of all additive constants.
        suspects: A factor and its defect for each place that adds what is no constant, or is not known.
        certain: Places where values leave torch, after which nobody can follow them.
    """

    def __init__(self, model: nn.Module, images: int, like: Tensor) -> None:
        self.model = model
        self.constants = self._factor(images, like)
        self.suspects: list[tuple[Tensor, Defect]] = []
        self.certain: list[Defect] = []

    @staticmethod
    def _factor(images: int, like: Tensor) -> Tensor:
        return like.new_ones(images).detach().requires_grad_()

    def tap(self, y: Tensor, addend: Tensor) -> Tensor:
        """Note that y, a result that nobody has seen yet, has a constant addend."""
        if y.ndim:
            _image_axis(y, len(self.constants))
        elif len(self.constants) > 1:
            raise AmbiguousBatch
        return _Tap.apply(y, self.constants, addend.detach())  # type: ignore[no-any-return]

    def mark(self, addend: Tensor) -> Tensor:
        """A constant operand, noted; it needs a place for each image, as class tokens have."""
        if len(self.constants) > 1 and (addend.ndim == 0 or addend.shape[0] % len(self.constants)):
            raise AmbiguousBatch
        return _Marked.apply(addend.detach(), self.constants)  # type: ignore[no-any-return]

    def suspect(self, y: Tensor, kind: str, func: Function | str, addend: Tensor | None = None) -> Tensor:
        """Note a result whose dependence on the image is not, or not known to be, a dynamic linear map.

        Args:
            y: The result.
            kind: Of the defect.
            func: What made it.
            addend: The part of y that is added; y itself then changes in place.
        """
        factor = self._factor(len(self.constants), self.constants)
        self.suspects.append((factor, self._defect(kind, func)))
        if addend is None:  # made by who knows what, which may need it unchanged
            return _Tap.apply(y.clone(), factor, y.detach())  # type: ignore[no-any-return]
        return _Tap.apply(y, factor, addend.detach())  # type: ignore[no-any-return]

    def escape(self, func: Function) -> None:
        """Note that a value has left torch."""
        self.certain.append(self._defect("escaped", func))

    def _defect(self, kind: str, func: Function | str) -> Defect:
        return Defect(_running_module(self.model), function_name(func), kind)


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
