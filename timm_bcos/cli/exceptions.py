"""Errors and signals: every command ends with a one-line message, an exit status, and no partial files."""

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

from ..distributed import KEPT, has_joined, signed_once
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

TRACEBACK = "TIMM_BCOS_TRACEBACK"  # environment variable that shows tracebacks
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file of its frames
IMPORT_PAUSE, IMPORT_CHECKS = 0.05, 400  # interval in seconds and number of checks for an import to end
NOISE = (
    (r"Glyph .* missing from", UserWarning),  # from matplotlib, for class names in other scripts
)

_received: list[int] = []


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. It is not a KeyboardInterrupt, which typer and training scripts handle themselves."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_status(command: Callable[[], object]) -> int:
    """Run a command; errors and signals become one line on stderr.

    Args:
        command: Function to run; it may raise SystemExit.

    Returns:
        Exit status: the command's own, 2 for a `BcosError`, 1 for other errors, 128 + number for signals.
    """
    _accept_any_name(sys.stdout, sys.stderr)
    try:
        with _interruptible():
            status = _status_of(command)
            stop_if_interrupted()
            sys.stdout.flush()
            return status
    except Interrupted as stop:
        return _end(_stop_message(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _end("stopped by SIGINT", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader has closed the pipe, as in `timm-bcos ... | head`
        return _end(None, 128 + signal.SIGPIPE)
    except Exception as error:
        if _received:  # interrupted code, above all imports, may raise errors of its own
            return _end(_stop_message(Interrupted(_received[0])), 128 + _received[0])
        if isinstance(error, BcosError):
            return _end(signed_once(one_line(error), error), 2)
        hint = "" if isinstance(error, OSError) else f" (set {TRACEBACK}=1 to see the traceback)"
        return _end(signed_once(one_line(error) + hint, error), 1)


def _stop_message(stop: Interrupted) -> str | None:
    """The message of a stopped process. torchrun stops all processes by SIGTERM when one of them fails."""
    by_torchrun = stop.number == signal.SIGTERM and has_joined()
    return signed_once(
        f"{stop}, by which torchrun ends all processes when one fails; {KEPT}" if by_torchrun else str(stop)
    )


def one_line(error: Exception) -> str:
    """The message of an error in one line."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, BcosError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {first_line(error)}{_timm_hint(error)}"


def _timm_hint(error: Exception) -> str:
    """For a part of timm that cannot be imported, which timm was found where: a clone may hide the installed one."""
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] != "timm":
        return ""
    try:
        from .._compat import describe_timm
    except BcosError as cause:
        return f"; {cause}"
    return f"; {describe_timm()}"


def stop_if_interrupted() -> None:
    """Raise `Interrupted` after a signal whose exception was lost in a destructor or in other code."""
    if _received:
        raise Interrupted(_received[0])


@contextlib.contextmanager
def as_python_does() -> Iterator[None]:
    """Run a user's script with Python's own handling of signals and errors."""
    for number in SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    except BcosError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(_timm_hint(error).removeprefix("; ") or 1) from None


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings that do not concern users of the command."""
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
    """Print the message, and close streams that cannot be written, which would fail again when Python exits."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed
        if message is not None:
            print(f"timm-bcos: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # streams of tests have no file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _accept_any_name(*streams: TextIO) -> None:
    """Escape characters that a terminal cannot encode, for instance in file names."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, so that temporary files are removed; ignored signals stay ignored."""
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
    """Raise `Interrupted`, but not within an import: torch's C++ code would abort the process."""
    _received.append(number)
    if not _imports(frame) or len(_received) > IMPORT_CHECKS:
        raise Interrupted(number)
    again = threading.Timer(IMPORT_PAUSE, _repeat, (number,))
    again.daemon = True
    again.start()


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame is part of an import."""
    while frame is not None and frame.f_code.co_filename != IMPORT_SYSTEM:
        frame = frame.f_back
    return frame is not None


def _repeat(number: int) -> None:
    if signal.getsignal(number) is _interrupt:  # the command still runs
        signal.pthread_kill(threading.main_thread().ident or 0, number)
