"""An LRU of completed records, one per persistence layer, for `use_local_cache`.

It keeps records, which hold text: every caller decodes an object of its own. A claim is never kept, since nothing would
tell that it changed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from aidem._rules import lifecycle
from aidem._rules.record import RecordStatus
from aidem._runtime.fork import ForkSafeLock

if TYPE_CHECKING:
    from aidem._rules.record import DataRecord


class LocalCache:
    """Completed records by key; shared by the functions, loops and threads that use one layer."""

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
