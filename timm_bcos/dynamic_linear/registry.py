"""The table of explanation mode: what each torch function is, as data.

A function of the linear path that stands in none of these tables is reported: `timm_bcos.check` calls the model not
exact. `register_function` adds functions of your own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from types import GetSetDescriptorType
from typing import Any, Protocol, TypeGuard, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import functional
from .kinds import Kind, records_graph

__all__ = [
    "DATA",
    "EMPTY",
    "ESCAPING",
    "FIXED",
    "JOINING",
    "METADATA",
    "OVERWRITING",
    "PARTS",
    "STATIC",
    "STREAMS",
    "TABLE",
    "VALUES_FROM",
    "Function",
    "FunctionRule",
    "Mode",
    "Operand",
    "as_single_views",
    "detached",
    "kept",
    "leave_path",
    "named",
    "on_linear_path",
    "out_of_place",
    "reads_shape",
    "register_function",
    "rule",
    "tensors_in",
    "twin",
    "writes_to",
]

Function = Callable[..., Any]
FunctionRule = Callable[..., object]  # (mode, func, *args, **kwargs) to what func(*args, **kwargs) returns
Operand = Tensor | float
T = TypeVar("T")
HandlerT = TypeVar("HandlerT", bound=FunctionRule)


class Mode(Protocol):
    """What handlers ask of explanation mode (`timm_bcos.dynamic_linear.mode`)."""

    leaf: Tensor | None
    tracker: Any

    def __torch_function__(
        self, func: Function, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        """A function of the forward pass."""

    def call(self, func: Function, *args: object) -> Any:
        """A function of what a handler has made, as the mode's table has it."""

    def add(self, y: Tensor, addend: Operand, func: Function, *sources: object) -> Tensor:
        """Account for what a fresh result contains beside the linear path."""

    def add_kind(self, y: Tensor, addend: Operand, func: Function, sources: Sequence[object], kind: Kind) -> Tensor:
        """The same for an addend whose kind was looked up before."""

    def kind_of(self, *operands: object) -> Kind:
        """The highest kind of several operands off the path."""

    def inherit(self, new: Tensor, old: Tensor) -> None:
        """Give a tensor that a handler has made the kind of another one."""

    def operand(self, value: Tensor, func: Function) -> Tensor:
        """Account for a whole operand that is joined to the linear path."""

    def written_gate(self, value: Tensor, func: Function) -> Tensor:
        """A gate that is written into a part of the path, as an operand that is under suspicion."""

    def is_gate(self, x: object) -> bool:
        """Whether x depends on the image without being on its path."""

    def is_image(self, x: Tensor) -> bool:
        """Whether x is the image, or made of it before anything has read it."""


class DualGraph(Protocol):
    """What handlers ask where explanations are trained (`timm_bcos.dynamic_linear.dual_graph`)."""

    def is_path(self, x: Tensor) -> bool: ...
    def counterpart(self, x: Tensor) -> Tensor: ...
    def leave(self, x: Tensor, value: Tensor) -> None: ...


STREAMS: ContextVar[DualGraph | None] = ContextVar("streams of this thread", default=None)

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
    """Whether x is (a dynamic linear map of) the image, rather than a constant of the model."""
    streams = STREAMS.get()
    return isinstance(x, Tensor) and (records_graph(x) if streams is None else streams.is_path(x))


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


TABLE: dict[Function, FunctionRule] = {}


def rule(*functions: Function) -> Callable[[HandlerT], HandlerT]:
    """Decorator: how functions with an operand on the linear path are rewritten; handlers also receive the mode."""

    def register(handler: HandlerT) -> HandlerT:
        TABLE.update(dict.fromkeys(functions, handler))
        return handler

    return register


def register_function(*functions: Function) -> Callable[[Function], Function]:
    """Decorator: how `functions` are rewritten in explanation mode.

    The handler receives the function and then its arguments, and returns the same value with the gradient wanted: that
    of a linear map, everything else being constant. Without a handler a function is differentiated as it is, and
    reported if it is not known to be linear.

    Examples:
        >>> @timm_bcos.register_function(my_gate)  # a gate: what it returns only scales
        ... def _(func, x):
        ...     return func(x.detach())
        >>> @timm_bcos.register_function(my_product)  # a product of two activations: half each
        ... def _(func, a, b):
        ...     return 0.5 * func(a, b.detach()) + 0.5 * func(a.detach(), b)
    """

    def register(handler: Function) -> Function:
        rule(*functions)(lambda mode, func, /, *args, **kwargs: handler(func, *args, **kwargs))
        return handler

    return register


