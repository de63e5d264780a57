"""A converted network for inference: layers fused, with the norms beside them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import private
from ..dynamic_linear.registry import METADATA
from ..errors import ModelStateError
from ..explanation.exactness import random_image
from ..explanation.inputs import check_model
from ..files import first_line
from ..nn.fused import FoldedNorm, fuse_layer, norm_scale
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.module_utils import frozen_copy, image_size
from ..nn.norms import UncenteredBatchNorm2d
from ..nn.stems import image_channels
from .settings import SETTINGS, encode_settings

__all__ = ["fuse"]

ModelT = TypeVar("ModelT", bound=nn.Module)
LAYERS = (BcosConv2d, BcosLinear)


def fuse(model: ModelT, x: Tensor | None = None) -> ModelT:
    """A copy of a B-cos network for inference, which computes the same logits and the same explanations faster.

    Weights are normalized once. Uncentered batch norms move into the layers before or behind them, wherever nothing
    else sees what lies between the two.

    Args:
        model: A converted network in evaluation mode. Not changed.
        x: Images (N, C, H, W) that it takes, to see how its layers and norms are connected; None makes a random one of
            the model's input size.

    Returns:
        The copy. It exports as the network does, and refuses training.

    Raises:
        ModelStateError: For a network in training mode, one that is no B-cos network, one that has been fused, or one
            that does not run on images of the size that it says.

    Examples:
        >>> fast = timm_bcos.fuse(model)
        >>> explanation = timm_bcos.explain(fast, images)
    """
    check_model(model)
    fused = frozen_copy(model)
    names = {module: name for name, module in fused.named_modules()}
    folds = _find_folds(fused, list(names), x)
    for layer in [module for module in names if isinstance(module, LAYERS)]:
        scales = [norm_scale(norm) if norm else None for norm in (folds.after.get(layer), folds.before.get(layer))]
        _replace(fused, names[layer], fuse_layer(layer, *scales))
    for norm in {*folds.after.values(), *folds.before.values()}:
        _replace(fused, names[norm], FoldedNorm(norm))
    for network in fused.modules():
        if SETTINGS in network._buffers:  # whose weights are others now
            device = network.get_buffer(SETTINGS).device
            network.register_buffer(SETTINGS, encode_settings(network, network.bcos_config, device))  # type: ignore[arg-type]
    return fused


@dataclass
class _Folds:
    """Which norm each layer takes over: the one behind it, and the one before it."""

    after: dict[nn.Module, UncenteredBatchNorm2d] = field(default_factory=dict)
    before: dict[nn.Module, UncenteredBatchNorm2d] = field(default_factory=dict)


@torch.no_grad()
def _flow_through(model: nn.Module, modules: Sequence[nn.Module], x: Tensor | None) -> "_Flow":
    """Watch images pass through a network's layers and norms."""
    flow = _Flow()
    watched = [module for module in modules if isinstance(module, (*LAYERS, UncenteredBatchNorm2d))]
    seen = {module for module in watched if not module._forward_hooks and not module._forward_pre_hooks}
    handles = [module.register_forward_pre_hook(flow.enter) for module in seen]
    handles += [module.register_forward_hook(flow.leave) for module in seen]
    images = (_own_image(model) if x is None else x).to(next(model.parameters()))
    try:
        with flow:
            flow.read(model(images), "the caller")
    except Exception as error:  # of any kind: it is the network's
        if x is not None:
            raise
        size = " × ".join(map(str, images.shape[2:]))
        raise ModelStateError(
            f"{type(model).__name__} does not run on images of {size} pixels ({first_line(error)}): pass images that "
            f"it takes, fuse(model, x)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return flow


def _own_image(model: nn.Module) -> Tensor:
    return random_image(image_channels(model) or 3, image_size(model))


def _find_folds(model: nn.Module, modules: Sequence[nn.Module], x: Tensor | None) -> _Folds:
    flow, folds = _flow_through(model, modules, x), _Folds()
    for norm in [m for m in modules if isinstance(m, UncenteredBatchNorm2d) and flow.runs[m] == 1]:
        maker, readers = flow.makers.get(flow.inputs[norm]), flow.readers[flow.outputs[norm]]
        if isinstance(maker, BcosConv2d) and flow.runs[maker] == 1 and flow.readers[flow.inputs[norm]] == {norm}:
            folds.after[maker] = norm
        elif not _has_activation(norm) and readers and all(_reads_once(flow, reader, norm) for reader in readers):
            folds.before.update((reader, norm) for reader in readers if isinstance(reader, nn.Module))
    return folds


def _reads_once(flow: "_Flow", reader: object, norm: nn.Module) -> bool:
    return isinstance(reader, BcosConv2d) and flow.runs[reader] == 1 and flow.inputs[reader] == flow.outputs[norm]


def _has_activation(norm: nn.Module) -> bool:
    return not all(isinstance(child, nn.Identity) for child in norm.children())


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


class _Flow(TorchFunctionMode):
    """Which layers and functions read what others make, by the identity of tensors, which are kept alive for it.

    Attributes:
        runs: How often each module ran.
        inputs: The tensor that a module reads.
        outputs: The one that it returns.
        makers: The module that made a tensor.
        readers: All that read a tensor: modules, and the names of functions outside of those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[nn.Module] = Counter()
        self.inputs: dict[nn.Module, int] = {}
        self.outputs: dict[nn.Module, int] = {}
        self.makers: dict[int, nn.Module] = {}
        self.readers: dict[int, set[object]] = {}
        self._running: list[nn.Module] = []
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            self.read((args, kwargs), self._running[-1] if self._running else func)
        return func(*args, **(kwargs or {}))

    def read(self, values: object, reader: object) -> None:
        """Note that `reader` uses all tensors in `values`."""
        for tensor in private.tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._alive.append(tensor)
                self.readers.setdefault(id(tensor), set()).add(reader)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.read(args, module)
        self.inputs[module] = id(args[0])
        self._running.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.pop()
        self.runs[module] += 1
        if isinstance(output, Tensor):
            self._alive.append(output)
            self.outputs[module] = id(output)
            self.makers[id(output)] = module
            self.readers.setdefault(id(output), set()).discard(module)  # which may have written in place
