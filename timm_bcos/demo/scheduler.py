"""Scheduling of computations: photos first and in batches, slow attribution methods in the background."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..errors import BcosError
from .limits import QUICK_THREADS, RENDERING_THREADS, SLOW_QUEUE, SLOW_THREADS, YIELD_SECONDS

__all__ = ["CLOSING", "DISCONNECTED", "Batcher", "BusyError", "ClosedError", "Scheduler", "SlowJob", "release_memory"]

CLOSING = "the demo is shutting down: try again later"
DISCONNECTED = "the client has disconnected"

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")


class BusyError(BcosError, RuntimeError):
    """Too many computations are waiting."""


class ClosedError(BcosError, RuntimeError):
    """The demo is shutting down, or the client has disconnected."""


class SlowJob:
    """A computation in batches on a background thread; it ends by itself or when it is stopped.

    Attributes:
        started_images: Number of images in batches that have started.
    """

    def __init__(self) -> None:
        self.started_images = 0
        self.future: Future[Any] = Future()
        self.stop = threading.Event()

    def result(self) -> Any:
        """The result of the computation.

        Raises:
            ClosedError: If it was stopped before it started.
        """
        return _result(self.future)

    def wait(self, timeout: float) -> bool:
        """Wait for the job, and return whether it has ended.

        Args:
            timeout: Longest wait in seconds.
        """
        try:
            self.future.exception(timeout)
        except TimeoutError:
            return False
        except CancelledError:
            return True
        return True


class Scheduler:
    """The threads that compute. They are few: each keeps memory of its own, and the processor is shared.

    Quick tasks, such as the explanation of a photo, run in the order of their submission. Slow jobs have their own
    threads and let quick tasks go first, batch by batch.

    Args:
        quick: Number of threads for quick tasks.
    """

    def __init__(self, quick: int = QUICK_THREADS) -> None:
        self._quick = ThreadPoolExecutor(quick, "quick")
        self._rendering = ThreadPoolExecutor(RENDERING_THREADS, "rendering")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, "slow")
        self._condition = threading.Condition()
        self._priority_calls = 0  # calls for which slow jobs wait
        self._quick_tasks = 0  # quick tasks that have not ended
        self._jobs: set[SlowJob] = set()
        self._is_closed = False

    def run(self, task: Callable[[], T]) -> T:
        """Run a quick task and return its result.

        Raises:
            ClosedError: If the demo is shutting down.
        """
        with self.priority():
            return _result(self.submit(task))

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Queue a quick task.

        Raises:
            ClosedError: If the demo is shutting down.
        """
        with self._accepting():
            self._quick_tasks += 1
            return self._quick.submit(self._run_quick, task)

    def render(self, task: Callable[[], T]) -> T:
        """Run a task that writes a document, on threads of its own, and return its result.

        Raises:
            ClosedError: If the demo is shutting down.
        """
        with self._accepting():
            future = self._rendering.submit(task)
        return _result(future)

    @contextmanager
    def priority(self) -> Iterator[None]:
        """Let slow jobs wait while the block runs, at most `YIELD_SECONDS` per batch."""
        self._count_call(+1)
        try:
            yield
        finally:
            self._count_call(-1)

    @contextmanager
    def slow(self, task: Callable[[Callable[[int], None]], object]) -> Iterator[SlowJob]:
        """Start a slow job; it stops before its next batch when the block ends.

        Args:
            task: Function of `before_batch`, a callback to call before each batch with the number of its images.

        Raises:
            BusyError: If too many jobs are waiting.
            ClosedError: If the demo is shutting down.
        """
        job = SlowJob()
        with self._accepting():
            if len(self._jobs) >= SLOW_THREADS + SLOW_QUEUE:
                raise BusyError(f"{len(self._jobs)} slow methods are running or waiting: try again in a few minutes")
            self._jobs.add(job)
            job.future = self._slow.submit(self._run_slow, job, task)
        try:
            yield job
        finally:
            job.stop.set()
            if job.future.cancel():  # it had not started
                self._remove(job)

    def close(self) -> None:
        """Shut down: running batches end, waiting calls get an error."""
        with self._condition:
            self._is_closed = True
            for job in self._jobs:
                job.stop.set()
            self._condition.notify_all()
        for pool in (self._quick, self._slow, self._rendering):
            pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def _accepting(self) -> Iterator[None]:
        with self._condition:
            if self._is_closed:
                raise ClosedError(CLOSING)
            yield

    def _run_quick(self, task: Callable[[], T]) -> T:
        try:
            return task()
        finally:
            with self._condition:
                self._quick_tasks -= 1
            if not self._quick_tasks:  # otherwise the next task reuses the memory
                release_memory()

    def _run_slow(self, job: SlowJob, task: Callable[[Callable[[int], None]], T]) -> T:
        def before_batch(images: int) -> None:
            with self._condition:
                self._condition.wait_for(lambda: not self._priority_calls or job.stop.is_set(), YIELD_SECONDS)
            if job.stop.is_set():
                raise ClosedError(CLOSING if self._is_closed else DISCONNECTED)
            job.started_images += images

        try:
            return task(before_batch)
        finally:
            self._remove(job)
            release_memory()

    def _remove(self, job: SlowJob) -> None:
        with self._condition:
            self._jobs.discard(job)

    def _count_call(self, by: int) -> None:
        with self._condition:
            self._priority_calls += by
            self._condition.notify_all()