def _as_it_is(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> object:
    return func(*args, **kwargs)


def pass_on(functions: Iterable[Function]) -> None:
    """Declare functions that autograd differentiates rightly: linear and piecewise linear ones."""
    for function in functions:
        TABLE.setdefault(function, _as_it_is)


# What reads a tensor's form, not its values; and derivatives, which are taken of a model, not in it.
METADATA = frozenset([torch.autograd.grad, torch.autograd.backward, Tensor.backward]) | frozenset(
    named(
        "shape ndim dtype device layout requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized "
        "is_mps is_xpu names itemsize nbytes size dim stride numel nelement element_size storage_offset "
        "get_device is_contiguous is_floating_point is_complex is_inference is_pinned __len__ __hash__ grad _version "
        "is_nested is_sparse_csr is_mkldnn output_nr requires_grad_ retain_grad _backward_hooks is_signed "
        "register_hook register_post_accumulate_grad_hook record_stream share_memory_ is_conj is_neg is_set_to "
        "sparse_dim dense_dim is_coalesced is_shared is_same_size is_tensor _is_view _base"
    )
)
# Whose values a result depends on, where it is not all operands: the others only lend their form.
VALUES_FROM: dict[Function, str] = {
    **dict.fromkeys(
        named(
            "zeros ones empty zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones "
            "new_empty new_empty_strided"
        ),
        "none",
    ),
    **dict.fromkeys(named("type_as to expand_as view_as reshape_as sum_to_size is_same_size"), "first"),
    **dict.fromkeys(named("full_like new_full new_tensor"), "rest"),
}
# What makes a number, or memory that torch does not see, of a value.
ESCAPING = frozenset(
    named(
        "item tolist numpy __float__ __int__ __index__ __bool__ __complex__ __array__ __array_wrap__ __dlpack__ "
        "to_dlpack is_nonzero __contains__ equal allclose storage untyped_storage data_ptr apply_ map_ __format__ "
        "__repr__ __str__ __reduce_ex__ _nnz"
    )
)
# What makes a tensor whose shape depends on values.
SHAPE_OF_VALUES = frozenset(
    named(
        "nonzero argwhere masked_select unique unique_consecutive _unique2 bincount nonzero_static one_hot to_sparse "
        "to_sparse_coo to_sparse_csr to_sparse_csc to_sparse_bsr to_sparse_bsc coalesce tensor_split "
        "_pack_padded_sequence arange linspace logspace zeros ones empty full eye rand randn"
    )
)
# Operands that choose where to read; with boolean ones, how much is read depends on their values.
INDEXING = frozenset(named("__getitem__ repeat_interleave"))


@cache
def twin(func: Function) -> Function:
    """The function of `torch` that an operator (`torch.ops.aten.relu.default`) is; other functions as they are."""
    packet = getattr(func, "overloadpacket", func)
    if getattr(packet, "__module__", "") != "torch._ops.aten":
        return func
    name = OPERATORS.get(packet.__name__, packet.__name__)
    found = [f for f in named(name) if getattr(f, "__name__", "") != "__get__"]
    return next((f for f in found if f in TABLE or f in ESCAPING or f in METADATA), found[0] if found else func)


OPERATORS = {"_local_scalar_dense": "item", "_unsafe_view": "reshape", "_reshape_alias": "reshape"}


# What makes a tensor without content.
EMPTY = frozenset(named("empty empty_like new_empty empty_strided new_empty_strided empty_permuted"))
# What makes a tensor of numbers that say nothing of an image.
FIXED = EMPTY | frozenset(named("zeros ones zeros_like ones_like new_zeros new_ones eye arange linspace"))
# What gives memory whose changes torch does not count.
DATA = frozenset(named("data numpy __array__ __dlpack__ to_dlpack storage untyped_storage data_ptr"))
# What overwrites all of a tensor.
OVERWRITING = frozenset(named("copy_ zero_ fill_"))


def tensors_in(values: object) -> list[Tensor]:
    """All tensors in nested lists, tuples, slices and dictionaries."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, slice):
        values = [values.start, values.stop, values.step]
    elif isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [x for value in values for x in tensors_in(value)]


def reads_shape(func: Function, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether the shape of the result depends on values."""
    if func in INDEXING:
        kinds = (torch.bool, torch.uint8) if func is Tensor.__getitem__ else (torch.int32, torch.int64)
        chosen = args if len(args) + len(kwargs) == 1 else args[1:]  # `repeat_interleave(repeats)`
        return any(x.dtype in kinds for x in tensors_in([*chosen, *kwargs.values()]))
    return func in SHAPE_OF_VALUES or (func in ONE_BRANCH and len(args) + len(kwargs) == 1)


def writes_to(func: Function, args: Sequence[object]) -> Tensor | None:
    """The tensor that a function changes in place, as far as its name tells."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in AUGMENTED
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


ONE_BRANCH = frozenset(named("where"))
AUGMENTED = frozenset(f"__{name}__" for name in (
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
))  # fmt: skip


def out_of_place(func: Function) -> Function | None:
    """The function whose in-place form `func` is, if torch has it."""
    name = getattr(func, "__name__", "")
    if name in AUGMENTED and name != "__setitem__":
        name = "__" + name[3:]
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    else:
        return None
    found = named(name)
    return next((f for f in found if f in TABLE), None)


# Positions: each output is an input, or a sum of inputs.
LINEAR = """
    reshape view view_as reshape_as permute t_ swapaxes_ swapdims_ gradient stft istft conv_tbc transpose transpose_
    t T mT H mH adjoint swapaxes swapdims movedim
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
    cumulative_trapezoid trapezoid trapz nan_to_num refine_names rename align_to as_tensor asarray deg2rad rad2deg
    cartesian_prod combinations view_copy permute_copy expand_copy t_copy transpose_copy select_copy slice_copy
    squeeze_copy unsqueeze_copy unbind_copy split_copy split_with_sizes_copy alias_copy diagonal_copy as_strided_copy
    unfold_copy view_as_real_copy view_as_complex_copy _pack_padded_sequence narrow_copy chalf __reversed__ pin_memory
    hfft2 ihfft2 hfftn ihfftn native_dropout
    to_sparse to_sparse_coo to_sparse_csr to_sparse_csc _to_dense values _values _sparse_sum
"""
# Piecewise: which input an output takes, or its sign, is a constant of the linear map. Homogeneous of degree 1.
PIECEWISE = """
    relu relu_ leaky_relu leaky_relu_ rrelu rrelu_ prelu abs abs_ absolute absolute_ __abs__ fabs max amax min
    amin aminmax median nanmedian mode kthvalue topk sort msort cummax cummin quantile nanquantile max_pool1d
    max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d
    fractional_max_pool3d max_unpool1d max_unpool2d max_unpool3d lp_pool1d lp_pool2d lp_pool3d copysign
"""
# Functions that are the same linear map for every image, where all other operands are constants.
STATIC = frozenset([functional.encode_image]) | frozenset(
    named(LINEAR + " add __add__ __radd__ sub __sub__ rsub __rsub__ __iadd__ __isub__ add_ sub_ mul __mul__ __rmul__ "
    "mul_ __imul__ div __truediv__ div_ __itruediv__ pad constant_pad_nd cat concat stack conv1d conv2d matmul linear "
    "__setitem__ zero_ fill_ masked_fill masked_fill_ copy_ batch_norm grid_sample")
) - frozenset(named("masked_select"))  # fmt: skip
# Of these, several operands may come from the image.
JOINING = frozenset(named("add __add__ __radd__ sub __sub__ rsub __rsub__ __iadd__ __isub__ add_ sub_ cat concat stack "
                          "__setitem__ copy_"))  # fmt: skip
pass_on([functional.same_padding, functional.low_pass, *named(LINEAR)])
pass_on(named(PIECEWISE))


# Functions that take a tensor apart.
PARTS = frozenset(named("chunk split tensor_split split_with_sizes unbind hsplit vsplit dsplit unsafe_chunk"))


def as_single_views(source: Tensor, result: Any) -> Any:
    """The parts of a tensor, each as a view of its own.

    Args:
        source: Tensor that was taken apart.
        result: Parts that torch returned.
    """
    if not result or not all(part._is_view() for part in result):
        return result
    first, starts = result[0], [part.storage_offset() - source.storage_offset() for part in result]
    if first.ndim < source.ndim:  # unbind
        axis = next(d for d in range(source.ndim) if source.shape[:d] + source.shape[d + 1 :] == first.shape
                    and source.stride()[:d] + source.stride()[d + 1 :] == first.stride())  # fmt: skip
        return type(result)(source.select(axis, i) for i in range(len(result)))
    changed = [d for d in range(source.ndim) if source.shape[d] != first.shape[d]]
    if not changed:
        return type(result)([source.narrow(0, 0, source.shape[0])])
    if not source.stride(changed[0]):
        return result
    axis, stride = changed[0], source.stride(changed[0])
    return type(result)(
        source.narrow(axis, start // stride, part.shape[axis]) for start, part in zip(starts, result, strict=True)
    )
