"""Reading ahead: what comes next is loaded while the model is busy with what came before."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(items: Iterable[T], waiting: int = 2) -> Iterator[T]:
    """The items, made in a thread of its own, a few before they are asked for.

    Args:
        items: For instance a generator that decodes images. What it raises is raised here, in its turn.
        waiting: Number of items that are kept ready.

    Yields:
        The items in their order.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    ready: deque[Future[T | object]] = deque(pool.submit(next, iterator, end) for _ in range(waiting))
    try:
        while (item := ready.popleft().result()) is not end:
            ready.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(iterator, Iterator) and hasattr(iterator, "close"):
            iterator.close()
