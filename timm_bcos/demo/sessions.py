"""The answers that wait for visitors to listen: a bounded number, and never at the cost of somebody who listens."""

from asyncio import Queue
from collections.abc import MutableMapping
from typing import Any

from .guard import Listeners
from .limits import UNHEARD

__all__ = ["Mailboxes"]


class Mailboxes(dict[str, Any]):
    """Messages by session, in the place of a cache of Gradio's that forgets the oldest session even while it listens.

    Args:
        listeners: The sessions that listen now.
        events: Their calls by session, forgotten with them.
    """

    def __init__(self, listeners: Listeners, events: MutableMapping[str, set[str]]) -> None:
        super().__init__()
        self.listeners, self.events = listeners, events

    def __setitem__(self, session: str, messages: Any) -> None:
        super().__setitem__(session, messages)
        unheard = [one for one in self if one not in self.listeners]
        for one in unheard[:-UNHEARD]:
            del self[one]

    def __delitem__(self, session: str) -> None:
        super().__delitem__(session)
        self.events.pop(session, None)

    def __missing__(self, session: str) -> Any:
        """Where an answer goes that nobody waits for any more."""
        return Queue()
