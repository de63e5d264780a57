"""Explanation mode: inside it, autograd sees the network as the linear map that it is for its current input.

Outputs stay what they are; only the graph that autograd records changes. Everything that depends on the input but is
not the linear path is treated as a constant (detached): cosine factors, norm statistics, attention weights, gates.
One backward pass from a logit then gives that logit's row of W(x) exactly (section 3.2.1 of arXiv 2205.10268).

How each torch function is rewritten stands in a table (`timm_bcos.dynamic.table`), which covers functions inside
forwards as well as modules. A tensor is on the linear path when it requires a gradient: the mode hands parameters to
functions detached, so only the image's path does. Nothing of the network is changed, and the mode acts in the thread
that entered it alone.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelStateError
from .account import Account, function_name
from .table import (
    ESCAPING,
    METADATA,
    SHAPED,
    STREAMS,
    TABLE,
    Function,
    Handler,
    Operand,
    declare,
    detached,
    on_linear_path,
)

__all__ = ["DynamicLinearMode", "constant", "declare", "explanation_mode", "on_linear_path"]


class Kind(IntEnum):
    """How a tensor depends on the image; of several operands the highest counts."""

    CONSTANT = 0
    GATE = 1  # depends on the image, off the linear path
    PATH = 2


@dataclass(frozen=True)
class _Known:
    reference: weakref.ref[Tensor]
    kind: Kind
    maker: str


class DynamicLinearMode(TorchFunctionMode):
    """Looks every torch function up in the table and keeps account of what it adds.

    Args:
        leaf: The images that are differentiated by; every other leaf is a constant. None where they are not known:
            then parameters alone are.
        account: Where to note constants and defects; None notes nothing.
        table: How functions are rewritten.
    """

    def __init__(
        self,
        leaf: Tensor | None = None,
        account: Account | None = None,
        table: Mapping[Function, Handler] = TABLE,
    ) -> None:
        super().__init__()
        self.leaf, self.account, self.table = leaf, account, table
        self._known: dict[int, _Known] = {}
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        if leaf is not None:
            self._remember(leaf, Kind.PATH)

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in METADATA or _ACTIVE.get() is not self:
            return func(*args, **kwargs)
        args = [self._frozen(value) for value in args]
        kwargs = {name: self._frozen(value) for name, value in kwargs.items()}
        kind = max(map(self._kind, _tensors([*args, *kwargs.values()])), default=Kind.CONSTANT)
        if func in SHAPED:
            return func(*map(detached, args), **kwargs)
        if kind is not Kind.PATH:
            result = func(*args, **kwargs)
        elif func in self.table:
            result = self.table[func](self, func, *args, **kwargs)
        else:
            result = self._suspected(func(*args, **kwargs), func)
        if kind is not Kind.CONSTANT and self.account is not None:
            self._note(args[0] if result is None and args else result, func)  # `x[i] = y` returns nothing
        return result

    def _frozen(self, value: object) -> object:
        """Parameters are constants, whose gradients nobody wants."""
        if isinstance(value, Tensor):
            if not value.requires_grad or value is self.leaf or STREAMS.get() is not None:
                return value
            if value.grad_fn is None and (self.leaf is not None or isinstance(value, nn.Parameter)):
                return value.detach()
            return self.seen(value)
        if type(value) is list or type(value) is tuple:
            return type(value)(self._frozen(item) for item in value)
        return value

    def seen(self, x: Tensor) -> Tensor:
        """A tensor on the path; one that no function which the mode saw has made is replaced by one under suspicion."""
        known = self._known.get(id(x))
        if self.account is None or (known is not None and known.kind is Kind.PATH):
            return x
        if id(x) not in self._replaced:
            name = type(x.grad_fn).__name__.partition("Backward")[0]
            self._replaced[id(x)] = x, self.account.suspect(x, "unseen", name)
            self._remember(self._replaced[id(x)][1], Kind.PATH)
        return self._replaced[id(x)][1]

    def _kind(self, x: Tensor) -> Kind:
        if on_linear_path(x):
            return Kind.PATH
        return self._known[id(x)].kind if id(x) in self._known else Kind.CONSTANT

    def is_gate(self, x: object) -> bool:
        """Whether x depends on the image without being on its path."""
        return isinstance(x, Tensor) and not x.requires_grad and id(x) in self._known

    def maker(self, x: Tensor) -> str:
        """Name of the function that made a gate."""
        return self._known[id(x)].maker if id(x) in self._known else "a constant"

    def _remember(self, x: Tensor, kind: Kind, maker: str = "") -> None:
        key, known = id(x), self._known
        known[key] = _Known(weakref.ref(x, lambda _: known.pop(key, None)), kind, maker)

    def _note(self, result: object, func: Function) -> None:
        """Remember how results depend on the image."""
        for x in _tensors([result]):
            self._remember(x, Kind.PATH if x.requires_grad else Kind.GATE, function_name(func))
        if func in ESCAPING and self.account is not None:
            self.account.escape(func)

    def _suspected(self, result: object, func: Function) -> object:
        if self.account is None:
            return result
        if isinstance(result, Tensor):
            return self.account.suspect(result, "unknown", func) if result.requires_grad else result
        if isinstance(result, list | tuple):
            return type(result)([self._suspected(item, func) for item in result])
        return result

    # For handlers.

    def call(self, func: Function, *args: object) -> Any:
        """A function inside a handler, as this mode's table has it: torch calls it without the mode."""
        return self.table[func](self, func, *args)

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object, is_gate: bool | None = None) -> Tensor:
        """Account for what a fresh result y contains beside the linear path.

        Args:
            y: The result.
            addend: A tensor that broadcasts to y, or a number.
            func: What added it.
            sources: Tensors that the addend was made of; none if it is one of the operands itself.
            is_gate: Whether the addend depends on the image, where a change in place has made the sources forget it.
        """
        if self.account is None or on_linear_path(addend) or not on_linear_path(y):
            return y
        if not isinstance(addend, Tensor):
            return self.account.tap(y, y.detach().new_full((), addend)) if addend else y
        if any(map(self.is_gate, sources or (addend,))) if is_gate is None else is_gate:
            return self.account.suspect(y, "added", func, addend)
        return self.account.tap(y, addend)

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path, as a class token is."""
        if self.account is None or on_linear_path(value):
            return value
        if self.is_gate(value):
            return self.account.suspect(value.detach().clone().requires_grad_() * 1, "added", func, value)
        return self.account.mark(value)


def _tensors(values: Iterable[object]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


_ACTIVE: ContextVar[DynamicLinearMode | None] = ContextVar("explanation mode of this thread", default=None)


def constant(value: Tensor) -> Tensor:
    """Mark an additive constant in a handler of your own, so that `explain` can tell what it contributes.

    Args:
        value: What the handler adds to the linear path, of any shape.
    """
    mode = _ACTIVE.get()
    return value if mode is None or mode.account is None else mode.account.mark(value)


@contextmanager
def active(mode: DynamicLinearMode) -> Iterator[DynamicLinearMode]:
    """Let a mode act, and it alone: others that are under way in this thread wait."""
    token = _ACTIVE.set(mode)
    try:
        with mode:
            yield mode
    finally:
        _ACTIVE.reset(token)


@contextmanager
def paused() -> Iterator[None]:
    """Let no mode act: what follows is no part of a network that is being explained."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager in which gradients of `model` are rows of its linear map W(x).

    Every torch function that this thread calls inside the block is affected, so apply losses and sigmoids outside.
    Neither the model nor other threads notice. Blocks nest.

    Args:
        model: A B-cos network in evaluation mode.

    Raises:
        ModelStateError: For a model with gradient checkpointing, whose backward pass would run without this mode.

    Examples:
        >>> with explanation_mode(model):
        ...     contributions = captum.attr.InputXGradient(model).attribute(timm_bcos.encode_image(x, 3), target=c)
    """
    if any(getattr(module, "grad_checkpointing", False) is True for module in model.modules()):
        raise ModelStateError("gradient checkpointing is on: call model.set_grad_checkpointing(False) first")
    if _ACTIVE.get() is not None:
        yield model
        return
    with active(DynamicLinearMode()):
        yield model
