"""Functions of other libraries that this package wraps: once, however often it is imported."""

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["marked", "original"]

MARK = "_wrapped_by_timm_bcos"
F = TypeVar("F", bound=Callable[..., Any])


def marked(wrapper: F) -> F:
    """A wrapper made with `functools.wraps`, to be known as one of ours."""
    setattr(wrapper, MARK, True)
    return wrapper


def original(function: Any) -> Any:
    """A function without our wrappers."""
    while getattr(function, MARK, False):
        function = function.__wrapped__
    return function
