"""Who computes when: photos first and several together, slow methods between them, nothing after the page's end."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..errors import BcosError
from .limits import PATIENCE, QUICK_AT_ONCE, RENDERING, SLOW_AT_ONCE, SLOW_WAITING

__all__ = ["CLOSING", "BusyError", "ClosedError", "Collector", "SlowJob", "Work", "release_memory"]

CLOSING = "the page is being closed: try again later"

Key = TypeVar("Key")
Item = TypeVar("Item")
Answer = TypeVar("Answer")
T = TypeVar("T")


class BusyError(BcosError, RuntimeError):
    """More is asked for than the page takes at once."""


class ClosedError(BcosError, RuntimeError):
    """The page is being closed, or the visitor has gone."""


class SlowJob:
    """A step of many batches, in a thread of its own, until it ends or its visitor has gone.

    Attributes:
        images: How many it has looked at.
    """

    def __init__(self) -> None:
        self.images = 0
        self.future: Future[Any] = Future()
        self.stop = threading.Event()

    def result(self) -> Any:
        """What the step returns.

        Raises:
            ClosedError: If it was stopped before it began.
        """
        try:
            return self.future.result()
        except CancelledError:
            raise ClosedError(CLOSING) from None

    def is_done(self, timeout: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        try:
            self.future.exception(timeout)
        except TimeoutError:
            return False
        except CancelledError:
            return True
        return True


class Work:
    """Threads that compute. Few, since each keeps memory of its own, and more would only take turns at the processor.

    Photos and other quick steps are computed two at a time, in the order in which they were asked for. Slow jobs
    have their own threads and let quick steps go first, batch by batch.

    Args:
        quick: Quick steps at the same time.
    """

    def __init__(self, quick: int = QUICK_AT_ONCE) -> None:
        self._quick = ThreadPoolExecutor(quick, "quick")
        self._rendering = ThreadPoolExecutor(RENDERING, "rendering")
        self._slow = ThreadPoolExecutor(SLOW_AT_ONCE, "slow")
        self._changed = threading.Condition()
        self._asked = 0  # visitors who wait for quick steps
        self._queued = 0  # quick steps that are not yet computed
        self._jobs: set[SlowJob] = set()
        self._is_closed = False

    def run(self, step: Callable[[], T]) -> T:
        """What a quick step returns.

        Raises:
            ClosedError: If the page is being closed.
        """
        with self.asking():
            return self.result(self.submit(step))

    def submit(self, step: Callable[[], T]) -> Future[T]:
        """Let a quick step be computed when its turn comes.

        Raises:
            ClosedError: If the page is being closed.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError(CLOSING)
            self._queued += 1
            return self._quick.submit(self._run_quick, step)

    def render(self, step: Callable[[], T]) -> T:
        """What a step returns that only writes down what has been computed.

        Raises:
            ClosedError: If the page is being closed.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError(CLOSING)
            future = self._rendering.submit(step)
        return self.result(future)

    def result(self, future: Future[T]) -> T:
        """What `submit` promised.

        Raises:
            ClosedError: If the page is closed meanwhile.
        """
        try:
            return future.result()
        except CancelledError:
            raise ClosedError(CLOSING) from None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Slow jobs wait while the block runs, a few seconds for each of their batches at most."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    @contextmanager
    def slow(self, step: Callable[[Callable[[int], None]], object]) -> Iterator[SlowJob]:
        """Start a slow step; it stops before its next batch when the block ends.

        Args:
            step: A function of `before_batch`, which it calls before each batch with the number of its images.

        Raises:
            BusyError: If too many wait already.
            ClosedError: If the page is being closed.
        """
        job = SlowJob()
        with self._changed:
            if self._is_closed:
                raise ClosedError(CLOSING)
            if len(self._jobs) >= SLOW_AT_ONCE + SLOW_WAITING:
                raise BusyError(
                    f"{len(self._jobs)} slow methods are being computed or waited for: try again in some minutes"
                )
            self._jobs.add(job)
            job.future = self._slow.submit(self._run_slow, job, step)
        try:
            yield job
        finally:
            job.stop.set()
            if job.future.cancel():  # it had not begun
                self._forget(job)

    def close(self) -> None:
        """End in order: what computes ends its batch, what waits is told."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs:
                job.stop.set()
            self._changed.notify_all()
        for pool in (self._quick, self._slow, self._rendering):
            pool.shutdown(wait=True, cancel_futures=True)

    def _run_quick(self, step: Callable[[], T]) -> T:
        try:
            return step()
        finally:
            with self._changed:
                self._queued -= 1
            if not self._queued:  # while there are others, they take the memory that this one has left
                release_memory()

    def _run_slow(self, job: SlowJob, step: Callable[[Callable[[int], None]], T]) -> T:
        def before_batch(images: int) -> None:
            with self._changed:
                self._changed.wait_for(lambda: not self._asked or job.stop.is_set(), PATIENCE)
            if job.stop.is_set():
                raise ClosedError("nobody waits for this any more")
            job.images += images

        try:
            return step(before_batch)
        finally:
            self._forget(job)
            release_memory()

    def _forget(self, job: SlowJob) -> None:
        with self._changed:
            self._jobs.discard(job)

    def _count(self, by: int) -> None:
        with self._changed:
            self._asked += by
            self._changed.notify_all()


class Collector(Generic[Key, Item, Answer]):
    """Questions that wait are answered together, as many as fit.

    Args:
        work: Where they are answered.
        answer: (key, items) to one answer per item, for items of the same key.
        most: Items of a key in one batch.
    """

    def __init__(
        self, work: Work, answer: Callable[[Key, Sequence[Item]], Sequence[Answer]], most: Callable[[Key], int]
    ) -> None:
        self.work, self.answer, self.most = work, answer, most
        self._waiting: list[_Question[Key, Item, Answer]] = []
        self._lock = threading.Lock()

    def ask(self, key: Key, item: Item) -> Answer:
        """The answer, once its turn has come.

        Raises:
            ClosedError: If the page is being closed.
        """
        question: _Question[Key, Item, Answer] = _Question(key, item)
        with self.work.asking():
            with self._lock:  # turns come in the order of the questions: at its own, if not before, each is answered
                self._waiting.append(question)
                turn = self.work.submit(self._answer_next)
            self.work.result(turn)
        return question.answer.result()

    def _answer_next(self) -> None:
        with self._lock:
            batch = [one for one in self._waiting if one.key is self._waiting[0].key]
            batch = batch[: self.most(batch[0].key)] if batch else []
            self._waiting = [one for one in self._waiting if not any(one is taken for taken in batch)]
        if batch and not self._answered(batch) and len(batch) > 1:
            for one in batch:  # what is wrong with one must not fail the others
                self._answered([one])

    def _answered(self, batch: Sequence["_Question[Key, Item, Answer]"]) -> bool:
        try:
            answers = self.answer(batch[0].key, [one.item for one in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            return False
        for one, answer in zip(batch, answers, strict=True):
            one.answer.set_result(answer)
        return True


class _Question(Generic[Key, Item, Answer]):
    def __init__(self, key: Key, item: Item) -> None:
        self.key, self.item = key, item
        self.answer: Future[Answer] = Future()


def release_memory() -> None:
    """Give back what glibc keeps of freed memory; elsewhere nothing happens."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
