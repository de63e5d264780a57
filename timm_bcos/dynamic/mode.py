"""Explanation mode: inside it, autograd sees the model as the linear map that it is for its current input.

Outputs stay what they are; only the graph that autograd records changes. Everything that depends on the input but is
not the linear path is treated as a constant (detached): cosine factors, norm statistics, attention weights, gates.
One backward pass from a logit then gives that logit's row of W(x) exactly (section 3.2.1 of arXiv 2205.10268).

How each torch function is rewritten stands in a table (`timm_bcos.dynamic.table`), which covers functions inside
forwards as well as modules. A tensor is on the linear path when it requires a gradient: the mode hands parameters to
functions detached, so only the image's path does. The model is not changed, and the mode acts only in the thread that
entered it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import BcosError, ModelStateError
from ..nn.functional import encode_image
from .account import Account, AmbiguousBatch, function_name
from .kinds import Kind, Kinds, memory_key
from .table import (
    COUNTING,
    EMPTY,
    ESCAPING,
    FIXED,
    JOINING,
    METADATA,
    OVERWRITING,
    STATIC,
    STREAMS,
    TABLE,
    VALUES_FROM,
    Function,
    Handler,
    Operand,
    declare,
    detached,
    named,
    on_linear_path,
    out_of_place,
    reads_shape,
    tensors_in,
    writes_to,
)
from .views import PARTS, as_single_views

__all__ = ["DynamicLinearMode", "constant", "declare", "explanation_mode", "on_linear_path"]


class DynamicLinearMode(TorchFunctionMode):
    """Looks every torch function up in the table and keeps account of what it adds.

    Args:
        leaf: The images that are differentiated by; every other leaf is a constant. None where they are not known:
            then only parameters are.
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
        self.kinds = Kinds()
        self.heeds_hooks = False  # of saved tensors
        self.eps = 0.0 if leaf is None else torch.finfo(leaf.dtype).eps  # of the narrowest type on the path
        self._parameters: set[int] = set()
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        if account is not None and leaf is not None:
            for tensor in (*account.model.parameters(), *account.model.buffers()):
                self.kinds.set(tensor, Kind.CONSTANT)
            self._parameters.update(map(memory_key, account.model.parameters()))
            self.kinds.set(leaf, Kind.IMAGE)

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in METADATA or _ACTIVE.get() is not self:
            return func(*args, **kwargs)
        if self.account is not None and kwargs.get("out") is not None:
            return self._into(kwargs["out"], func, args, {n: v for n, v in kwargs.items() if n != "out"})
        args = [self._frozen(value) for value in args]
        kwargs = {name: self._frozen(value) for name, value in kwargs.items()}
        if self.account is None:
            on_path = any(map(on_linear_path, tensors_in([*args, *kwargs.values()])))
            return self._rewritten(func, args, kwargs) if on_path else func(*args, **kwargs)
        values = _values(func, args, kwargs)
        kind = max(map(self.kinds.get, values), default=Kind.CONSTANT)
        self._watch(func, args, kwargs, kind)
        if func in ESCAPING:
            result = func(*map(detached, args), **kwargs)
        elif kind >= Kind.PATH:
            with nullcontext() if self.heeds_hooks else without_saved_tensor_hooks():
                result = self._rewritten(func, args, kwargs)
        else:
            if func in VALUES_FROM:  # the form may be taken from the path
                args, kwargs = [*map(detached, args)], {name: detached(value) for name, value in kwargs.items()}
            result = func(*args, **kwargs)
        if func in PARTS and isinstance(args[0], Tensor):
            result = as_single_views(args[0], result)
        if func in EMPTY:  # what memory happens to hold is no constant
            for made in tensors_in([result]):
                made.zero_()
        if not values and func not in FIXED:
            kind = max(kind, Kind.UNVERIFIED)  # of numbers, which may have been computed from the image
        return self._noted(func, args, result, kind)

    def _rewritten(self, func: Function, args: Sequence[object], kwargs: dict[str, object]) -> object:
        """A function of the linear path, as the table has it."""
        handler = self.table.get(func) or _in_place_handler(self.table, func) or self.table.get(_of_aten(func))
        if handler is None:
            return self._suspected(func(*args, **kwargs), func, writes_to(func, args))
        try:
            return handler(self, func, *args, **kwargs)
        except (BcosError, AmbiguousBatch):
            raise
        except Exception as error:
            if self.account is None:
                raise
            if writes_to(func, args) is not None:
                place = self.account.place(func)
                where = f"{place.module or 'the model itself'}: {place.function}"
                raise ModelStateError(f"{where} cannot be explained as it is called here: {error}") from error
            return self._suspected(func(*args, **kwargs), func, None)  # raises the same where torch does

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
        """A tensor on the path; one that a function made which the mode did not see is replaced by a suspect."""
        if self.account is None or self.kinds.is_current(x):
            return x
        if id(x) not in self._replaced:
            name = type(x.grad_fn).__name__.partition("Backward")[0]
            self._replaced[id(x)] = x, self.account.suspect(x, "unseen", name)
            is_read = bool(self.account.boundaries)
            self.kinds.set(self._replaced[id(x)][1], Kind.PATH if is_read else Kind.IMAGE)
            self.account.needs_another_image |= not is_read
        return self._replaced[id(x)][1]

    def is_gate(self, x: object) -> bool:
        """Whether x depends on the image without being on its path."""
        return isinstance(x, Tensor) and self.kinds.get(x) is Kind.GATE

    def is_image(self, x: Tensor) -> bool:
        """Whether x is the image, or made of it before anything has read it."""
        return self.account is not None and x.requires_grad and self.kinds.get(x) is Kind.IMAGE

    def maker(self, x: Tensor) -> str:
        """Name of the function that made a gate."""
        return self.kinds.maker(x) or "a constant"

    def _watch(self, func: Function, args: Sequence[object], kwargs: dict[str, object], kind: Kind) -> None:
        """Note what leaves torch as a number or as a shape, and what makes the image's way to a reader dynamic."""
        assert self.account is not None
        if kind >= Kind.GATE and (func in ESCAPING or reads_shape(func, args, kwargs)):
            self.account.has_escaped = True
        if kind is Kind.IMAGE:
            operands = tensors_in([*args, *kwargs.values()])
            several = func not in JOINING and sum(map(on_linear_path, operands)) > 1
            if several or func not in STATIC or any(map(self.is_gate, operands)):
                self.account.needs_another_image = True

    def _noted(self, func: Function, args: Sequence[object], result: object, kind: Kind) -> object:
        """Remember how what a function returns or writes depends on the image."""
        assert self.account is not None
        if kind is Kind.CONSTANT and self.account.has_escaped:
            kind = Kind.UNVERIFIED
        if func is encode_image:
            kind = min(kind, Kind.PATH)
        name, written = function_name(func), writes_to(func, args)
        operands = {memory_key(x) for x in tensors_in(args)}
        for x in tensors_in([result]):
            if x.requires_grad and x.is_floating_point():
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
            if memory_key(x) not in operands:
                self.kinds.set(x, kind, name)
            elif self.kinds.is_stale(x):  # `inplace=True`
                self.kinds.set(x, max(kind, self.kinds.get(x)), name)
        if written is not None:
            if func in OVERWRITING and written.nbytes == written.untyped_storage().nbytes():
                kind = max(map(self.kinds.get, tensors_in(args[1:])), default=Kind.UNVERIFIED)
            else:
                kind = max(kind, self.kinds.get(written))
            self.kinds.set(written, kind, name)
        return result

    def _into(self, out: object, func: Function, args: Sequence[object], kwargs: dict[str, object]) -> object:
        """`out=`: what a function returns is written there."""
        result = self.__torch_function__(func, (), args, kwargs)
        for target, value in zip(tensors_in([out]), tensors_in([result]), strict=True):
            if target.shape != value.shape:
                target.resize_(value.shape)
            self.__torch_function__(Tensor.copy_, (), (target, value))
        return out

    def _suspected(self, result: object, func: Function, written: Tensor | None) -> object:
        """What a function that the table does not know has made of the path."""
        if self.account is None:
            return result
        if written is not None:
            if written.requires_grad:
                self.account.suspect(written, "unknown", func, written.detach().clone())
            return result
        if isinstance(result, Tensor):
            return self.account.suspect(result, "unknown", func) if result.requires_grad else result
        if isinstance(result, list | tuple):
            found = [self._suspected(item, func, None) for item in result]
            return type(result)(found) if type(result) in (list, tuple) else tuple(found)
        return result

    # For handlers.

    def call(self, func: Function, *args: object) -> Any:
        """A function inside a handler, as this mode's table has it: torch calls it without the mode."""
        return self.table[func](self, func, *args)

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object) -> Tensor:
        """Account for what a fresh result y contains beside the linear path.

        Args:
            y: The result.
            addend: A tensor that broadcasts to y, or a number.
            func: What added it.
            sources: Tensors and numbers that the addend was made of; none if it is one of the operands itself.
        """
        if self.account is None or on_linear_path(addend) or not on_linear_path(y):
            return y
        return self.add_kind(y, addend, func, sources or (addend,), self.kind_of(*(sources or (addend,))))

    def kind_of(self, *operands: object) -> Kind:
        """The highest kind of several operands off the path."""
        return max((self.kinds.get(x) for x in tensors_in(operands)), default=Kind.CONSTANT)

    def add_kind(self, y: Tensor, addend: Operand, func: Function, sources: Sequence[object], kind: Kind) -> Tensor:
        """As `add`, where a change in place may have made the operands forget their kind."""
        assert self.account is not None
        if not isinstance(addend, Tensor):
            if not addend:
                return y
            addend = y.detach().new_full((), addend)
        if kind >= Kind.GATE:
            return self.account.suspect(y, "added", func, addend.detach().clone()) if bool(addend.any()) else y
        lasting = self._lasting(addend)
        made_of = [lasting if v is addend else self._lasting(v) if isinstance(v, Tensor) else v for v in sources]
        counts = func in COUNTING and any(isinstance(v, int | float) for v in sources)
        self.account.note(func, made_of, kind is Kind.CONSTANT and not counts)
        return self.account.tap(y, lasting)

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path, as a class token is."""
        if self.account is None or on_linear_path(value):
            return value
        kind = self.kinds.get(value)
        if kind is Kind.GATE:
            if not bool(value.any()):
                return value
            return self.written_gate(value, func)
        value = self._lasting(value)
        self.account.note(func, (value,), kind is Kind.CONSTANT)
        return self.account.mark(value)

    def written_gate(self, value: Tensor, func: Function) -> Tensor:
        """A gate that is written into a part of the path, as an operand that is under suspicion."""
        assert self.account is not None
        return self.account.suspect(value.detach().clone().requires_grad_() * 1, "added", func, value)

    def _lasting(self, value: Tensor) -> Tensor:
        """Parameters as they are; a copy of what the forward pass may still change."""
        value = value.detach()
        return value if memory_key(value) in self._parameters else value.clone()


def _values(func: Function, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The operands whose values a function's result depends on."""
    source = VALUES_FROM.get(func, "all")
    if source == "none":
        return []
    if source == "first":
        return tensors_in([args[0] if args else kwargs.get("input")])
    found = [*args, *kwargs.values()]
    return tensors_in(found[1:] if source == "rest" else found)


