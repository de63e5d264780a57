"""A converted model for inference: weights are normalized once, and norms are fused into the layers beside them."""

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
from ..nn.base import BcosLayer
from ..nn.layers import BcosConv2d
from ..nn.module_utils import frozen_copy, image_size
from ..nn.norms import UncenteredBatchNorm2d
from ..nn.stems import image_channels
from .settings import SETTINGS, encode_settings

__all__ = ["FOLDING", "FoldedNorm", "fuse", "fuse_within", "norm_scale"]

ModelT = TypeVar("ModelT", bound=nn.Module)
FOLDING = ("fuse", "reparameterize", "switch_to_deploy")  # methods that timm's `reparameterize_model` calls


class FoldedNorm(nn.Module):
    """The drop and activation layers of a norm whose scale has been folded into a neighboring layer."""

    def __init__(self, norm: UncenteredBatchNorm2d) -> None:
        super().__init__()
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


def norm_scale(norm: UncenteredBatchNorm2d) -> Tensor:
    """The factor per channel of an uncentered batch norm in evaluation mode, (C,) in float64."""
    return norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()


def fuse(model: ModelT, x: Tensor | None = None) -> ModelT:
    """Copy a B-cos model for inference. The copy computes the same logits and explanations faster.

    Weights are normalized once. Uncentered batch norms are fused into the layer before or after them if no other layer
    or function reads the tensor between the two.

    Args:
        model: A converted model in evaluation mode. Not changed.
        x: Images (N, C, H, W), which are passed through the model to find out how its layers and norms are connected.
            None generates a random image of the model's input size.

    Returns:
        The copy. It can be exported like the model, and refuses training.

    Raises:
        ModelStateError: If the model is in training mode, is no B-cos model, has been fused already, or does not run
            on images of its own input size.

    Examples:
        >>> fast = timm_bcos.fuse(model)
        >>> explanation = timm_bcos.explain(fast, images)
    """
    check_model(model)
    fused = frozen_copy(model)
    names = {module: name for name, module in fused.named_modules()}
    folds = _find_folds(fused, list(names), x)
    for layer in [module for module in names if isinstance(module, BcosLayer)]:
        scales = [norm_scale(norm) if norm else None for norm in (folds.after.get(layer), folds.before.get(layer))]
        _replace(fused, names[layer], layer.folded(*scales))
    for norm in {*folds.after.values(), *folds.before.values()}:
        _replace(fused, names[norm], FoldedNorm(norm))
    for module in fused.modules():
        if SETTINGS in module._buffers:  # a converted model, whose settings now include that it is fused
            device = module.get_buffer(SETTINGS).device
            module.register_buffer(SETTINGS, encode_settings(module, module.bcos_config, device))  # type: ignore[arg-type]
    return fused


@dataclass
class _Folds:
    """The norms to fuse into each layer: the one after it, and the one before it."""

    after: dict[nn.Module, UncenteredBatchNorm2d] = field(default_factory=dict)
    before: dict[nn.Module, UncenteredBatchNorm2d] = field(default_factory=dict)


@torch.no_grad()
def _flow_through(model: nn.Module, modules: Sequence[nn.Module], x: Tensor | None) -> "_Flow":
    """Run images through a model, and record which layers, norms and functions read which tensors."""
    flow = _Flow()
    watched = [module for module in modules if isinstance(module, BcosLayer | UncenteredBatchNorm2d)]
    seen = {module for module in watched if not module._forward_hooks and not module._forward_pre_hooks}
    handles = [module.register_forward_pre_hook(flow.enter) for module in seen]
    handles += [module.register_forward_hook(flow.leave) for module in seen]
    images = (_own_image(model) if x is None else x).to(next(model.parameters()))
    try:
        with flow:
            flow.read(model(images), "the caller")
    except Exception as error:  # models raise errors of every kind
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


def fuse_within(module: nn.Module, *_: object, **__: object) -> nn.Module:
    """Fuse the B-cos layers of a module that would fold norms or branches into their weights, in place.

    timm's `reparameterize_model` calls this instead of the module's own methods (`FOLDING`). Outputs of B-cos layers
    are not linear in their weights, so norms and branches stay.
    """
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if isinstance(child, BcosLayer) else fuse_within(child))
    return module


class _Flow(TorchFunctionMode):
    """Records which layers and functions read which tensors.

    Tensors are identified by their id, and kept alive so that ids stay unique.

    Attributes:
        runs: Number of calls of each module.
        inputs: Id of the tensor that a module reads.
        outputs: Id of the tensor that a module returns.
        makers: Module that made a tensor, by the tensor's id.
        readers: Modules, and functions called outside of these, that read a tensor, by the tensor's id.
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
        """Record that `reader` reads all tensors in `values`."""
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
            self.readers.setdefault(id(output), set()).discard(module)  # it may have written in place
