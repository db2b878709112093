"""The same store behind aidem's protocol: after the move. It finds what the one before has stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aidem import DataRecord, RecordStatus
from aidem.persistence import Blocked, Claimed


class OwnPersistenceLayer:
    def __init__(self, items: dict[str, dict[str, Any]], *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.items = items
        self.last_fence = 0
        self.lock = threading.Lock()  # a store of another kind has a conditional write

    async def acquire(
        self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0
    ) -> Claimed | Blocked:
        with self.lock:
            found = await self.get(record.idempotency_key)
            if found is not None and not is_expired(found, now):
                if is_held_by(found, record):
                    return Claimed(found)
                if not is_lapsed(found, now - max_clock_skew_seconds):
                    return Blocked(found)
            self.last_fence = max(self.last_fence, int(now * 1000) - 1, 0 if found is None else found.fence) + 1
            return Claimed(self.put(record.replace(fence=self.last_fence)))

    async def complete(self, record: DataRecord, *, now: float) -> bool:
        with self.lock:
            found = await self.get(record.idempotency_key)
            if found is None or is_expired(found, now) or is_held_by(found, record):
                self.put(record)
                return True
            return (found.owner, found.response_data, found.outcome) == (
                record.owner,
                record.response_data,
                record.outcome,
            )

    async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:
        with self.lock:
            found = await self.get(record.idempotency_key)
            if found is None or not is_held_by(found, record):
                return None
            if not is_given_up(record):  # it may be in doubt by now, or a later renewal may have come first
                if is_given_up(found):
                    return None
                if held_until(record) < held_until(found):
                    return found
            instants = ("expiry_timestamp", "in_progress_expiry_timestamp", "lease_expiry_timestamp")
            return self.put(found.replace(**{name: getattr(record, name) for name in instants}))

    async def release(self, record: DataRecord) -> bool:
        with self.lock:
            is_ours = is_held_by(await self.get(record.idempotency_key), record)
            if is_ours:
                del self.items[record.idempotency_key]
            return is_ours

    async def get(self, key: str) -> DataRecord | None:
        item = self.items.get(key)
        return None if item is None else record_of(key, item)

    async def forget(self, key: str) -> None:
        self.items.pop(key, None)

    def put(self, record: DataRecord) -> DataRecord:
        self.items[record.idempotency_key] = item_of(record)
        return record

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def is_expired(found: DataRecord, now: float) -> bool:
    return found.expiry_timestamp is not None and found.expiry_timestamp < int(now)


def is_lapsed(found: DataRecord, now: float) -> bool:
    lease = found.in_progress_expiry_timestamp
    return found.status is RecordStatus.INPROGRESS and lease is not None and lease < int(now * 1000)


def is_held_by(found: DataRecord | None, record: DataRecord) -> bool:
    return (
        found is not None
        and record.owner is not None
        and found.owner == record.owner
        and found.status is RecordStatus.INPROGRESS
    )


def is_given_up(record: DataRecord) -> bool:
    return record.in_progress_expiry_timestamp is None and record.lease_expiry_timestamp == 0


def held_until(record: DataRecord) -> float:
    end = record.in_progress_expiry_timestamp or record.lease_expiry_timestamp
    return end or ((record.expiry_timestamp or 0) + 1) * 1000


NAMES = {
    "status": "status",
    "expiry_timestamp": "expiration",
    "in_progress_expiry_timestamp": "in_progress_expiration",
    "lease_expiry_timestamp": "lease_expiration",
    "response_data": "data",
    "outcome": "outcome",
    "payload_hash": "validation",
    "owner": "owner",
    "fence": "fence",
    "note": "note",
}


def item_of(record: DataRecord) -> dict[str, Any]:
    item = {stored: getattr(record, name) for name, stored in NAMES.items()}
    return {stored: value for stored, value in item.items() if value not in {None, ""}}


def record_of(key: str, item: dict[str, Any]) -> DataRecord:
    fields = {name: item[stored] for name, stored in NAMES.items() if stored in item}
    return DataRecord(idempotency_key=key, **fields | {"status": RecordStatus(item["status"])})
