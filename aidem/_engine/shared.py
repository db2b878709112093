"""What all calls on one persistence layer share: the local cache, and per event loop the flights and the renewals."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from aidem._engine.renewal import Renewals
from aidem._rules import lifecycle
from aidem._rules.record import RecordStatus
from aidem._runtime.fork import ForkSafeLock

if TYPE_CHECKING:
    import asyncio

    from aidem._engine.single_flight import SingleFlight
    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer


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
        if record.status is not RecordStatus.COMPLETED:
            return
        with self._guard.lock:
            self._records[record.idempotency_key] = record
            self._records.move_to_end(record.idempotency_key)
            while len(self._records) > max_items:
                self._records.popitem(last=False)


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
        """Return what the calls of a loop share; what belonged to loops that are closed by now is dropped."""
        state = self._loops.get(loop)
        if state is None:
            # Not a weak dictionary: timers hold their loop, so the values would keep the keys alive.
            for other in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(other, None)  # another thread may do the same
            state = self._loops.setdefault(loop, PerLoop(loop))
        return state


_by_layer: WeakKeyDictionary[PersistenceLayer, PerLayer] = WeakKeyDictionary()


def shared_by(layer: PersistenceLayer) -> PerLayer:
    """Return what the calls of a layer share."""
    return _by_layer.setdefault(layer, PerLayer())
