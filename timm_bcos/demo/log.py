"""Not more lines in the log than somebody reads, whatever strangers send."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .limits import LINES_A_MINUTE

__all__ = ["FewLines"]

MORE = "more goes wrong than is told of here, until the minute is over"


class FewLines(logging.Filter):
    """Lets `LINES_A_MINUTE` records of several loggers together pass; the last of them says that there are more."""

    def __init__(self) -> None:
        super().__init__()
        self.minute = self.lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        minute = int(time.monotonic() // 60)
        if minute != self.minute:
            self.minute, self.lines = minute, 0
        self.lines += 1
        if self.lines == LINES_A_MINUTE:
            record.msg, record.args, record.exc_info, record.exc_text = MORE, None, None, None
        return self.lines <= LINES_A_MINUTE

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Hold for these loggers while the block runs."""
        loggers = [logging.getLogger(name) for name in names]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)
