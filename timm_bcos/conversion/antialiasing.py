"""Anti-aliased downsampling: which layers it is for, and max pooling with it.

Paper: Making Convolutional Networks Shift-Invariant Again, https://arxiv.org/abs/1904.11486.
"""

from torch import nn

from .._compat import timm_layers
from ..nn.low_pass import LowPass2d

to_2tuple = timm_layers.to_2tuple

__all__ = ["antialiased_max_pool", "is_patchifying"]


def is_patchifying(conv: nn.Conv2d) -> bool:
    """Whether a convolution cuts its input into patches that do not overlap: then all pixels are seen equally often."""
    return conv.kernel_size == conv.stride and conv.dilation == (1, 1)


def antialiased_max_pool(pool: nn.MaxPool1d | nn.MaxPool2d) -> nn.Module:
    """Max pooling at stride 1, then a low-pass filter with the stride; outputs keep their number and their places.

    Args:
        pool: Not changed, and returned where it does not sample, or where two layers cannot express it: at strides
            other than 2, with indices, in one dimension, or with TensorFlow's padding.
    """
    if type(pool) is not nn.MaxPool2d or not _is_expressible(pool):
        return pool
    layers: list[nn.Module] = [nn.MaxPool2d(pool.kernel_size, 1, pool.padding, pool.dilation), LowPass2d(stride=2)]
    if pool.ceil_mode:  # the last window leaves the map: repeated pixels do not change its maximum
        layers.insert(0, nn.ReplicationPad2d((0, 1, 0, 1)))
    return nn.Sequential(*layers).train(pool.training)


def _is_expressible(pool: nn.MaxPool2d) -> bool:
    if to_2tuple(pool.stride) != (2, 2) or pool.return_indices:
        return False
    sizes = zip(to_2tuple(pool.kernel_size), to_2tuple(pool.padding), strict=True)
    # else torch drops a last window that lies in the padding alone
    is_full = to_2tuple(pool.dilation) == (1, 1) and all(kernel > padding + 1 for kernel, padding in sizes)
    return is_full or not pool.ceil_mode