class Batcher(Generic[Key, Item, Result]):
    """Computes waiting items of the same key together.

    Args:
        scheduler: Scheduler that computes the batches, as quick tasks.
        compute: Function of (key, items) that returns a result per item.
        max_batch: Function of a key that returns the largest batch.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        compute: Callable[[Key, Sequence[Item]], Sequence[Result]],
        max_batch: Callable[[Key], int],
    ) -> None:
        self.scheduler, self.compute, self.max_batch = scheduler, compute, max_batch
        self._waiting: list[_Entry[Key, Item, Result]] = []
        self._lock = threading.Lock()

    def run(self, key: Key, item: Item) -> Result:
        """Wait for the result of an item.

        Raises:
            ClosedError: If the demo is shutting down.
        """
        entry: _Entry[Key, Item, Result] = _Entry(key, item)
        with self.scheduler.priority():
            # Each entry submits one task. Tasks take entries in order, so by the time an entry's own task ends, it has
            # been computed.
            with self._lock:
                self._waiting.append(entry)
                task = self.scheduler.submit(self._compute_next)
            _result(task)
        return entry.result.result()

    def _compute_next(self) -> None:
        with self._lock:
            # `is`, because keys, such as models, need not define equality.
            batch = [one for one in self._waiting if one.key is self._waiting[0].key]
            batch = batch[: self.max_batch(batch[0].key)] if batch else []
            self._waiting = [one for one in self._waiting if one not in batch]
        if batch and not self._compute_batch(batch) and len(batch) > 1:
            for one in batch:  # so that an invalid item fails alone
                self._compute_batch([one])

    def _compute_batch(self, batch: Sequence["_Entry[Key, Item, Result]"]) -> bool:
        try:
            results = self.compute(batch[0].key, [one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
            return False
        for one, result in zip(batch, results, strict=True):
            one.result.set_result(result)
        return True


class _Entry(Generic[Key, Item, Result]):
    def __init__(self, key: Key, item: Item) -> None:
        self.key, self.item = key, item
        self.result: Future[Result] = Future()


def _result(future: Future[T]) -> T:
    """Wait for a future; shutting down cancels it."""
    try:
        return future.result()
    except CancelledError:
        raise ClosedError(CLOSING) from None


def release_memory() -> None:
    """Return freed memory that glibc keeps to the system; elsewhere nothing happens."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
