"""All limits of the demo: sizes and numbers of requests, threads, memory, and lines in the log."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BATCH_SIZE", "BODY_SECONDS", "BUFFERED_BYTES", "CONCURRENT_CALLS", "DECODING_THREADS", "GRACE_SECONDS",
    "LOG_LINES_PER_MINUTE", "MAX_CONNECTIONS", "MAX_JSON_VALUES", "MAX_PHOTO_BYTES", "MAX_REQUEST_BYTES",
    "MAX_SESSIONS", "POLL_SECONDS", "QUEUED_CALLS", "QUICK_THREADS", "RENDERING_THREADS", "SESSION_SECONDS",
    "SLOW_BATCH_SIZE", "SLOW_QUEUE", "SLOW_THREADS", "UNREAD_SESSIONS", "YIELD_SECONDS", "LogLimit",
]  # fmt: skip

# Requests
MAX_PHOTO_BYTES = 20_000_000  # of a photo's file
MAX_REQUEST_BYTES = MAX_PHOTO_BYTES * 4 // 3 + 1_000_000  # a photo in base64, and the other arguments
BUFFERED_BYTES = 4 * MAX_REQUEST_BYTES  # of all requests that are being received
BODY_SECONDS = 300  # timeout for the body of a request
MAX_JSON_VALUES = 2_000  # in a request: parsed JSON takes much more memory than its text
MAX_CONNECTIONS = 400
LOG_LINES_PER_MINUTE = 30

# Computation
QUEUED_CALLS = 32  # calls in Gradio's queue; further ones are refused
CONCURRENT_CALLS = 16  # photos that are being handled; all but one batch of them wait for the processor
QUICK_THREADS = 2  # threads that explain photos
BATCH_SIZE = {"cpu": 1, "cuda": 8}  # photos per forward pass; batches gain nothing on a CPU (docs/serving.md)
RENDERING_THREADS = 2  # threads that write HTML documents
DECODING_THREADS = 2  # photos that are decoded at the same time, each up to 180 MB
SLOW_THREADS = 2  # threads for slow attribution methods
SLOW_BATCH_SIZE = 4  # images per forward pass of a slow method: about 0.2 GB each; a photo waits for one such pass
SLOW_QUEUE = 6  # comparisons that wait for a slow thread; further ones are refused
YIELD_SECONDS = 5.0  # longest time that a slow method lets photos go first, per batch
POLL_SECONDS = 1.0  # interval at which a comparison checks that its client is still connected
GRACE_SECONDS = 5.0  # time in which a client has to start listening for its result

# Memory
MAX_SESSIONS = 50  # session states that are kept; the least recently used is dropped first
SESSION_SECONDS = 3600
UNREAD_SESSIONS = 200  # disconnected sessions whose results are kept, some MB each


class LogLimit(logging.Filter):
    """Passes at most `LOG_LINES_PER_MINUTE` records of several loggers together; the last one says that more follow."""

    MESSAGE = "further messages of this minute are left out"

    def __init__(self) -> None:
        super().__init__()
        self.minute = self.lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        minute = int(time.monotonic() // 60)
        if minute != self.minute:
            self.minute, self.lines = minute, 0
        self.lines += 1
        if self.lines == LOG_LINES_PER_MINUTE:
            record.msg, record.args, record.exc_info, record.exc_text = self.MESSAGE, None, None, None
        return self.lines <= LOG_LINES_PER_MINUTE

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Filter the loggers of these names while the block runs."""
        loggers = [logging.getLogger(name) for name in names]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)
