"""Gates and statistics: what they return depends on the image, but only scales the linear path."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch import Tensor

from ..nn.primitives import feature_norm, patch_norm
from .products import share
from .registry import Function, Mode, detached, leave_path, named, on_linear_path, rule

GATES = """
    sigmoid hardsigmoid softmax softmin gumbel_softmax log_softmax logsigmoid logit logsumexp special_logit
    var std norm vector_norm matrix_norm cov corrcoef pairwise_distance pdist cdist dist
    sqrt rsqrt exp exp2 expm1 log log1p log2 log10 erf erfc erfinv expit sin cos tan asin acos atan atan2 sinh cosh
    asinh acosh arctan arctan2 sinc i0 lgamma digamma gamma reciprocal __rtruediv__ __rdiv__ __rpow__ angle
    sign sgn signum heaviside floor ceil round trunc fix argmax argmin argsort argwhere nonzero one_hot bucketize
    searchsorted histc bincount unique count_nonzero isnan isinf isfinite eq ne lt le gt ge greater less equal allclose
    all any long int bool short char byte multinomial bernoulli detach data det slogdet logdet
    remainder __mod__ __rmod__ fmod floor_divide __floordiv__ __rfloordiv__ logaddexp logaddexp2
    inv pinv inverse pinverse matrix_exp matrix_power cholesky
    arccos arcsin arccosh arcsinh arctanh atanh frac frexp igamma igammac mvlgamma polygamma nextafter logcumsumexp
    prod cumprod frobenius_norm nuclear_norm norm_except_dim cond matrix_rank cholesky_ex cholesky_inverse inv_ex
    tensorinv vander
    eig eigh eigvals eigvalsh svd svdvals svd_lowrank pca_lowrank qr lu lu_factor lu_factor_ex lu_unpack ldl_factor
    ldl_factor_ex geqrf orgqr householder_product histogram detach_copy
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div cross_entropy binary_cross_entropy
    binary_cross_entropy_with_logits cosine_embedding_loss triplet_margin_loss poisson_nll_loss gaussian_nll_loss
"""
IN_PLACE = """
    sigmoid_ hardsigmoid_ sqrt_ rsqrt_ exp_ log_ sin_ cos_ reciprocal_ sign_ floor_ ceil_ round_ softmax_ log1p_ erf_
    expm1_ trunc_ frac_ bernoulli_
"""


@rule(patch_norm, feature_norm, *named(GATES), *(getattr(torch.special, name) for name in torch.special.__all__))
def _gate(mode: Mode, func: Function, /, *args: object, **kwargs: object) -> object:
    return func(*map(detached, args), **{name: detached(value) for name, value in kwargs.items()})


@rule(*named("var_mean std_mean"))
def _moments(mode: Mode, func: Function, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The spread is a statistic, the mean a linear map."""
    dim = kwargs.get("dim", args[0] if args and not isinstance(args[0], bool) else None)
    spread, mean = func(detached(input), *args, **kwargs)
    return spread, (input.mean() if dim is None else input.mean(dim)).reshape(mean.shape)


@rule(*named(IN_PLACE))
def _gate_in_place(mode: Mode, func: Function, /, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    value = func(detached(input).clone(), *args, **kwargs)
    if input._is_view():  # of which the rest stays on the path: the value is written as an addend
        return input.copy_(mode.written_gate(value, func))
    leave_path(input, value)
    return input


@rule(*named("xlogy xlog1py"))
def _times_log(mode: Mode, func: Function, /, input: Tensor, other: Tensor) -> Tensor:
    """x · log y, the logarithm being a gate."""
    return func(input, detached(other))


@rule(torch.nn.functional.normalize)
def _normalize(
    mode: Mode, func: Function, /, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    return input / detached(input).norm(p, dim, keepdim=True).clamp_min(eps)


@rule(torch.nn.functional.cosine_similarity)
def _cosine_similarity(
    mode: Mode, func: Function, /, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> Tensor:
    """A product of two normalized vectors; see `products`."""
    from_first, from_second = (
        (a / detached(a).norm(2, dim, keepdim=True).clamp_min(eps) * (b / b.norm(2, dim, keepdim=True).clamp_min(eps)))
        for a, b in ((x1, detached(x2)), (x2, detached(x1)))
    )
    first, second = on_linear_path(x1), on_linear_path(x2)
    total = (from_first + from_second) / 2 if first and second else from_first if first else from_second
    return total.sum(dim)


def _operators(*names: str) -> list[Callable[..., Any]]:
    packets = [getattr(torch.ops.torchvision, name) for name in names]
    return [*packets, *(packet.default for packet in packets)]


@rule(*_operators("deform_conv2d"))
def _deform_conv2d(
    mode: Mode, func: Function, /, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: Any
) -> Tensor:
    """Offsets and masks are gates; what they weigh is linear."""
    offset, mask = detached(offset), detached(mask)
    y = share(lambda x, w: func(x, w, offset, mask, torch.zeros_like(bias), *rest), [input, weight])
    addend = bias.reshape(-1, 1, 1)
    return mode.add(y + addend, addend, func, bias)


@rule(*_operators("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool"))
def _regions(mode: Mode, func: Function, /, input: Tensor, rois: Tensor, *rest: Any) -> Any:
    return func(input, detached(rois), *rest)
