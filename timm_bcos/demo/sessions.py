"""The sessions of the demo: which of them are connected, and the results that wait to be read."""

import threading
from asyncio import Queue
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from .limits import UNREAD_SESSIONS

__all__ = ["ConnectedSessions", "MessageQueues"]


class ConnectedSessions:
    """The sessions whose clients listen for results: `session in connected`."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __contains__(self, session: str) -> bool:
        return self._streams[session] > 0

    def add(self, session: str) -> None:
        """Count one more stream of a session."""
        with self._lock:
            self._streams[session] += 1

    def remove(self, session: str) -> None:
        """Count one stream less."""
        with self._lock:
            self._streams[session] -= 1
            if not self._streams[session]:
                del self._streams[session]


class MessageQueues(dict[str, Any]):
    """The message queue of each session, bounded in number.

    It replaces a cache of Gradio's, which drops the oldest session even while its client is connected.

    Args:
        connected: Sessions that are never dropped.
        events: Gradio's pending events by session, dropped together with the queue.
    """

    def __init__(self, connected: ConnectedSessions, events: MutableMapping[str, set[str]]) -> None:
        super().__init__()
        self.connected, self.events = connected, events

    def __setitem__(self, session: str, messages: Any) -> None:
        super().__setitem__(session, messages)
        unread = [one for one in self if one not in self.connected]
        for one in unread[:-UNREAD_SESSIONS]:
            del self[one]

    def __delitem__(self, session: str) -> None:
        super().__delitem__(session)
        self.events.pop(session, None)

    def __missing__(self, session: str) -> Any:
        """A queue that nobody reads, for results of dropped sessions."""
        return Queue()