def _of_aten(func: Function) -> Function:
    """The function in `torch` that an operator (`torch.ops.aten.relu`) is."""
    packet = getattr(func, "overloadpacket", func)
    if getattr(packet, "__module__", "") != "torch._ops.aten":
        return func
    return next((f for f in named(packet.__name__) if f in TABLE), func)


def _in_place_handler(table: Mapping[Function, Handler], func: Function) -> Handler | None:
    """That of the function which `func` is the in-place form of."""
    plain = out_of_place(func)
    handler = None if plain is None else table.get(plain)
    if plain is None or handler is None:
        return None

    def run(mode: DynamicLinearMode, _: Function, /, input: Tensor, *args: object, **kwargs: object) -> object:
        before = input.clone()
        mode.kinds.set(before, mode.kinds.get(input))
        result = handler(mode, plain, before, *args, **kwargs)
        return mode.table[Tensor.copy_](mode, Tensor.copy_, input, result)

    return run


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


def without_saved_tensor_hooks() -> AbstractContextManager[object]:
    """Keep what `torch.utils.checkpoint` would compute again in the backward pass, without the mode."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)


@contextmanager
def paused() -> Iterator[None]:
    """Let no mode act: what follows is no part of a model that is being explained."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def ordinary_autograd(device: torch.device) -> Iterator[None]:
    """Let gradients be recorded in full precision, whatever the caller has switched on or off."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), paused():
        yield


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager in which gradients of `model` are rows of its linear map W(x).

    Every torch function that this thread calls inside the block is affected, so apply losses and sigmoids outside.
    Neither the model nor other threads notice. Blocks nest.

    Args:
        model: A B-cos model in evaluation mode.

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
