"""Hooks on modules that a conversion replaces: they move to the replacement."""

from torch import nn

__all__ = ["has_hooks", "has_state_hooks", "move_hooks"]

CALL_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


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
