"""Where a module's output has its channels: formats change inside networks."""

from torch import Tensor, nn

from .._compat import timm_layers as layers
from .norms import UncentredBatchNorm2d

__all__ = ["channel_axis"]

# Where types of modules have their channels; the first row that a module is an instance of counts.
CHANNEL_AXES: tuple[tuple[int, tuple[type[nn.Module], ...]], ...] = (
    (1, (
        layers.LayerNorm2d, layers.LayerNorm2dFp32, layers.LayerNormAct2d, layers.LayerNormAct2dFp32,
        layers.RmsNorm2d, layers.RmsNorm2dFp32, layers.SimpleNorm2d, layers.SimpleNorm2dFp32,
        layers.FrozenBatchNormAct2d, UncentredBatchNorm2d, nn.GroupNorm, nn.SyncBatchNorm,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool2d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
        nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
    )),
    (-1, (
        nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase,
        layers.RmsNorm, layers.RmsNormFp32, layers.SimpleNorm, layers.SimpleNormFp32,
    )),
)  # fmt: skip


def channel_axis(module: nn.Module, output: Tensor, network: nn.Module | None = None) -> int:
    """Which axis of a module's output counts its units: formats change inside networks, so the network cannot say.

    1. Of (N, C) it is 1.
    2. The module's type says: 1 for convolutions, batch norms, pooling, ...; the last one for linear layers, layer
       norms over features, ...
    3. Of other modules (blocks, activations) the last such module within them says, or else the last one registered
       before them in the network. The `output_fmt` of the module, or else of the network (for tokens (N, L, C): the
       last axis) says something else where the data are permuted in between: then the axis that is as long as that
       module has channels counts.
    4. If both or neither is as long, the type says if all types within the module agree, otherwise the network's
       format.

    Args:
        module: What returned the output.
        output: (N, ...), with at least two axes.
        network: Which the module is a part of; without it formats are (N, C, H, W) and (N, L, C).

    Returns:
        From 1 to output.ndim - 1.
    """
    typed = _axis_of_type(module)
    if output.ndim == 2 or typed is not None:
        return (typed or 1) % output.ndim
    named = getattr(module, "output_fmt", None) or getattr(network, "output_fmt", "NCHW")
    by_format = 1 if output.ndim > 3 and named == "NCHW" else output.ndim - 1
    inside = [m for m in module.modules() if _axis_of_type(m)] or _last_before(module, network)
    axes = [(_axis_of_type(m) or 1) % output.ndim for m in reversed(inside)]
    if not axes:
        return by_format
    width = _width([module, *reversed(inside)])
    fitting = {axis for axis in (axes[0], by_format) if output.shape[axis] == width}
    if len(fitting) == 1:
        return fitting.pop()
    return axes[0] if len(set(axes)) == 1 and output.ndim > 3 else by_format


def _axis_of_type(module: nn.Module) -> int | None:
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:  # (C, H, W)
        return 1
    return next((axis for axis, kinds in CHANNEL_AXES if isinstance(module, kinds)), None)


def _last_before(module: nn.Module, network: nn.Module | None) -> list[nn.Module]:
    before: list[nn.Module] = []
    for other in network.modules() if network is not None else ():
        if other is module:
            return before[-1:]
        before += [other] if _axis_of_type(other) else []
    return []


def _width(modules: list[nn.Module]) -> int | None:
    """Channels that the first module has which knows their number."""
    for module in modules:
        for name in ("out_features", "out_channels", "num_features", "num_channels", "normalized_shape"):
            value = getattr(module, name, None)
            if value is not None:
                return value if isinstance(value, int) else value[0]
    return None
