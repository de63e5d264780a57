"""How a command ends: whatever stops it is one line, and leaves nothing half done behind."""

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from ..errors import BcosError
from ..files import first_line

__all__ = [
    "Interrupted",
    "as_python_does",
    "exit_status",
    "one_line",
    "quiet_libraries",
    "stop_if_interrupted",
]

TRACEBACK = "TIMM_BCOS_TRACEBACK"  # the environment variable that shows where an error came from
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file of its frames
IMPORT_PAUSE, IMPORT_CHECKS = 0.05, 400  # a signal waits so many seconds for an import to end, so many times
NOISE = (
    (r"Glyph .* missing from", UserWarning),  # matplotlib, of class names; the terminal shows them
)

_received: list[int] = []


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. It is no KeyboardInterrupt: typer and training scripts answer those by themselves."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_status(command: Callable[[], object]) -> int:
    """Run a command; errors, interruptions and full disks become one line on stderr.

    Args:
        command: It may end by SystemExit.

    Returns:
        The exit status: the command's own, 2 for errors that we raise on purpose, 1 for others, 128 and the signal's
        number for signals.
    """
    _accept_any_name(sys.stdout, sys.stderr)
    try:
        with _interruptible():
            status = _status_of(command)
            stop_if_interrupted()
            sys.stdout.flush()
            return status
    except Interrupted as stop:
        return _end(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _end("stopped by SIGINT", 128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads on, as in `timm-bcos ... | head`
        return _end(None, 128 + signal.SIGPIPE)
    except Exception as error:
        if _received:  # what a signal interrupts, above all an import, may raise errors of its own
            return _end(str(Interrupted(_received[0])), 128 + _received[0])
        if isinstance(error, BcosError):
            return _end(one_line(error), 2)
        hint = "" if isinstance(error, OSError) else f" ({TRACEBACK}=1 in the environment shows where)"
        return _end(one_line(error) + hint, 1)


def one_line(error: Exception) -> str:
    """What a user is told of an error."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, BcosError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {first_line(error)}"


def stop_if_interrupted() -> None:
    """For between two steps: an exception that a signal raises in a destructor or in foreign code may get lost."""
    if _received:
        raise Interrupted(_received[0])


@contextlib.contextmanager
def as_python_does() -> Iterator[None]:
    """Within a command, a script of the user's: signals act, and its errors look, as without us."""
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    except BcosError:
        raise
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without warnings that say nothing to a user of the command."""
    with warnings.catch_warnings():
        for message, category in NOISE:
            warnings.filterwarnings("ignore", message, category)
        yield


def _status_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _end(message: str | None, status: int) -> int:
    """Say it, and let nothing that could not be written fail once more when Python exits."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed too
        if message is not None:
            print(f"timm-bcos: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # tests' streams have no number
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _accept_any_name(*streams: TextIO) -> None:
    """File names may have characters that a terminal's encoding lacks, or bytes that are no text."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that temporary files go; a signal that is ignored stays so."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    answered = [number for number in SIGNALS if previous[number] is not signal.SIG_IGN]
    _received.clear()
    for number in answered:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, previous[number])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop here, or soon: an exception in an import may reach C++ code of torch's, which then aborts the process."""
    _received.append(number)
    if not _imports(frame) or len(_received) > IMPORT_CHECKS:
        raise Interrupted(number)
    again = threading.Timer(IMPORT_PAUSE, _repeat, (number,))
    again.daemon = True
    again.start()


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None and frame.f_code.co_filename != IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None


def _repeat(number: int) -> None:
    if signal.getsignal(number) is _interrupt:  # the command still runs
        signal.pthread_kill(threading.main_thread().ident or 0, number)
