"""A layer in memory whose records can be completed in transactions, as those of a database with row locks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aidem import AbandonedExecution, Happened, IdempotencyConfig, RecordStatus, idempotency, operations
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem._runtime.cancellation import Immediate
from aidem._runtime.clock import wall_clock
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyHeldByTransactionError,
    IdempotencyUsageError,
)
from aidem.operations import OperationRefusedError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.records import put

AT_ONCE_SECONDS = 5.0
"""Within this a call that does not wait has ended, however slow the machine is."""


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
        is_ours = lifecycle.is_held_by(found, record.owner)
        if is_ours and self.is_held(record.idempotency_key):
            if record.idempotency_key not in transaction.outcomes:
                raise IdempotencyHeldByTransactionError("another transaction holds the record")
            is_ours = False  # it sees its own outcome
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


async def ask_about_a_held_claim(layer: Any, begin: Callable[[], Awaitable[Any]], *, commits: bool) -> None:
    """Let a claim lapse whose outcome waits in an open transaction: neither a check nor an operator takes it over.

    Args:
        layer: Its clock is a `FakeClock`.
        begin: Opens a transaction that has `transaction`, `commit` and `rollback`.
        commits: How it ends.
    """
    asked: list[AbandonedExecution] = []

    def find_out(abandoned: AbandonedExecution) -> Happened:
        asked.append(abandoned)
        return Happened("found")

    config = IdempotencyConfig(on_abandoned=find_out, lease_seconds=5, renew_lease=False)
    execution = None
    with pytest.raises(IdempotencyUsageError, match="still open"):
        async with idempotency("o-1", persistence_store=layer, config=config) as execution:
            opened = await begin()
            await execution.complete("committed", transaction=opened.transaction)
    assert execution is not None
    try:
        await _look_at_a_held_claim(layer, execution.key, config)
        assert not asked
    finally:  # or the layer would wait for it when it is closed
        await (opened.commit() if commits else opened.rollback())

    async with idempotency("o-1", persistence_store=layer, config=config) as execution:
        assert execution.replayed
        assert execution.result == ("committed" if commits else "found")
    assert len(asked) == (not commits)


async def _look_at_a_held_claim(layer: Any, key: str, config: IdempotencyConfig) -> None:
    layer.clock.advance(10)
    found = await layer.get(key)
    async with asyncio.timeout(AT_ONCE_SECONDS):
        with pytest.raises(IdempotencyAlreadyInProgressError):
            async with idempotency("o-1", persistence_store=layer, config=config):
                raise AssertionError("the body must not run")
    for force in (False, True):
        with pytest.raises(OperationRefusedError, match="an open transaction holds it"):
            await operations.release(layer, key, force=force)
        with pytest.raises(OperationRefusedError, match="an open transaction holds it"):
            await operations.resolve(layer, key, result="by hand", force=force)
    assert await layer.get(key) == found
    assert found.status is RecordStatus.INPROGRESS
