"""Reasons to refuse a conversion. Each is one line that names the module and says how to proceed."""

from collections.abc import Iterable, Iterator
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
from .inspection import Inspection
from .rules import ADVICE

__all__ = [
    "CALL_HOOKS", "computed_weight_problem", "input_problems", "lost_hook_problems", "model_problems",
    "no_rule_problem", "probability_problem", "state_hook_problem", "wrapper_problem",
]  # fmt: skip

# Modules

# torch's wrappers of models, by the name of their class, because importing these classes takes seconds.
WRAPPERS = {
    "DataParallel": "wraps a model: convert that model, DataParallel(bcosify(model.module))",
    "DistributedDataParallel": "wraps a model: convert that model, DistributedDataParallel(bcosify(model.module))",
    "FullyShardedDataParallel": "wraps a model: convert first, FullyShardedDataParallel(bcosify(model))",
    "OptimizedModule": "is the result of torch.compile: convert first, torch.compile(bcosify(model))",
    "ScriptModule": "is TorchScript: convert first, torch.jit.script(bcosify(model))",
    "GraphModule": "is a traced graph: convert first, and trace the result",
}
# Hooks that compute a weight before each forward pass, and the call that makes it a parameter again.
WEIGHT_HOOKS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(module, name)",
}
PROBABILITIES = (nn.Sigmoid, nn.Softmax, nn.LogSoftmax)
CLASSIFIER_ROLES = ("classifier", "positions", "map")


