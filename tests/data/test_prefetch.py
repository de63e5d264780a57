"""What is read ahead comes in order, not too early, and ends with its reader."""

import threading
from collections.abc import Iterator

import pytest

from timm_bcos.prefetch import prefetch


def test_items_in_their_order_from_another_thread() -> None:
    seen = [
        (i, thread != threading.get_ident()) for i, thread in prefetch((i, threading.get_ident()) for i in range(9))
    ]
    assert seen == [(i, True) for i in range(9)]
    assert list(prefetch([])) == []


def test_no_more_than_what_waits() -> None:
    made = [threading.Event() for _ in range(100)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    reader = prefetch(items(), waiting=3)
    assert next(reader) == 0
    assert made[3].wait(60)  # the one that was given, and three that wait
    assert not made[4].wait(0.2)
    reader.close()
    assert not made[5].wait(0.2)


def test_errors_come_in_their_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("torn file")

    reader = prefetch(items())
    assert next(reader) == 1
    with pytest.raises(OSError, match="torn file"):
        next(reader)


def test_what_it_reads_from_is_closed() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.set()

    for _ in prefetch(items()):
        break
    assert ended.wait(5)
