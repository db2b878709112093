"""Calls in flight: who of this event loop is at the store for a key, so that the others need not ask it too.

The first caller of a key opens a *flight* and talks to the store; callers that may wait follow it. A flight ends with
the record that counts, with an error of the store, or with nothing: then one of the followers opens the next.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aidem._record import DataRecord
    from aidem.exceptions import IdempotencyPersistenceLayerError

    Ending = DataRecord | IdempotencyPersistenceLayerError | None


class Flight:
    """One caller at the store for one key.

    Attributes:
        record: The live record as far as it is known: the claim of the caller, or what blocks it.
        lease_deadline: When the claim of the caller lapses, in seconds of the loop's clock; None: it does not.
        polls: How often in a row the store was asked in vain, over successive callers.
        is_over: Whether it has ended.
        ending: What it ended with.
    """

    __slots__ = ("_changed", "ending", "is_over", "lease_deadline", "polls", "record")

    def __init__(self, *, polls: int = 0) -> None:
        self.record: DataRecord | None = None
        self.lease_deadline: float | None = None
        self.polls = polls
        self.is_over = False
        self.ending: Ending = None
        self._changed: asyncio.Future[None] | None = None

    def publish(self, record: DataRecord, *, lease_deadline: float | None) -> None:
        """Tell the followers which record is there now."""
        self.record = record
        self.lease_deadline = lease_deadline
        if self._changed is not None:
            self._wake(self._changed)

    def end(self, ending: Ending) -> None:
        """Tell the followers how it ended; only the first end counts."""
        if not self.is_over:
            self.is_over = True
            self.ending = ending
            if self._changed is not None:
                self._wake(self._changed)

    async def change(self, *, timeout_seconds: float) -> None:
        """Wait for the next change, but no longer than the timeout."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        # asyncio.wait leaves the future alone when it times out or is cancelled: others wait for it too.
        await asyncio.wait([self._changed], timeout=timeout_seconds)

    def _wake(self, changed: asyncio.Future[None]) -> None:
        self._changed = None
        if not changed.get_loop().is_closed():
            changed.set_result(None)
