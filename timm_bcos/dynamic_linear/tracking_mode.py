"""Explanation mode with a bias tracker: which values depend on the image, and what is added beside its linear path."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..errors import BcosError, ModelStateError
from ..nn.execution import saved_tensors_have_hooks
from ..nn.functional import encode_image, to_logits
from .bias_tracker import AmbiguousBatch, BiasTracker, function_name
from .kinds import Kind, Kinds, is_zero, memory_key
from .mode import DynamicLinearMode, differentiates_apart, is_active
from .registry import (
    DATA,
    EMPTY,
    ESCAPING,
    FIXED,
    JOINING,
    METADATA,
    OVERWRITING,
    PARTS,
    STATIC,
    VALUES_FROM,
    Function,
    Operand,
    as_single_views,
    detached,
    on_linear_path,
    reads_shape,
    tensors_in,
    twin,
    writes_to,
)

__all__ = ["BiasTrackingMode"]

SETTINGS = frozenset([to_logits])  # whose numbers are the model's settings
Args = Sequence[object]
Kwargs = dict[str, object]


class BiasTrackingMode(DynamicLinearMode):
    """Explanation mode for one forward pass.

    Args:
        leaf: (N, C, H, W) the images.
        tracker: Record of constants and violations.

    Attributes:
        kinds: Dependence of each tensor's memory on the image.
        eps: Machine epsilon of the lowest precision on the image's path.
        heeds_hooks: Whether hooks of saved tensors stay; otherwise those of checkpoints are passed over.
    """

    tracker: BiasTracker

    def __init__(self, leaf: Tensor, tracker: BiasTracker) -> None:
        super().__init__(leaf)
        self.tracker, self.kinds = tracker, Kinds()
        self.eps, self.heeds_hooks = torch.finfo(leaf.dtype).eps, False
        self._replaced: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, int] = {}  # number of elements of each parameter and buffer
        for tensor in (*tracker.model.parameters(), *tracker.model.buffers()):
            self.kinds.set(tensor, Kind.CONSTANT)
            self._own[memory_key(tensor)] = tensor.numel()
        self.kinds.set(leaf, Kind.IMAGE)

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        func, kwargs = twin(func), kwargs or {}
        if func in METADATA or not is_active(self):
            return func(*args, **kwargs)
        if differentiates_apart(args):
            if func in ESCAPING:
                self.tracker.note_escape()
            return func(*args, **kwargs)
        if kwargs.get("out") is not None:
            return self._into(kwargs["out"], func, args, {n: v for n, v in kwargs.items() if n != "out"})
        args, kwargs = [self.frozen(v) for v in args], {name: self.frozen(v) for name, v in kwargs.items()}
        values = _values(func, args, kwargs)
        kind = max(map(self.kinds.get, values), default=Kind.CONSTANT)
        self._watch(func, args, kwargs, kind)
        result = self._result(func, args, kwargs, kind)
        if func in DATA and kind is Kind.CONSTANT:  # through which it can be written to unseen
            self.kinds.set(args[0], Kind.UNVERIFIED)  # type: ignore[arg-type]
        if not values and func not in FIXED and func not in VALUES_FROM:
            kind = max(kind, Kind.UNVERIFIED)  # of numbers, which may have been computed from the image
        return self._noted(func, args, result, kind, self._maker(func, values, kind))

    def _maker(self, func: Function, values: Sequence[Tensor], kind: Kind) -> str:
        """Name of the function by which a value has left the linear path, be it several functions ago."""
        if kind >= Kind.PATH:
            return function_name(func) if torch.is_grad_enabled() else "torch.no_grad"
        return next((self.kinds.maker(x) for x in values if self.kinds.get(x) is kind), "") or function_name(func)

    def _result(self, func: Function, args: Args, kwargs: Kwargs, kind: Kind) -> object:
        """What a function returns, with the graph that explanation mode wants."""
        if func in ESCAPING or (kind < Kind.PATH and func in VALUES_FROM):  # which takes only its form from the path
            result = func(*map(detached, args), **{name: detached(value) for name, value in kwargs.items()})
        elif kind < Kind.PATH:
            result = func(*args, **kwargs)
        else:
            with nullcontext() if self.heeds_hooks else _without_saved_tensor_hooks():
                result = self._rewritten(func, args, kwargs)
        if func in PARTS and isinstance(args[0], Tensor):
            result = as_single_views(args[0], result)
        if func in EMPTY:  # what memory happens to hold is no constant
            for made in tensors_in([result]):
                made.zero_()
        return result

    def _rewritten(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """A function of the linear path, as the table has it."""
        handler, written = self.handler(func), writes_to(func, args)
        if handler is not None:
            try:
                return handler(self, func, *args, **kwargs)
            except (BcosError, AmbiguousBatch):
                raise
            except Exception as error:
                if written is not None:
                    place = self.tracker.place(func)
                    where = f"{place.module or 'the model itself'}: {place.function}"
                    raise ModelStateError(f"{where} cannot be explained as it is called here: {error}") from error
        result = func(*args, **kwargs)  # raises the same as the handler where torch does
        if written is None:
            return self.suspected(result, func)
        if on_linear_path(written):
            self.tracker.suspect(written, "unknown", func, written.detach().clone())
        return result

    def seen(self, x: Tensor) -> Tensor:
        """A tensor on the path; one that a function made which the mode did not see is replaced by a suspect."""
        if self.kinds.is_current(x):
            return x
        if id(x) not in self._replaced:
            name = type(x.grad_fn).__name__.partition("Backward")[0]
            self._replaced[id(x)] = x, self.tracker.suspect(x, "unseen", name)
            is_read = bool(self.tracker.boundaries)
            self.kinds.set(self._replaced[id(x)][1], Kind.PATH if is_read else Kind.IMAGE)
            self.tracker.needs_another_image |= not is_read
        return self._replaced[id(x)][1]

    def is_gate(self, x: object) -> bool:
        """Whether x depends on the image without being on its path."""
        return isinstance(x, Tensor) and self.kinds.get(x) is Kind.GATE

    def is_image(self, x: Tensor) -> bool:
        """Whether x is the image, or made of it before anything has read it."""
        return on_linear_path(x) and self.kinds.get(x) is Kind.IMAGE

    def maker(self, x: Tensor) -> str:
        """Name of the function that made a gate."""
        return self.kinds.maker(x) or "a constant"

    def inherit(self, new: Tensor, old: Tensor) -> None:
        """Give a tensor that a handler has made the kind of another one."""
        self.kinds.set(new, self.kinds.get(old))

    def _watch(self, func: Function, args: Sequence[object], kwargs: dict[str, object], kind: Kind) -> None:
        """Note what leaves torch as a number or as a shape, and what makes the image's way to a reader dynamic."""
        operands = tensors_in([*args, *kwargs.values()])
        if kind >= Kind.GATE and (reads_shape(func, args, kwargs) or any(map(self._may_be_a_number, operands))):
            self.tracker.note_escape()
        if kind > Kind.CONSTANT and func in ESCAPING:
            self.tracker.note_escape()
        if kind is Kind.IMAGE:
            several = func not in JOINING and sum(map(on_linear_path, operands)) > 1
            if several or func not in STATIC or any(map(self.is_gate, operands)):
                self.tracker.needs_another_image = True

    def _may_be_a_number(self, x: Tensor) -> bool:
        """Whether torch may read a tensor as a number, which chooses a size or a place (`x[k]`, `x.expand(k)`)."""
        return x.ndim == 0 and not x.is_floating_point() and not x.is_complex() and self.kinds.get(x) >= Kind.GATE

    def _noted(self, func: Function, args: Sequence[object], result: object, kind: Kind, name: str) -> object:
        """Remember how what a function returns or writes depends on the image."""
        if kind > Kind.CONSTANT and isinstance(result, int | float | complex):
            self.tracker.note_escape()
        if kind is Kind.CONSTANT and self.tracker.has_escaped:
            kind = Kind.UNVERIFIED
        if func is encode_image:
            kind = min(kind, Kind.PATH)
        written = writes_to(func, args)
        operands = {memory_key(x) for x in tensors_in(args)}
        for x in tensors_in([result]):
            if on_linear_path(x) and x.is_floating_point():
                self.eps = max(self.eps, torch.finfo(x.dtype).eps)
            if memory_key(x) not in operands:
                self.kinds.set(x, kind, name)
            elif self.kinds.is_stale(x):  # `inplace=True`
                self.kinds.set(x, max(kind, self.kinds.get(x)), name)
        if written is not None:
            if _overwrites(func, args) and written.nbytes == written.untyped_storage().nbytes():
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

    def suspected(self, result: object, func: Function) -> object:
        """What a function that is not known has made of the path."""
        if isinstance(result, Tensor):
            return self.tracker.suspect(result, "unknown", func) if on_linear_path(result) else result
        if isinstance(result, list | tuple):
            found = [self.suspected(item, func) for item in result]
            return type(result)(found) if type(result) in (list, tuple) else tuple(found)
        return result

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object) -> Tensor:
        """Account for what a fresh result y contains beside the linear path.

        Args:
            y: The result.
            addend: A tensor that broadcasts to y, or a number.
            func: Function that added it.
            sources: Tensors and numbers that the addend was made of; none if it is one of the operands itself.
        """
        if on_linear_path(addend) or not on_linear_path(y):
            return y
        return self.add_kind(y, addend, func, sources or (addend,), self.kind_of(*(sources or (addend,))))

    def kind_of(self, *operands: object) -> Kind:
        """The highest kind of several operands off the path."""
        return max((self.kinds.get(x) for x in tensors_in(operands)), default=Kind.CONSTANT)

    def add_kind(self, y: Tensor, addend: Operand, func: Function, sources: Sequence[object], kind: Kind) -> Tensor:
        """As `add`, where a change in place may have made the operands forget their kind."""
        if not isinstance(addend, Tensor):
            if not addend:
                return y
            addend = y.detach().new_full((), addend)
        if kind >= Kind.GATE:
            return y if is_zero(addend) else self.tracker.suspect(y, "added", func, addend.detach().clone())
        lasting = self._lasting(addend)
        made_of = [lasting if v is addend else self._lasting(v) if isinstance(v, Tensor) else v for v in sources]
        is_given = kind is Kind.CONSTANT and (func in SETTINGS or all(map(self._is_own, sources)))
        self.tracker.note(func, made_of, is_given, int(y.storage_offset()) if y._is_view() else 0)
        return self.tracker.tap(y, lasting)

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path, as a class token is."""
        if on_linear_path(value):
            return value
        kind = self.kinds.get(value)
        if kind is Kind.GATE:
            if is_zero(value):
                return value
            return self.written_gate(value, func)
        is_given, value = kind is Kind.CONSTANT and self._is_own(value), self._lasting(value)
        self.tracker.note(func, (value,), is_given)
        return self.tracker.mark(value)

    def written_gate(self, value: Tensor, func: Function) -> Tensor:
        """A gate that is written into a part of the path, as an operand that is under suspicion."""
        return self.tracker.suspect(value.detach().clone().requires_grad_() * 1, "added", func, value)

    def _is_own(self, value: object) -> bool:
        """Whether a value is a whole parameter or buffer: numbers, and the choice of a part, may come from anywhere."""
        if not isinstance(value, Tensor):
            return False
        sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)  # others repeat
        return self._own.get(memory_key(value)) == math.prod(sizes)

    @staticmethod
    def _lasting(value: Tensor) -> Tensor:
        """A copy, which nothing in the forward pass can change."""
        return value.detach().clone()


def _overwrites(func: Function, args: Sequence[object]) -> bool:
    """Whether all of a tensor is written, and nothing of it stays."""
    return func in OVERWRITING or (func is Tensor.__setitem__ and args[1] in (slice(None), Ellipsis))


def _values(func: Function, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The operands whose values a function's result depends on."""
    source = VALUES_FROM.get(func, "all")
    if source == "none":
        return []
    if source == "first":
        return tensors_in([args[0] if args else kwargs.get("input")])
    found = [*args, *kwargs.values()]
    return tensors_in(found[1:] if source == "rest" else found)


def _without_saved_tensor_hooks() -> AbstractContextManager[object]:
    """Keep what `torch.utils.checkpoint` would compute again in the backward pass, without the mode."""
    if not saved_tensors_have_hooks():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: (x.detach(), x._version), _unchanged)


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """What was saved.

    Raises:
        RuntimeError: If somebody has written to it since, as autograd itself says it.
    """
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation"
        )
    return x