def wrapper_problem(module: nn.Module) -> str | None:
    """Problem with a module that wraps or generates another one; None if it does not."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in WRAPPERS:
            return f"{kind.__name__} {WRAPPERS[kind.__name__]}"
    return computed_weight_problem(module) if parametrize.is_parametrized(module) else None


def computed_weight_problem(module: nn.Module) -> str | None:
    """Problem with a module whose weight is computed from other tensors; None if it is a parameter."""
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        fix = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"has a parametrized {name}: call {fix} first"
    for hook in module._forward_pre_hooks.values():
        for kind, fix in WEIGHT_HOOKS.items():
            if isinstance(hook, kind):
                return f"has a weight that {type(hook).__name__} computes: call {fix} first"
    return None


def no_rule_problem(module: nn.Module) -> str:
    """Problem with a module whose type has no rule."""
    kind = type(module)
    if kind in ADVICE:
        return f"{kind.__module__}.{kind.__name__} {ADVICE[kind]}"
    return (
        f"no rule for {kind.__module__}.{kind.__name__}; pass rules=RULES | {{{kind.__name__}: rule}}, with rule=keep "
        f"if explanation mode covers its forward"
    )


def probability_problem(inspection: Inspection, path: str) -> str | None:
    """Problem with a classifier whose logits are turned into probabilities; None for all other modules."""
    if not path or inspection.roles[path].role not in CLASSIFIER_ROLES:
        return None
    parent, _, name = path.rpartition(".")
    siblings = inspection.model.get_submodule(parent)._modules
    behind = list(siblings.values())[list(siblings).index(name) + 1 :]
    kind = next((type(m).__name__ for m in behind if isinstance(m, PROBABILITIES)), None)
    return kind and f"{kind} follows the classifier, while explanations are of logits: replace it by nn.Identity()"


# Hooks

CALL_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


def state_hook_problem(module: nn.Module) -> str | None:
    """Problem with a module that is to be replaced, and has hooks on its state dict."""
    if not any(getattr(module, name) for name in STATE_HOOKS):
        return None
    return "has state dict hooks, made for the layer that it is: remove them, convert, and register them again"


def lost_hook_problems(model: nn.Module, visited: Iterable[nn.Module], remaining: Iterable[nn.Module]) -> Iterator[str]:
    """Problems with hooks on modules that vanish together with a module around them.

    Args:
        model: The model, unchanged.
        visited: Its modules that have replacements of their own, or are kept.
        remaining: Modules of the converted model.
    """
    safe = {id(m) for m in visited} | {id(m) for m in remaining}
    for path, module in model.named_modules():
        if id(module) not in safe and any(getattr(module, name) for name in CALL_HOOKS):
            yield f"{path}: has hooks and goes away with the module around it: remove them"


# Models

# Number of dimensions of the inputs of layers for sequences and volumes.
DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 3, nn.ConvTranspose1d: 3, nn.Conv3d: 5, nn.ConvTranspose3d: 5,
}  # fmt: skip


def model_problems(inspection: Inspection) -> Iterator[str]:
    """Problems with the model as a whole: other configs in it, and how its images are read and normalized."""
    yield from _other_configs(inspection.model, inspection.config)
    if inspection.reads_encoded_images:
        yield from _plain_stems(inspection.model, inspection.channels)
    elif inspection.mean is None and inspection.config.stem == "normalized":
        yield (
            f"(root): {type(inspection.model).__name__} does not say how its images are normalized: pass "
            f"BcosConfig(mean=..., std=...), or mean=(0.0,) and std=(1.0,) if it takes pixels in [0, 1]"
        )


def _other_configs(model: nn.Module, config: BcosConfig) -> Iterator[str]:
    """A model has one config: neither the model nor a part of it may have been converted with another one."""
    for name, module in model.named_modules():
        own = getattr(module, "bcos_config", None)
        if own is not None and own != config:
            names = [f.name for f in fields(config) if getattr(own, f.name) != getattr(config, f.name)]
            values = ", ".join(f"{field}={getattr(own, field)!r}" for field in names)
            yield (
                f"{name or '(root)'}: has been converted with {values}: convert the plain model anew, or give the "
                f"config that it has, bcosify(model, converted.bcos_config)"
            )


def _plain_stems(model: nn.Module, channels: int) -> Iterator[str]:
    """In a plain model with a converted part, plain layers beside that part may read images without its stem."""
    if isinstance(getattr(model, "bcos_config", None), BcosConfig):
        return
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and module.in_channels == channels:
            yield f"{name}: may read images beside a part that has been converted: convert the whole plain model"


def input_problems(inspection: Inspection, converted: nn.Module) -> Iterator[str]:
    """Problems with a model that would read its images through an `ImageReader`.

    Args:
        inspection: Inspection of the model.
        converted: Module that the model becomes.
    """
    yield from _several_inputs(converted)
    yield from _first_wrong_dimension(inspection.model, inspection.channels)


def _several_inputs(model: nn.Module) -> Iterator[str]:
    """An `ImageReader` reads one image, so it must be clear which input that is."""
    parameters = signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        yield (
            f"(root): takes several inputs ({', '.join(needed)}), and it is not clear which layers read images: name "
            f"these convolutions, model.pretrained_cfg = dict(first_conv=('conv1', ...), mean=..., std=...)"
        )


def _first_wrong_dimension(model: nn.Module, channels: int) -> Iterator[str]:
    """In a model with 1-D or 3-D convolutions only, the first one that gets an image instead of a sequence or volume.

    Models that turn an image into a sequence or volume themselves are fine, so the model has to be run to find out.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, tuple(DIMENSIONS))]
    if not names or any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()):
        return
    copy = frozen_copy(model).eval()
    found: list[str | None] = []
    for name in names:
        copy.get_submodule(name).register_forward_pre_hook(partial(_note_dimensions, found, name))
    with suppress(Exception), torch.no_grad():  # the model's own errors do not matter here
        copy(next(copy.parameters()).new_zeros(1, channels, *image_size(copy)))
    yield from filter(None, found[:1])


def _note_dimensions(found: list[str | None], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook that appends a problem, or None."""
    expected = next(count for kind, count in DIMENSIONS.items() if isinstance(module, kind))
    problem = (
        f"{name}: a {type(module).__name__} takes {expected} dimensions and gets images, which have 4: models of "
        f"sequences or volumes cannot be converted, unless their forward makes those of an image"
    )
    found.append(None if args[0].ndim == expected else problem)
