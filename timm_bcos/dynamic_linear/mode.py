"""Explanation mode: inside it, autograd sees the model as the linear map that it is for its current input.

Outputs stay what they are; only the graph that autograd records changes. Everything that depends on the input but is
not the linear path is treated as a constant (detached): cosine factors, norm statistics, attention weights, gates.
One backward pass from a logit then gives that logit's row of W(x) exactly (section 3.2.1 of arXiv 2205.10268).

How each torch function is rewritten stands in a table (`timm_bcos.dynamic_linear.registry`), which covers functions
inside forwards as well as modules. A tensor is on the linear path when it requires a gradient: the mode hands
parameters to functions detached, so only the image's path does. The model is not changed, and the mode acts only in the
thread that entered it.
"""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import private
from ..errors import ModelStateError
from .kinds import Kind, records_graph, within_transforms
from .registry import (
    METADATA,
    STREAMS,
    TABLE,
    Function,
    FunctionRule,
    Operand,
    on_linear_path,
    out_of_place,
    register_function,
    tensors_in,
    twin,
)

__all__ = [
    "DynamicLinearMode",
    "active",
    "differentiates_apart",
    "explanation_mode",
    "is_active",
    "mark_constant",
    "on_linear_path",
    "ordinary_autograd",
    "paused",
    "register_function",
]  # fmt: skip


class DynamicLinearMode(TorchFunctionMode):
    """Looks every torch function up in the table.

    Args:
        leaf: The images that are differentiated by; every other leaf is a constant. None where they are not known:
            then only parameters are.
        table: Handlers of functions that are rewritten.
    """

    tracker: Any = None  # of `timm_bcos.dynamic_linear.tracking_mode`, which knows what is added

    def __init__(self, leaf: Tensor | None = None, table: Mapping[Function, FunctionRule] = TABLE) -> None:
        super().__init__()
        self.leaf, self.table = leaf, table

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        func, kwargs = twin(func), kwargs or {}
        if func in METADATA or not is_active(self) or differentiates_apart(args):
            return func(*args, **kwargs)
        args, kwargs = [self.frozen(v) for v in args], {name: self.frozen(v) for name, v in kwargs.items()}
        if not any(map(on_linear_path, tensors_in([*args, *kwargs.values()]))):
            return func(*args, **kwargs)
        handler = self.handler(func)
        return self.suspected(func(*args, **kwargs), func) if handler is None else handler(self, func, *args, **kwargs)

    def frozen(self, value: object) -> object:
        """Parameters are constants, whose gradients nobody wants."""
        if isinstance(value, Tensor):
            if not records_graph(value) or value is self.leaf or STREAMS.get() is not None:
                return value
            if within_transforms(value).grad_fn is None and (self.leaf is not None or isinstance(value, nn.Parameter)):
                return value.detach()
            return self.seen(value)
        if type(value) is list or type(value) is tuple:
            return type(value)(self.frozen(item) for item in value)
        return value

    def handler(self, func: Function) -> FunctionRule | None:
        """How a function is rewritten; None for one that is not known."""
        return self.table.get(func) or _in_place_handler(self.table, func)

    # What a mode that tracks biases does beside.

    def seen(self, x: Tensor) -> Tensor:
        """A tensor on the path, as it was made."""
        return x

    def suspected(self, result: object, func: Function) -> object:
        """What a function that is not known has made of the path."""
        return result

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object) -> Tensor:
        """Account for what a fresh result contains beside the linear path."""
        return y

    def add_kind(self, y: Tensor, addend: Operand, func: Function, sources: Sequence[object], kind: Kind) -> Tensor:
        """The same for an addend whose kind was looked up before."""
        return y

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path."""
        return value

    def written_gate(self, value: Tensor, func: Function) -> Tensor:
        """Account for a gate that is written into a part of the path."""
        return value

    def kind_of(self, *operands: object) -> Kind:
        """The highest kind of several operands off the path."""
        return Kind.UNVERIFIED

    def inherit(self, new: Tensor, old: Tensor) -> None:
        """Give a tensor that a handler has made the kind of another one."""

    def is_gate(self, x: object) -> bool:
        """Whether x is known to depend on the image without being on its path."""
        return False

    def is_image(self, x: Tensor) -> bool:
        """Whether x is known to be the image, or made of it before anything has read it."""
        return False

    def call(self, func: Function, *args: object) -> Any:
        """A function inside a handler, as this mode's table has it: torch calls it without the mode."""
        return self.table[func](self, func, *args)


def differentiates_apart(args: Sequence[object]) -> bool:
    """Whether `torch.func` takes derivatives of values off the path, which are gates: that is no part of the path."""
    if not private.are_functorch_transforms_active():
        return False
    tracked = [x for x in tensors_in(args) if private.is_gradtrackingtensor(x)]
    return bool(tracked) and not any(map(_is_on_path_outside, tracked))


def _is_on_path_outside(x: Tensor) -> bool:
    """Whether a tensor is on the path outside of all transforms."""
    while private.is_functorch_wrapped_tensor(x):
        x = private.get_unwrapped(x)
    return on_linear_path(x)


def _in_place_handler(table: Mapping[Function, FunctionRule], func: Function) -> FunctionRule | None:
    """That of the function which `func` is the in-place form of."""
    plain = out_of_place(func)
    handler = None if plain is None else table.get(plain)
    if plain is None or handler is None:
        return None

    def run(mode: Any, _: Function, /, input: Tensor, *args: object, **kwargs: object) -> object:
        before = input.clone()
        mode.inherit(before, input)
        result = handler(mode, plain, before, *args, **kwargs)
        return mode.table[Tensor.copy_](mode, Tensor.copy_, input, result)

    return run


_ACTIVE: ContextVar[DynamicLinearMode | None] = ContextVar("explanation mode of this thread", default=None)


def is_active(mode: DynamicLinearMode) -> bool:
    """Whether a mode is the one that acts in this thread."""
    return _ACTIVE.get() is mode


def mark_constant(value: Tensor) -> Tensor:
    """Mark an additive constant in a handler of your own, so that `explain` can tell what it contributes.

    Args:
        value: Constant of any shape that the handler adds to the linear path.
    """
    mode = _ACTIVE.get()
    return value if mode is None or mode.tracker is None else mode.tracker.mark(value)


class _WithoutCompiledCode:
    """Context manager in which `torch.compile`d functions and modules run as they were written.

    A compiled program does not call the torch functions that explanation mode rewrites. The stance of torch's compiler
    belongs to the process: it is taken by the first explanation that begins, and given back by the last one that ends.
    Compiled models in other threads run eagerly meanwhile, with the same results.
    """

    def __init__(self) -> None:
        self._lock, self._depth, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._depth:
                self._stance.enter_context(_eager_stance())
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._stance.close()


def _eager_stance() -> AbstractContextManager[object]:
    # nothing is compiled where dynamo, which takes a second to import, was not; while it compiles no stance can change
    if "torch._dynamo" not in sys.modules or private.get_eval_frame_callback() not in (None, False):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


WITHOUT_COMPILED_CODE = _WithoutCompiledCode()


@contextmanager
def active(mode: DynamicLinearMode) -> Iterator[DynamicLinearMode]:
    """Let a mode act, and it alone: others that are under way in this thread wait."""
    token = _ACTIVE.set(mode)
    try:
        with WITHOUT_COMPILED_CODE, mode:
            yield mode
    finally:
        _ACTIVE.reset(token)


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
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        WITHOUT_COMPILED_CODE,
        paused(),
    ):
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
