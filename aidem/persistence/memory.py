"""Records in a dict: for tests, and for services with a single process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem._runtime.cancellation import Immediate
from aidem._runtime.clock import wall_clock
from aidem._runtime.fork import ForkSafeLock
from aidem.persistence._context import OpenedByAsyncWith
from aidem.persistence._scan import selected

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aidem._rules.record import DataRecord, RecordStatus

SWEEP_EVERY: Final = 64
"""After how many claims that were asked for some records are checked for expiry."""

SWEPT_AT_ONCE: Final = 2 * SWEEP_EVERY
"""How many are checked: two for each claim asked for, so that no more than about half of all records have expired."""

_STORE, _REFUSED = Completion.STORE, Completion.REFUSED  # to look a member up on its enum costs as much as a call


class MemoryPersistenceLayer(OpenedByAsyncWith):
    """Keeps records in memory, for as long as the process lives; threads and event loops can share an instance.

    Its operations never wait, so they need no task, no future and no turn of the event loop.
    """

    def __init__(self, *, clock: Callable[[], float] = wall_clock) -> None:
        """Start empty.

        Args:
            clock: Returns epoch seconds; used for every decision. Default: the clock of the machine.
        """
        self.clock = clock
        self._records: dict[str, DataRecord] = {}
        self._last_fence = 0  # of any key: fences grow over release and expiry, too, in bounded space
        self._acquires = 0
        self._unchecked: list[str] = []
        self._guard = ForkSafeLock()

    def acquire(
        self,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - there is only one clock
    ) -> Immediate[Claimed | Blocked]:
        """Claim the key."""
        key = record.idempotency_key
        with self._guard.lock:
            own_now = self.clock()
            found = self._records.get(key)
            answer = lifecycle.acquire(found, record, now=own_now, proposed_at=now, last_fence=self._last_fence)
            if isinstance(answer, Claimed):
                claimed = self._records[key] = answer.record
                self._last_fence = max(self._last_fence, claimed.fence)
            self._acquires += 1
            if self._acquires % SWEEP_EVERY == 0:
                self._sweep(own_now)
        return Immediate(answer)

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - there is only one clock
        force: bool = False,
    ) -> Immediate[DataRecord | None]:
        """Take one claim over."""
        key = record.idempotency_key
        with self._guard.lock:
            own_now = self.clock()
            stored = self._records.get(key)
            answer = lifecycle.taken_over(
                stored, found, record, now=own_now, proposed_at=now, force=force, last_fence=self._last_fence
            )
            if answer is not None:
                self._records[key] = answer
                self._last_fence = max(self._last_fence, answer.fence)
        return Immediate(answer)

    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        """Store the outcome."""
        key = record.idempotency_key
        with self._guard.lock:
            own_now = self.clock()
            decision = lifecycle.complete(self._records.get(key), record, now=own_now)
            if decision is _STORE:
                self._records[key] = lifecycle.shifted(record, seconds=own_now - now)
        return Immediate(decision is not _REFUSED)

    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        """Move the instants of the claim."""
        key = record.idempotency_key
        with self._guard.lock:
            proposed = lifecycle.shifted(record, seconds=self.clock() - now)
            renewed = lifecycle.renewed(self._records.get(key), proposed)
            if renewed is not None:
                self._records[key] = renewed
        return Immediate(renewed)

    def release(self, record: DataRecord) -> Immediate[bool]:
        """Delete the claim."""
        key = record.idempotency_key
        with self._guard.lock:
            held = lifecycle.is_held_by(self._records.get(key), record.owner)
            if held:
                del self._records[key]
        return Immediate(held)

    def get(self, key: str) -> Immediate[DataRecord | None]:
        """Look the record up."""
        with self._guard.lock:
            return Immediate(self._records.get(key))

    def forget(self, key: str) -> Immediate[None]:
        """Drop the record."""
        with self._guard.lock:
            self._records.pop(key, None)
        return Immediate(None)

    def records(self) -> dict[str, DataRecord]:
        """Return all records by idempotency key, also those that have expired: for tests."""
        with self._guard.lock:
            return dict(self._records)

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncGenerator[DataRecord]:
        """Iterate over the records of this moment."""
        return selected(self._page(prefix), status=status, limit=limit)

    def purge(self) -> Immediate[int]:
        """Remove all records that have expired."""
        with self._guard.lock:
            now = self.clock()
            expired = [key for key, record in self._records.items() if lifecycle.is_expired(record, now=now)]
            for key in expired:
                del self._records[key]
        return Immediate(len(expired))

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def aclose(self) -> None:
        """Do nothing: the records stay."""

    async def _page(self, prefix: str) -> AsyncGenerator[list[DataRecord]]:
        with self._guard.lock:
            page = [record for key, record in self._records.items() if key.startswith(prefix)]
        yield page

    def _sweep(self, now: float) -> None:
        """Drop the expired ones among the next few records, the oldest first, in turn."""
        if not self._unchecked:
            self._unchecked = list(reversed(self._records))
        for key in self._unchecked[-SWEPT_AT_ONCE:]:
            record = self._records.get(key)
            if record is not None and lifecycle.is_expired(record, now=now):
                del self._records[key]
        del self._unchecked[-SWEPT_AT_ONCE:]
