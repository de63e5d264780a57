"""Evaluation in several processes, as torchrun starts them: each computes its share, and all get all results in order.

Every process runs the same program. Inside `process_group`, `distributed_map` shares items out and collects the
results, and `on_main` runs a function, for instance one that writes a file, in process 0 alone. Outside of it, and in
threads that have not entered it, there is one process, and both only call their functions.

The processes communicate with torch's gloo backend. Results travel as pickles, between processes of one job only.
"""

import contextlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import BcosError, DistributedError, InputError

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "ALONE",
    "KEPT",
    "Processes",
    "current_processes",
    "distributed_map",
    "has_joined",
    "on_main",
    "process_group",
    "signed_once",
    "started_processes",
]

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT = timedelta(days=1)  # processes wait for the slowest item of each round
KEPT = "results written so far are kept; evaluations resume, with any number of processes"
LOST = f"the connection to another process was lost, which has failed (see its message) or was killed; {KEPT}"


@dataclass(frozen=True)
class Processes:
    """The processes that compute together.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"


ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("processes that compute together", default=ALONE)


@dataclass(frozen=True)
class _Connection:
    """What a process has when it has joined the others, which it does at most once.

    Attributes:
        group: Process group of the gloo backend.
        store: Key-value store of all processes; None if the program has opened a process group itself.
    """

    group: Any
    store: "Store | None"


_connection: _Connection | None = None


def started_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """The processes of torch's process group, or those that torchrun's environment variables describe, or a single one.

    Raises:
        InputError: If the variables are incomplete or are no numbers.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    if not {"RANK", "WORLD_SIZE"} <= environment.keys():
        return ALONE
    given = {name: environment[name] for name in ("RANK", "WORLD_SIZE")}
    try:
        found = Processes(*map(int, given.values()))
    except ValueError:
        found = Processes(0, 0)
    if not 0 <= found.rank < found.size:
        raise InputError(
            f"RANK={given['RANK']!r} and WORLD_SIZE={given['WORLD_SIZE']!r} describe no process: start with torchrun, "
            f"or unset both"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if found.size > 1 and missing:
        raise InputError(f"WORLD_SIZE={found.size}, but {missing[0]} is not set: start with torchrun, or unset both")
    return found


def current_processes() -> Processes:
    """The processes that compute together in this thread."""
    return _CURRENT.get()


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """Context manager in which the processes that torchrun has started compute together.

    Without torchrun's environment variables, or with a single process, nothing happens. A process group that the
    program has opened itself is used. At the end of the block the processes wait for each other.

    Raises:
        InputError: If the environment variables are incomplete.
        DistributedError: If the processes cannot connect, or another one has ended.
    """
    processes = started_processes()
    if processes.size > 1:
        _join(processes)
    token = _CURRENT.set(processes)
    try:
        yield processes
        on_main(lambda: None)  # the processes end together
    finally:
        _CURRENT.reset(token)


def _join(processes: Processes) -> None:
    global _connection
    if _connection is not None:
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise DistributedError("this build of torch has no gloo: start a single process, without torchrun")
    if dist.is_initialized():
        _connection = _Connection(dist.new_group(backend="gloo", timeout=TIMEOUT), None)
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"{processes} cannot connect to the others: {error}") from error
    for backend in (torch.cuda, torch.xpu):  # "cuda" is another device in each process of a machine
        if backend.is_available():
            backend.set_device(int(os.environ.get("LOCAL_RANK", "0")) % backend.device_count())
    _connection = _Connection(dist.group.WORLD, store)


def has_joined() -> bool:
    """Whether this process has connected to others."""
    return _connection is not None


def signed_once(message: str, error: BaseException | None = None) -> str | None:
    """The message of an error with the process that raised it; None if another process has asked for it before.

    Args:
        message: Text without the process.
        error: Error that `distributed_map` or `on_main` may have passed on from another process; None for a signal.
    """
    try:
        process = getattr(error, "process", started_processes())
    except InputError:  # which is the message
        return message
    with contextlib.suppress(RuntimeError):  # the process that keeps the store may have ended
        store = _connection.store if _connection else None
        if store is None and error is not None and process.size > 1:
            store = _store_of_torchrun()
        if store is not None and store.add(f"timm_bcos says {message}", 1) > 1:
            return None
    return message if process.size == 1 else f"{process}: {message}"


