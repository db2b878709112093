"""A layer in memory whose records can be completed in transactions, as those of a database with row locks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem._runtime.cancellation import Immediate
from aidem._runtime.clock import wall_clock
from aidem.exceptions import IdempotencyHeldByTransactionError, IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.records import put


class MemoryTransaction:
    """Rows of the application and outcomes of calls, visible to others once it is committed."""

    def __init__(self, layer: TransactionalLayer) -> None:
        self.layer = layer
        self.is_open = True
        self.rows = list[Any]()
        self.outcomes = dict[str, DataRecord]()
        self.transaction = self  # the suite and its users pass the same

    async def commit(self) -> None:
        if self.is_open:
            self.layer.rows += self.rows
            self.layer.apply(self.outcomes)
        await self.rollback()

    async def rollback(self) -> None:
        self.is_open = False


class TransactionalLayer(MemoryPersistenceLayer):
    """Has one business table beside the records, `rows`."""

    def __init__(self, *, clock: Callable[[], float] = wall_clock) -> None:
        super().__init__(clock=clock)
        self.rows = list[Any]()
        self.transactions = list[MemoryTransaction]()

    def begin(self) -> MemoryTransaction:
        self.transactions.append(MemoryTransaction(self))
        return self.transactions[-1]

    def apply(self, outcomes: dict[str, DataRecord]) -> None:
        for outcome in outcomes.values():
            put(self, outcome)

    def is_held(self, key: str) -> bool:
        return any(key in one.outcomes for one in self.transactions if one.is_open)

    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        if not isinstance(transaction, MemoryTransaction) or not transaction.is_open:
            raise IdempotencyUsageError("pass an open transaction of layer.begin()")

    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self.records().get(record.idempotency_key)
        is_ours = lifecycle.is_held_by(found, record.owner) and not self.is_held(record.idempotency_key)
        if is_ours:
            shifted = lifecycle.shifted(record, seconds=self.clock() - now)
            transaction.outcomes[record.idempotency_key] = shifted
        return Immediate(is_ours)

    def is_free(self, record: DataRecord) -> Immediate[bool]:
        found = self.records().get(record.idempotency_key)
        return Immediate(lifecycle.is_held_by(found, record.owner) and not self.is_held(record.idempotency_key))

    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        found = self.records().get(record.idempotency_key)
        held = lifecycle.acquire_held(found) if self.is_held(record.idempotency_key) else None
        return super().acquire(record, now=now, **options) if held is None else Immediate(held)

    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        self.refuse_held(record)
        return super().renew(record, now=now)

    def release(self, record: DataRecord) -> Immediate[bool]:
        self.refuse_held(record)
        return super().release(record)

    def refuse_held(self, record: DataRecord) -> None:
        if self.is_held(record.idempotency_key):
            raise IdempotencyHeldByTransactionError("a transaction holds the record")


class ItemLayer(MemoryPersistenceLayer):
    """Takes an outcome as one of several writes in a request, as DynamoDB does."""

    def completion_item(self, record: DataRecord, *, now: float) -> dict[str, Any]:
        return {"outcome": record}

    async def send(self, item: dict[str, Any]) -> bool:
        record: DataRecord = item["outcome"]
        is_ours = lifecycle.is_held_by(self.records().get(record.idempotency_key), record.owner)
        if is_ours:
            put(self, record)
        return is_ours
