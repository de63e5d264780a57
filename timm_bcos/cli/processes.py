"""The command line in several processes: those that share their work, and process 0, which prints."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from ..distributed import ALONE, current_processes, distributed_map, on_main, process_group, started_processes
from ..errors import InputError
from ..files import atomic_path

if TYPE_CHECKING:
    from .outputs import Claim, OutputPaths

__all__ = ["in_one_process", "in_shared_processes", "map_with_outputs", "print_in_all", "print_in_first"]

T = TypeVar("T")
R = TypeVar("R")


def in_shared_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command in all processes that torchrun has started."""

    @functools.wraps(command)
    def run(**options: object) -> None:
        with process_group():
            command(**options)

    return run


def in_one_process(command: Callable[..., None]) -> Callable[..., None]:
    """Refuse to run a command in several processes, which would all do the same."""

    def refuse() -> None:
        raise InputError(f"this command ({command.__name__}) runs in one process: start it without torchrun")

    @functools.wraps(command)
    def run(**options: object) -> None:
        if started_processes().size > 1:
            with process_group():
                on_main(refuse)
        command(**options)

    return run


def print_in_all(command: Callable[..., None]) -> Callable[..., None]:
    """Let every process of a command print, against `print_in_first`."""

    @functools.wraps(command)
    def run(**options: object) -> None:
        with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
            command(**options)

    return command if _is_first() else run


@contextlib.contextmanager
def print_in_first() -> Iterator[None]:
    """Discard what all processes but process 0 print."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _is_first() -> bool:
    try:
        return started_processes().is_main
    except InputError:  # the command reports it
        return ALONE.is_main


def map_with_outputs(function: Callable[[T], R], items: Sequence[T], outputs: "OutputPaths") -> Iterator[R]:
    """Apply a function that writes files to each item. Several processes share the items.

    Names of files depend on the files that were written before. Therefore processes write temporary files, and process
    0 chooses the names and stores the contents, in the order of the items.

    Args:
        function: Function of an item that writes to paths from `outputs.claim`. Its results must be picklable.
        items: All items.
        outputs: Names of the files.

    Yields:
        The result for each item.
    """
    if current_processes().size == 1:
        yield from map(function, items)
        return
    with TemporaryDirectory(prefix="timm-bcos-") as folder:

        def compute(own: Sequence[T]) -> "Iterator[tuple[R, list[tuple[Claim, bytes]]]]":
            for item in own:
                with outputs.temporarily_in(Path(folder)) as claims:
                    result = function(item)
                written = [(claim, claim.path.read_bytes()) for claim in claims if claim.path.is_file()]
                for claim, _ in written:
                    claim.path.unlink()
                yield result, written

        for result, written in distributed_map(compute, items):
            on_main(partial(_store, written, outputs))
            yield result


def _store(written: "Sequence[tuple[Claim, bytes]]", outputs: "OutputPaths") -> None:
    for claim, contents in written:
        with atomic_path(outputs.claim(claim.stem, claim.suffix, claim.label)) as path:
            path.write_bytes(contents)