def _store_of_torchrun() -> "Store | None":
    """The key-value store that torchrun keeps, for processes that do not compute together; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))


@dataclass
class _Outcome(Generic[R]):
    """What a process has computed: a result, or the error that it raised, and what was written to stderr meanwhile."""

    result: R | None = None
    error: Exception | None = None
    messages: str = ""

    def __getstate__(self) -> dict[str, Any]:
        error = None if self.error is None else _portable(self.error)
        return dict(result=self.result, error=error, messages=self.messages)

    def get(self) -> R:
        """The result. An error is raised in every process."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def _portable(error: Exception) -> Exception:
    """An error that survives pickling with its message; of another type if it does not do so itself."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever the error's own constructor raises
        pass
    return BcosError(str(error)) if isinstance(error, BcosError) else RuntimeError(f"{type(error).__name__}: {error}")


def _attempt(function: Callable[[], R]) -> _Outcome[R]:
    """Call a function. Its messages are kept, unless this is the main process, which prints them itself."""
    with contextlib.ExitStack() as stack:
        messages = io.StringIO()
        if not current_processes().is_main:
            stack.enter_context(contextlib.redirect_stderr(messages))
        try:
            return _Outcome(function(), None, messages.getvalue())
        except Exception as error:
            return _Outcome(None, error, messages.getvalue())


def _exchange(own: _Outcome[R] | None) -> list[_Outcome[R]]:
    """The outcomes of all processes, by rank. The process's own error stays the object that it is."""
    import torch.distributed as dist

    processes = current_processes()
    found: list[Any] = [None] * processes.size
    try:
        dist.all_gather_object(found, own, _connection.group if _connection else None)
    except RuntimeError as error:
        raise DistributedError(LOST) from error
    found[processes.rank] = own
    if processes.is_main:
        print("".join(outcome.messages for outcome in found[1:] if outcome), end="", file=sys.stderr)
    for rank, outcome in enumerate(found):
        if outcome is not None and outcome.error is not None:
            outcome.error.process = Processes(rank, processes.size)
    return found


def distributed_map(compute: Callable[[Sequence[T]], Iterator[R]], items: Sequence[T]) -> Iterator[R]:
    """Share items out to the processes, and iterate over all results in order, in every process.

    Process r of n computes items r, r + n, r + 2n, ... As each item is computed as a whole by one process, results are
    bitwise those of a single process with the same number of threads. An error is raised in every process, after the
    results of the items before it.

    Args:
        compute: Function of the items of one process that returns an iterator over one result per item. Results must be
            picklable, and tensors must be on the CPU.
        items: All items, the same in every process.

    Yields:
        The result of each item.

    Raises:
        DistributedError: If another process has ended.

    Example:
        >>> def squares(numbers):
        ...     for number in numbers:
        ...         yield number**2
        >>> list(distributed_map(squares, range(5)))
        [0, 1, 4, 9, 16]
    """
    processes = current_processes()
    own = compute(items[processes.rank :: processes.size])
    try:
        yield from own if processes.size == 1 else _in_rounds(own, len(items), processes)
    finally:
        if isinstance(own, Generator):
            own.close()  # and what it loads in the background


def _in_rounds(own: Iterator[R], count: int, processes: Processes) -> Iterator[R]:
    """The results of all processes, each of which computes one item per round."""
    for start in range(0, count, processes.size):
        items = min(processes.size, count - start)
        outcome = _attempt(partial(next, own)) if processes.rank < items else None
        for found in _exchange(outcome)[:items]:
            yield found.get()


def on_main(function: Callable[[], R]) -> R:
    """Call a function in process 0 alone. Its result is returned, or its error raised, in every process.

    Args:
        function: Function whose result is picklable.

    Raises:
        DistributedError: If another process has ended.
    """
    processes = current_processes()
    if processes.size == 1:
        return function()
    return _exchange(_attempt(function) if processes.is_main else None)[0].get()
