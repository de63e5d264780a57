"""The table of explanation mode: what each torch function is, as data.

A function of the linear path that stands in none of these tables is reported: `timm_bcos.check` calls the network not
exact. `declare` adds functions of your own.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import GetSetDescriptorType
from typing import Any, Protocol, TypeGuard, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import functional

__all__ = [
    "ESCAPING",
    "METADATA",
    "SHAPED",
    "STREAMS",
    "TABLE",
    "Function",
    "Handler",
    "Mode",
    "Operand",
    "declare",
    "detached",
    "handles",
    "kept",
    "leave_path",
    "named",
    "on_linear_path",
]

Function = Callable[..., Any]
Handler = Callable[..., object]  # (mode, func, *args, **kwargs) to what func(*args, **kwargs) returns
Operand = Tensor | float
T = TypeVar("T")
HandlerT = TypeVar("HandlerT", bound=Handler)


class Mode(Protocol):
    """What handlers ask of explanation mode (`timm_bcos.dynamic.mode`)."""

    leaf: Tensor | None

    def call(self, func: Function, *args: object) -> Any:
        """A function inside a handler, as the mode's table has it."""

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object, is_gate: bool | None = None) -> Tensor:
        """Account for what a fresh result contains beside the linear path."""

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path."""

    def is_gate(self, x: object) -> bool:
        """Whether x depends on the image without being on its path."""


class Streams(Protocol):
    """What handlers ask where explanations are trained (`timm_bcos.dynamic.streams`)."""

    def is_path(self, x: Tensor) -> bool: ...
    def counterpart(self, x: Tensor) -> Tensor: ...
    def leave(self, x: Tensor, value: Tensor) -> None: ...


STREAMS: ContextVar[Streams | None] = ContextVar("streams of this thread", default=None)

NAMESPACES = (torch, torch.Tensor, F, torch.special, torch.linalg, torch.fft)


def named(text: str) -> list[Function]:
    """Torch's functions, methods and attribute getters with these names, as far as this version has them."""
    found: list[Function] = []
    for name in text.split():
        for space in NAMESPACES:
            member = getattr(space, name, None)
            if callable(member):
                found.append(member)
            elif isinstance(member, property | GetSetDescriptorType):
                found.append(member.__get__)
    return found


def on_linear_path(x: object) -> TypeGuard[Tensor]:
    """Whether x is (a dynamic linear map of) the image, rather than a constant of the network."""
    streams = STREAMS.get()
    return isinstance(x, Tensor) and (x.requires_grad if streams is None else streams.is_path(x))


@overload
def detached(value: Tensor) -> Tensor: ...
@overload
def detached(value: T) -> T: ...
def detached(value: object) -> object:
    """A value as a constant of the linear map; numbers and the like as they are."""
    if isinstance(value, Tensor):
        streams = STREAMS.get()
        return value.detach() if streams is None else streams.counterpart(value)
    if type(value) is list or type(value) is tuple:
        return type(value)(map(detached, value))
    return value


def kept(x: Tensor) -> Tensor:
    """What a tensor of the path is before it is written to; a copy where gradients by the parameters need it."""
    return x if STREAMS.get() is None else x.clone()


def leave_path(x: Tensor, value: Tensor) -> None:
    """Give a tensor of the path the value of a gate, in place."""
    streams = STREAMS.get()
    if streams is not None:
        streams.leave(x, value)
        return
    x.detach_()
    x.data = value  # other memory, since the layer before may need its output


TABLE: dict[Function, Handler] = {}


def handles(*functions: Function) -> Callable[[HandlerT], HandlerT]:
    """Decorator: how functions with an operand on the linear path are rewritten; handlers also receive the mode."""

    def register(handler: HandlerT) -> HandlerT:
        TABLE.update(dict.fromkeys(functions, handler))
        return handler

    return register


