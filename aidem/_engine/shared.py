"""What calls share: per layer the local cache, and per event loop the single flights and the renewals.

One caller of an event loop is at the store for a key; the others stand in line and need not ask. The first caller of a
key *leads*: it talks to the store, and callers that may wait stand in line behind it. Its flight ends with the outcome,
with an error of the store or with a claim in doubt, which everybody in line gets. Or it ends with nothing, because the
call failed: then the first in line leads, and only that one is woken. So a key whose calls all fail costs each caller
one turn, however many there are.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextvars import Context
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from aidem._engine.claim import Renewals
from aidem._rules import lifecycle
from aidem._rules.record import COMPLETED
from aidem._runtime.fork import ForkSafeLock

if TYPE_CHECKING:
    from aidem._engine.plan import CallKey
    from aidem._rules.record import DataRecord
    from aidem.exceptions import IdempotencyInDoubtError, IdempotencyPersistenceLayerError
    from aidem.persistence import PersistenceLayer

    Ending = DataRecord | IdempotencyPersistenceLayerError | IdempotencyInDoubtError | None


class PerLoop:
    """What the calls of one event loop share.

    Attributes:
        flights: The calls that are at the store, by key.
        renewals: The claims that are held.
        time: The clock of the loop, in seconds.
    """

    __slots__ = ("flights", "renewals", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.flights: dict[str, SingleFlight] = {}
        self.renewals = Renewals()
        self.time = loop.time


class PerLayer:
    """What the calls of one layer share.

    Attributes:
        cache: Completed records.
    """

    __slots__ = ("_loops", "cache")

    def __init__(self) -> None:
        self.cache = LocalCache()
        self._loops: dict[asyncio.AbstractEventLoop, PerLoop] = {}

    def of(self, loop: asyncio.AbstractEventLoop) -> PerLoop:
        """Return the state that the calls of a loop share, and drop that of loops that are closed by now."""
        state = self._loops.get(loop)
        if state is None:
            # Not a weak dictionary: timers hold their loop, so the values would keep the keys alive.
            for other in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(other, None)  # another thread may do the same
            state = self._loops.setdefault(loop, PerLoop(loop))
        return state


_by_layer: WeakKeyDictionary[PersistenceLayer, PerLayer] = WeakKeyDictionary()


def shared_by(layer: PersistenceLayer) -> PerLayer:
    """Return the state that the calls of a layer share."""
    return _by_layer.setdefault(layer, PerLayer())


class LocalCache:
    """An LRU of completed records by key, for `use_local_cache`; functions, loops and threads share it.

    It keeps records, which hold text: every caller decodes an object of its own. A claim is never kept, since nothing
    would tell that it changed.
    """

    __slots__ = ("_guard", "_records")

    def __init__(self) -> None:
        self._records: OrderedDict[str, DataRecord] = OrderedDict()
        self._guard = ForkSafeLock()

    def get(self, key: str, *, now: float) -> DataRecord | None:
        """Return the record of a key unless it has expired."""
        with self._guard.lock:
            record = self._records.get(key)
            if record is None:
                return None
            if lifecycle.is_expired(record, now=now):
                del self._records[key]
                return None
            self._records.move_to_end(key)
            return record

    def put(self, record: DataRecord, *, max_items: int) -> None:
        """Keep a completed record, and drop the least recently used ones beyond `max_items`."""
        if record.status is not COMPLETED:
            return
        with self._guard.lock:
            self._records[record.idempotency_key] = record
            self._records.move_to_end(record.idempotency_key)
            while len(self._records) > max_items:
                self._records.popitem(last=False)


class SingleFlight:
    """One caller with one key: at the store, or in line behind the caller that is.

    Attributes:
        payload_hash: Hash of the validated part of its payload.
        record: The live record as far as it is known: the claim of the caller, or what blocks it.
        blocks_until: When that record stops blocking others, in seconds of the loop's clock; None: unknown, or never.
        polls: How often in a row the store was asked without success, over successive callers.
        line: The callers that wait behind this one, or beside it; None: none so far.
    """

    __slots__ = (
        "_flights",
        "_is_claim",
        "_is_over",
        "_key",
        "_lapse",
        "blocks_until",
        "line",
        "payload_hash",
        "polls",
        "record",
    )

    def __init__(self, flights: dict[str, SingleFlight], key: CallKey) -> None:
        self._flights = flights
        self._key = key.text
        self._is_claim = False
        self._is_over = False
        self._lapse: asyncio.TimerHandle | None = None
        self.payload_hash = key.payload_hash
        self.record: DataRecord | None = None
        self.blocks_until: float | None = None
        self.polls = 0
        self.line: _Line | None = None

    @property
    def leader(self) -> SingleFlight | None:
        """The flight of this key that the others stand in line behind."""
        return self._flights.get(self._key)

    async def wait_behind(self, leader: SingleFlight, *, timeout_seconds: float) -> Ending:
        """Stand in line until there is a record or an error for us.

        Returns:
            The outcome, a live record of another payload, or a claim in doubt; the error of the store or of the check;
            or None: it is our turn to lead, or the time is over.
        """
        if leader.line is None:
            leader.line = _Line()
        self.line = leader.line
        turn = self.line.join(self)
        leader.watch_lapse()
        # asyncio.wait leaves the future alone when it times out or is cancelled; `end` then leaves the line.
        await asyncio.wait([turn], timeout=timeout_seconds)
        return turn.result() if turn.done() else None

    def differing_record(self, payload_hash: str, *, now: float) -> DataRecord | None:
        """Return its record if that is of another payload, and blocks the key now (in seconds of the loop's clock)."""
        record = self.record
        has_lapsed = self.blocks_until is not None and now >= self.blocks_until  # then the store decides
        return None if record is None or has_lapsed or not lifecycle.differs(record, payload_hash) else record

    def publish(self, record: DataRecord, *, blocks_until: float | None, is_claim: bool = False) -> None:
        """Publish the record that is stored now; callers in line that have another payload get it, and leave.

        Args:
            record: The record.
            blocks_until: When it stops blocking others, in seconds of the loop's clock; None: unknown, or never.
            is_claim: Whether it is the claim of this caller: when it has lapsed, the first in line leads.
        """
        self.record = record
        self.blocks_until = blocks_until
        self._is_claim = is_claim
        if self.line is not None and self.leader is self:
            for flight in self.line.differing(record):
                self.line.wake(flight, record)
            self._stop_watching()
            self.watch_lapse()

    def watch_lapse(self) -> None:
        """Let the first in line lead when the claim of this caller has lapsed."""
        if self._is_claim and self.blocks_until is not None and self._lapse is None:
            # In an empty context: the timer must not keep alive what one of the callers has in its own.
            loop = asyncio.get_running_loop()
            self._lapse = loop.call_at(self.blocks_until, self.end, None, context=Context())

    def end(self, ending: Ending) -> None:
        """Leave the line, or end it: all callers in line get the ending, or with None the first of them leads.

        Only the first end counts. A caller that is cancelled just when its turn has come passes the turn on by this.
        """
        if self._is_over:
            return
        self._is_over = True
        if self._lapse is not None:
            self._stop_watching()
        if self.line is not None:
            self.line.leave(self)
        if self._flights.get(self._key) is not self:
            return
        del self._flights[self._key]
        if self.line is not None:
            self._hand_over(self.line, ending)

    def _hand_over(self, line: _Line, ending: Ending) -> None:
        if ending is None:
            successor = line.first()
            if successor is not None:
                successor.polls = self.polls
                self._flights[self._key] = successor
                line.wake(successor, None)
        else:
            for flight in line.everybody():
                line.wake(flight, ending)

    def _stop_watching(self) -> None:
        if self._lapse is not None:
            self._lapse.cancel()
            self._lapse = None


class _Line:
    """The callers that wait, in order and by payload: those of one payload are found without a look at the others."""

    __slots__ = ("_by_hash", "_in_order")

    def __init__(self) -> None:
        self._in_order: OrderedDict[SingleFlight, asyncio.Future[Ending]] = OrderedDict()  # finds its first at once
        self._by_hash: dict[str, dict[SingleFlight, None]] = {}

    def join(self, flight: SingleFlight) -> asyncio.Future[Ending]:
        """Add a caller at the end; return a future that is done, with the ending, when it leaves."""
        turn = self._in_order[flight] = asyncio.get_running_loop().create_future()
        self._by_hash.setdefault(flight.payload_hash, {})[flight] = None
        return turn

    def wake(self, flight: SingleFlight, ending: Ending) -> None:
        """Let a caller leave with an ending."""
        turn = self._in_order[flight]
        self.leave(flight)
        if not turn.get_loop().is_closed():
            turn.set_result(ending)

    def leave(self, flight: SingleFlight) -> None:
        """Remove a caller, if it is in line."""
        if flight in self._in_order:
            del self._in_order[flight]
            with_same = self._by_hash[flight.payload_hash]
            del with_same[flight]
            if not with_same:
                del self._by_hash[flight.payload_hash]

    def first(self) -> SingleFlight | None:
        """Return the caller that has waited longest."""
        return next(iter(self._in_order), None)

    def everybody(self) -> list[SingleFlight]:
        """Return all of them, in order."""
        return list(self._in_order)

    def differing(self, record: DataRecord) -> list[SingleFlight]:
        """Return the callers whose payload differs from that of the record."""
        different = [
            flights for payload_hash, flights in self._by_hash.items() if lifecycle.differs(record, payload_hash)
        ]
        return [flight for flights in different for flight in flights]
