"""What stands in the way of a conversion, besides modules without a rule: one line each, which says how to mend it."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from inspect import Parameter, signature

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..nn.module_utils import frozen_copy, image_size
from .config import BcosConfig

__all__ = [
    "computed_weight_problem", "config_problems", "reads_no_image", "several_inputs", "unread_layers",
    "wrapper_problem",
]  # fmt: skip

# Dimensions of what layers of sequences and of volumes take.
DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 3, nn.ConvTranspose1d: 3, nn.Conv3d: 5, nn.ConvTranspose3d: 5,
}  # fmt: skip
# torch's wrappers of networks, by the name of their class, which it would take seconds to import.
WRAPPERS = {
    "DataParallel": "wraps a network: convert that one, DataParallel(bcosify(model.module))",
    "DistributedDataParallel": "wraps a network: convert that one, DistributedDataParallel(bcosify(model.module))",
    "FullyShardedDataParallel": "wraps a network: convert first, FullyShardedDataParallel(bcosify(model))",
    "OptimizedModule": "is what torch.compile made: convert first, torch.compile(bcosify(model))",
    "ScriptModule": "is TorchScript: convert first, torch.jit.script(bcosify(model))",
    "GraphModule": "is a traced graph: convert first, and trace the result",
}
# Hooks that compute a weight before each forward pass, and what makes it a parameter again.
WEIGHT_HOOKS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(module, name)",
}


def wrapper_problem(module: nn.Module) -> str | None:
    """What to do with a module that no rule could convert: one that wraps, or computes, others."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
            return f"{kind.__name__} {WRAPPERS[kind.__name__]}"
    return computed_weight_problem(module) if parametrize.is_parametrized(module) else None


def computed_weight_problem(module: nn.Module) -> str | None:
    """Why a module cannot be replaced whose weight is computed from others; None if it is not."""
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        mend = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"has a parametrized {name}: call {mend} first"
    for hook in module._forward_pre_hooks.values():
        for kind, mend in WEIGHT_HOOKS.items():
            if isinstance(hook, kind):
                return f"has a weight that {type(hook).__name__} computes: call {mend} first"
    return None


def config_problems(model: nn.Module, config: BcosConfig) -> Iterator[str]:
    """A network has one config: it was not converted with another one before, nor was a part of it."""
    for name, module in model.named_modules():
        own = getattr(module, "bcos_config", None)
        if own is not None and own != config:
            names = [f.name for f in fields(config) if getattr(own, f.name) != getattr(config, f.name)]
            told = ", ".join(f"{field}={getattr(own, field)!r}" for field in names)
            yield (
                f"{name or '(root)'}: has been converted with {told}: convert the plain network anew, or give the "
                f"config that it has, bcosify(model, converted.bcos_config)"
            )


def unread_layers(model: nn.Module, channels: int) -> Iterator[str]:
    """In a plain network with a converted part: layers beside that part that would read images past its stem."""
    if isinstance(getattr(model, "bcos_config", None), BcosConfig):
        return
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and module.in_channels == channels:
            yield f"{name}: may read images beside a part that has been converted: convert the whole plain network"


def reads_no_image(model: nn.Module, channels: int) -> Iterator[str]:
    """In a network of 1-D or 3-D layers alone, the first of them that does not take what an image becomes.

    Networks that make a sequence or a volume of an image themselves are fine, so the network is run to see.

    Args:
        model: Not changed.
        channels: Of its images.
    """
    kinds = tuple(DIMENSIONS)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    if not names or any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()):
        return
    network = frozen_copy(model).eval()
    problems: list[str | None] = []

    def read(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        wanted = next(count for kind, count in DIMENSIONS.items() if isinstance(module, kind))
        problem = (
            f"{name}: a {type(module).__name__} takes {wanted} dimensions and gets images, which have 4: networks of "
            f"sequences or volumes cannot be converted, unless their forward makes those of an image"
        )
        problems.append(None if args[0].ndim == wanted else problem)

    for name in names:
        network.get_submodule(name).register_forward_pre_hook(partial(read, name))
    like = next(network.parameters())
    with suppress(Exception), torch.no_grad():  # other errors are no concern of ours
        network(like.new_zeros(1, channels, *image_size(network)))
    yield from filter(None, problems[:1])


def several_inputs(network: nn.Module) -> Iterator[str]:
    """A reader at the root reads one image: which input that is must be clear."""
    parameters = signature(network.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        yield (
            f"(root): takes several inputs ({', '.join(needed)}), and it is not clear which layers read images: name "
            f"the convolutions that do, model.pretrained_cfg = dict(first_conv=('conv1', ...), mean=..., std=...)"
        )