def declare(*functions: Function) -> Callable[[Function], Function]:
    """Decorator: how `functions` are rewritten in explanation mode.

    The handler receives the function and then its arguments, and returns the same value with the gradient wanted: that
    of a linear map, everything else being constant. Without a handler a function is differentiated as it is, and
    reported if it is not known to be linear.

    Examples:
        >>> @timm_bcos.declare(my_gate)  # a gate: what it returns only scales
        ... def _(func, x):
        ...     return func(x.detach())
        >>> @timm_bcos.declare(my_product)  # a product of two activations: half each
        ... def _(func, a, b):
        ...     return 0.5 * func(a, b.detach()) + 0.5 * func(a.detach(), b)
    """

    def register(handler: Function) -> Function:
        handles(*functions)(lambda mode, func, /, *args, **kwargs: handler(func, *args, **kwargs))
        return handler

    return register


def _as_it_is(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> object:
    return func(*args, **kwargs)


def pass_on(functions: Iterable[Function]) -> None:
    """Declare functions that autograd differentiates rightly: linear and piecewise linear ones."""
    for function in functions:
        TABLE.setdefault(function, _as_it_is)


# What reads a tensor's form, not its values; and derivatives, which are taken of a network, not in it.
METADATA = frozenset([torch.autograd.grad, torch.autograd.backward, Tensor.backward]) | frozenset(
    named(
        "shape ndim dtype device layout requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized "
        "is_mps is_xpu names itemsize nbytes size dim stride numel nelement element_size storage_offset data_ptr "
        "get_device is_contiguous is_floating_point is_complex is_inference is_pinned __len__ __hash__ grad _version "
        "is_nested is_sparse_csr is_mkldnn output_nr requires_grad_ retain_grad _backward_hooks is_signed"
    )
)
# What makes a constant of another tensor's form, whatever its values.
SHAPED = set(
    named(
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
        "new_full new_tensor new_empty_strided"
    )
)
# What makes a number of a value.
ESCAPING = frozenset(named("item tolist numpy __float__ __array__ __complex__"))

# Positions: each output is an input, or a sum of inputs.
LINEAR = """
    reshape view view_as reshape_as permute transpose transpose_ t T mT H mH adjoint swapaxes swapdims movedim
    moveaxis flatten ravel unflatten squeeze squeeze_ unsqueeze unsqueeze_ expand expand_as broadcast_to
    broadcast_tensors repeat tile repeat_interleave chunk split tensor_split hsplit vsplit dsplit
    split_with_sizes unbind unsafe_chunk unsafe_split select narrow index_select gather take take_along_dim
    __getitem__ masked_select diagonal diag diag_embed diagflat triu tril roll flip fliplr flipud rot90 unfold
    fold im2col col2im contiguous clone to type type_as float double half bfloat16 cfloat cdouble cpu cuda
    positive __pos__ neg neg_ negative __neg__ sum nansum mean nanmean cumsum cumsum_ diff trace real imag conj
    resolve_conj resolve_neg view_as_complex view_as_real conj_physical fft ifft fft2 ifft2 fftn ifftn rfft
    irfft rfft2 irfft2 rfftn irfftn hfft ihfft fftshift ifftshift avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest
    upsample_bilinear pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle dropout dropout_
    dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout block_diag atleast_1d
    atleast_2d atleast_3d meshgrid as_strided sum_to_size unsafe_split_with_sizes to_dense coalesce
    cumulative_trapezoid trapezoid trapz
"""
# Piecewise: which input an output takes, or its sign, is a constant of the linear map. Homogeneous of degree 1.
PIECEWISE = """
    relu relu_ leaky_relu leaky_relu_ rrelu rrelu_ prelu abs abs_ absolute absolute_ __abs__ fabs max amax min
    amin aminmax median nanmedian mode kthvalue topk sort msort cummax cummin quantile nanquantile max_pool1d
    max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d
    fractional_max_pool3d max_unpool1d max_unpool2d
"""
pass_on([functional.same_padding, functional.low_pass, *named(LINEAR)])
pass_on(named(PIECEWISE))
