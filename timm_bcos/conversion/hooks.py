"""What hangs on a module that a conversion replaces: hooks, which move along, and weights computed by others."""

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["computed_weight_problem", "has_hooks", "has_state_hooks", "move_hooks"]

CALL_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip
# Hooks that compute a weight before each forward pass, and what makes it a parameter again.
WEIGHT_HOOKS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
    prune.BasePruningMethod: "torch.nn.utils.prune.remove(module, name)",
}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls."""
    return any(getattr(module, name) for name in CALL_HOOKS)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hang the hooks of calls on a module's replacement; handles that remove them keep working."""
    if old is new:
        return
    for name in CALL_HOOKS:
        hooks = old.__dict__[name]
        hooks.update(new.__dict__[name])
        new.__dict__[name] = hooks
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def has_state_hooks(module: nn.Module) -> bool:
    """Whether somebody changes what the module's state dict holds."""
    return any(getattr(module, name) for name in STATE_HOOKS)


def computed_weight_problem(module: nn.Module) -> str | None:
    """Why a module cannot be replaced whose weight is computed from others; None if it is not."""
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        mend = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"has a parametrised {name}: call {mend} first"
    for hook in module._forward_pre_hooks.values():
        for kind, mend in WEIGHT_HOOKS.items():
            if isinstance(hook, kind):
                return f"has a weight that {type(hook).__name__} computes: call {mend} first"
    return None
