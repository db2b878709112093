"""Calls that a body completes in a transaction of its own, or among the writes of its own request."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from aidem import IdempotencyConfig, RecordStatus, current_execution, idempotency, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem._runtime.cancellation import Immediate
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyHeldByTransactionError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencySerializationError,
    IdempotencyUsageError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import claim_of
from tests.support.planned import VIRTUAL_TIME, Listener, wall_clock
from tests.support.records import put
from tests.support.transactional import ItemLayer, MemoryTransaction, TransactionalLayer

RECEIPT = {"number": 1}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


@pytest.fixture
def layer() -> TransactionalLayer:
    return TransactionalLayer(clock=wall_clock)


@pytest.fixture
def listener() -> Listener:
    return Listener()


Body = Callable[[MemoryTransaction], Awaitable[Any]]


def paying(layer: TransactionalLayer, body: Body, **options: Any) -> Callable[[], Awaitable[Any]]:
    """Return a decorated function that runs the body with a transaction of its own, in which a row is written."""

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(**options), key_prefix="pay")
    async def pay(order: str) -> dict[str, int]:
        transaction = layer.begin()
        transaction.rows.append("payment")
        result: Any = await body(transaction)
        return result

    return lambda: pay("o-1")


async def complete(transaction: MemoryTransaction) -> Any:
    return await current_execution().complete(RECEIPT, transaction=transaction)


async def commit(transaction: MemoryTransaction) -> Any:
    receipt = await complete(transaction)
    await transaction.commit()
    return receipt


async def never(transaction: MemoryTransaction) -> Any:
    raise AssertionError("this call is a replay")


# --- Committed ------------------------------------------------------------------------------------------------------


async def test_rows_and_outcome_are_committed_together(layer: TransactionalLayer, listener: Listener) -> None:
    assert await paying(layer, commit, hooks=(listener,))() == RECEIPT
    assert await paying(layer, never, hooks=(listener,))() == RECEIPT
    assert layer.rows == ["payment"]
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED]


async def test_the_result_is_what_complete_answered_whatever_the_function_returns(layer: TransactionalLayer) -> None:
    async def return_another(transaction: MemoryTransaction) -> Any:
        receipt = await commit(transaction)
        receipt["number"] = 2
        return "another"

    assert await paying(layer, return_another)() == RECEIPT
    assert await paying(layer, never)() == RECEIPT


async def test_a_block_is_completed_in_a_transaction(layer: TransactionalLayer) -> None:
    for is_replay in (False, True):
        async with idempotency("o-1", persistence_store=layer) as execution:
            assert execution.replayed == is_replay
            if not execution.replayed:
                transaction = layer.begin()
                receipt = await execution.complete(RECEIPT, transaction=transaction)
                assert execution.result == receipt == RECEIPT
                await transaction.commit()
                receipt["number"] = 2
        assert execution.result == RECEIPT


async def test_a_committed_outcome_is_in_the_local_cache(layer: TransactionalLayer) -> None:
    await paying(layer, commit, use_local_cache=True)()
    layer.get = layer.acquire = None  # type: ignore[assignment, method-assign]
    assert await paying(layer, never, use_local_cache=True)() == RECEIPT


async def test_callers_that_wait_get_the_outcome(layer: TransactionalLayer) -> None:
    async def slowly(transaction: MemoryTransaction) -> Any:
        await asyncio.sleep(1)
        return await commit(transaction)

    pay = paying(layer, slowly, wait_timeout_seconds=10)
    assert await asyncio.gather(*(pay() for _ in range(5))) == [RECEIPT] * 5
    assert layer.rows == ["payment"]


# --- Not committed --------------------------------------------------------------------------------------------------


async def test_a_transaction_that_is_still_open_when_the_body_ends_is_an_error_and_may_yet_be_committed(
    layer: TransactionalLayer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(IdempotencyUsageError, match="not committed but still open; commit it before the body ends"):
        await paying(layer, complete)()
    await asyncio.sleep(1000)  # far beyond the lease
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await paying(layer, never, wait_timeout_seconds=3)()
    await layer.transactions[0].commit()
    assert await paying(layer, never)() == RECEIPT
    assert caplog.records == []


@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_transaction_that_was_rolled_back_is_an_error_and_the_key_is_released_or_in_doubt(
    layer: TransactionalLayer, on_abandoned: str, listener: Listener
) -> None:
    async def roll_back(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        await transaction.rollback()

    with pytest.raises(IdempotencyUsageError, match="not committed but rolled back, or its savepoint was"):
        await paying(layer, roll_back, on_abandoned=on_abandoned, hooks=(listener,))()
    if on_abandoned == "raise":
        assert listener.kinds == [EventKind.CLAIMED, EventKind.IN_DOUBT]
        with pytest.raises(IdempotencyInDoubtError):
            await paying(layer, never, on_abandoned=on_abandoned)()
    else:
        assert listener.kinds == [EventKind.CLAIMED, EventKind.RELEASED]
        assert await paying(layer, commit)() == RECEIPT
        assert layer.rows == ["payment"]


async def test_a_held_claim_in_doubt_counts_as_running(layer: TransactionalLayer) -> None:
    with pytest.raises(IdempotencyUsageError, match="still open"):
        await paying(layer, complete, on_abandoned="raise", lease_seconds=5)()
    await asyncio.sleep(10)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await paying(layer, never, on_abandoned="raise")()
    await layer.transactions[0].rollback()
    with pytest.raises(IdempotencyInDoubtError):
        await paying(layer, never, on_abandoned="raise")()


async def test_an_unknown_commit_is_told_where_the_layer_fails(layer: TransactionalLayer) -> None:
    async def commit_and_lose_the_store(transaction: MemoryTransaction) -> Any:
        await commit(transaction)
        layer.get = _unreachable  # type: ignore[method-assign]

    message = "whether the transaction that completes the call was committed is not known"
    with pytest.raises(IdempotencyPersistenceConnectionError, match=message):
        await paying(layer, commit_and_lose_the_store)()


def _unreachable(*_: object, **__: object) -> Any:
    raise IdempotencyPersistenceConnectionError("unreachable")


# --- Lost -----------------------------------------------------------------------------------------------------------


async def take_over(layer: TransactionalLayer, **options: Any) -> None:
    """Let the key go to another caller, as if its owner had been away for longer than its lease."""
    (record,) = layer.records().values()
    theirs = claim_of(record.idempotency_key, now=wall_clock(), owner="theirs", **options)
    put(layer, theirs.replace(payload_hash=record.payload_hash))


async def test_a_lost_lease_is_raised_inside_the_transaction_so_that_it_rolls_back(
    layer: TransactionalLayer, listener: Listener
) -> None:
    async def lose(transaction: MemoryTransaction) -> Any:
        await take_over(layer)
        try:
            return await commit(transaction)
        except IdempotencyLeaseLostError:
            await transaction.rollback()
            raise

    with pytest.raises(IdempotencyLeaseLostError, match=r"another call took it over.*roll the transaction back"):
        await paying(layer, lose, hooks=(listener,))()
    assert layer.rows == []
    assert listener.kinds == [EventKind.CLAIMED, EventKind.LEASE_LOST, EventKind.ABANDONED]
    assert [record.owner for record in layer.records().values()] == ["theirs"]


async def test_a_lost_lease_that_the_body_swallows_is_raised_after_it(layer: TransactionalLayer) -> None:
    async def swallow(transaction: MemoryTransaction) -> Any:
        await take_over(layer)
        for _ in range(2):
            with pytest.raises(IdempotencyLeaseLostError):
                await complete(transaction)

    with pytest.raises(IdempotencyLeaseLostError):
        await paying(layer, swallow)()


async def test_a_claim_that_is_gone_when_the_body_ends_is_lost(layer: TransactionalLayer) -> None:
    async def lose(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        await transaction.rollback()
        await take_over(layer)

    with pytest.raises(IdempotencyLeaseLostError):
        await paying(layer, lose)()


async def test_a_transaction_on_another_database_is_refused_with_both_reasons(layer: TransactionalLayer) -> None:
    async def complete_elsewhere(transaction: MemoryTransaction) -> Any:
        layer.complete_in = lambda *_, **__: Immediate(False)  # type: ignore[method-assign]
        return await complete(transaction)

    with pytest.raises(IdempotencyUsageError, match=r"on another database than .* or it was begun before the claim"):
        await paying(layer, complete_elsewhere)()
    del layer.complete_in
    assert await paying(layer, commit)() == RECEIPT


async def test_a_record_that_another_transaction_holds_is_told_from_one_on_another_database(
    layer: TransactionalLayer,
) -> None:
    async def complete_beside(transaction: MemoryTransaction) -> Any:
        other = layer.begin()
        record = current_execution().record
        assert record is not None
        await layer.complete_in(other, record, now=layer.clock())
        with pytest.raises(
            IdempotencyUsageError, match=r"another transaction holds the record .*; nothing was written"
        ):
            await complete(transaction)
        await other.rollback()
        return await commit(transaction)

    assert await paying(layer, complete_beside)() == RECEIPT
    assert layer.rows == ["payment"]


async def test_the_claim_is_not_asked_for_after_complete(layer: TransactionalLayer) -> None:
    async def ask_late(transaction: MemoryTransaction) -> Any:
        receipt = await complete(transaction)
        with pytest.raises(IdempotencyUsageError, match=r"in the body .*, before complete\(\)"):
            await current_execution().ensure_owned()
        await transaction.commit()
        return receipt

    assert await paying(layer, ask_late)() == RECEIPT


@pytest.mark.parametrize("is_foreign", [True, False], ids=["another database", "too large"])
async def test_a_lease_that_is_lost_after_a_refused_completion_is_reported(
    layer: TransactionalLayer, listener: Listener, is_foreign: bool
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        if is_foreign:
            return Immediate(False)
        raise IdempotencySerializationError("too large")

    async def go_on(transaction: MemoryTransaction) -> Any:
        layer.complete_in = refuse  # type: ignore[method-assign]
        with pytest.raises((IdempotencyUsageError, IdempotencySerializationError)):
            await complete(transaction)
        await take_over(layer)
        await asyncio.sleep(11)  # a renewal comes
        assert listener.kinds == [EventKind.CLAIMED, EventKind.LEASE_LOST]
        raise DeclinedError

    with pytest.raises(DeclinedError):
        await paying(layer, go_on, hooks=(listener,), lease_seconds=30)()


# --- Exceptions and cancellation ------------------------------------------------------------------------------------


class DeclinedError(Exception):
    """What a bank says."""


@pytest.mark.parametrize("options", [{}, {"stored_exceptions": (DeclinedError,)}], ids=["usual", "stored"])
async def test_an_exception_before_the_commit_releases_the_key(
    layer: TransactionalLayer, options: dict[str, Any]
) -> None:
    async def fail(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        await transaction.rollback()
        raise DeclinedError

    with pytest.raises(DeclinedError):
        await paying(layer, fail, **options)()
    assert await paying(layer, commit, **options)() == RECEIPT


@pytest.mark.parametrize("error", [DeclinedError, asyncio.CancelledError, KeyboardInterrupt])
@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_an_exception_after_the_commit_propagates_and_leaves_the_outcome(
    layer: TransactionalLayer, listener: Listener, error: type[BaseException], on_abandoned: str
) -> None:
    async def fail(transaction: MemoryTransaction) -> Any:
        await commit(transaction)
        raise error

    options: dict[str, Any] = {"on_abandoned": on_abandoned, "stored_exceptions": (DeclinedError,)}
    with pytest.raises(error):
        await paying(layer, fail, hooks=(listener,), **options)()
    assert await paying(layer, never, **options)() == RECEIPT
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED]


async def test_a_generator_that_is_closed_after_the_commit_keeps_the_outcome_and_its_claim_is_abandoned(
    layer: TransactionalLayer, listener: Listener
) -> None:
    async def steps() -> AsyncGenerator[None]:
        config = IdempotencyConfig(hooks=(listener,))
        async with idempotency("o-1", persistence_store=layer, config=config) as execution:
            transaction = layer.begin()
            await execution.complete(RECEIPT, transaction=transaction)
            await transaction.commit()
            yield

    generator = steps()
    await anext(generator)
    await generator.aclose()
    await asyncio.sleep(1)
    assert listener.kinds == [EventKind.CLAIMED, EventKind.ABANDONED]
    assert [record.status for record in layer._records.values()] == [RecordStatus.COMPLETED]


@pytest.mark.parametrize("error", [DeclinedError, asyncio.CancelledError])
async def test_an_exception_while_the_transaction_is_open_leaves_the_claim_to_it(
    layer: TransactionalLayer, listener: Listener, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        raise error

    with pytest.raises(error) as raised:
        await paying(layer, fail, hooks=(listener,))()
    assert getattr(raised.value, "__notes__", []) == []
    await layer.transactions[0].commit()
    assert await paying(layer, never)() == RECEIPT
    assert listener.kinds == [EventKind.CLAIMED, EventKind.ABANDONED]
    assert caplog.records == []


async def test_an_exception_whose_look_fails_carries_a_note(layer: TransactionalLayer) -> None:
    async def fail(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        layer.get = _unreachable  # type: ignore[method-assign]
        raise DeclinedError

    with pytest.raises(DeclinedError) as raised:
        await paying(layer, fail)()
    [note] = raised.value.__notes__
    assert "was committed is not known" in note


@pytest.mark.parametrize(("ending", "records", "rows"), [("rollback", 0, 0), ("commit", 1, 1), ("", 1, 0)])
async def test_a_body_that_is_closed_releases_the_key_unless_it_has_committed_or_may_yet_do_so(
    layer: TransactionalLayer, ending: str, records: int, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        if ending:
            await getattr(transaction, ending)()
        await asyncio.get_running_loop().create_future()

    coroutine: Any = paying(layer, hang)()
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(1)
    assert (len(layer.records()), len(layer.rows)) == (records, rows)
    assert caplog.records == []


async def test_a_release_of_what_a_transaction_holds_is_asked_for_once(layer: TransactionalLayer) -> None:
    asked = list[str]()

    class Held(TransactionalLayer):
        def refuse_held(self, record: DataRecord) -> None:
            asked.append(record.idempotency_key)
            super().refuse_held(record)

    async def hang(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        asked.clear()  # by the completion
        await asyncio.get_running_loop().create_future()

    coroutine: Any = paying(Held(clock=wall_clock), hang, lease_seconds=None)()
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(30)
    assert len(asked) == 1


async def test_a_commit_between_two_looks_is_seen(layer: TransactionalLayer) -> None:
    class CommittedMeanwhile(TransactionalLayer):
        async def is_free(self, record: DataRecord) -> bool:  # type: ignore[override]
            await self.transactions[0].commit()
            return await super().is_free(record)

    layer = CommittedMeanwhile(clock=wall_clock)
    assert await paying(layer, complete)() == RECEIPT
    assert layer.rows == ["payment"]


async def test_a_cancellation_at_any_await_leaves_rows_and_outcome_together(layer: TransactionalLayer) -> None:
    """Every operation of the layer and every step of the body waits for one turn of the loop."""

    class Slow(TransactionalLayer):
        async def get(self, key: str) -> DataRecord | None:  # type: ignore[override]
            await asyncio.sleep(0)
            return await super().get(key)

        async def is_free(self, record: DataRecord) -> bool:  # type: ignore[override]
            await asyncio.sleep(0)
            return await super().is_free(record)

        async def complete_in(self, transaction: Any, record: DataRecord, *, now: float) -> bool:  # type: ignore[override]
            await asyncio.sleep(0)
            is_ours = await super().complete_in(transaction, record, now=now)
            await asyncio.sleep(0)
            return is_ours

    async def body(transaction: MemoryTransaction) -> Any:
        try:
            receipt = await complete(transaction)
            await asyncio.sleep(0)
            await transaction.commit()
            await asyncio.sleep(0)
        except BaseException:
            await transaction.rollback()
            raise
        return receipt

    committed = set()
    for turns in range(40):
        slow = Slow(clock=wall_clock)
        task = asyncio.ensure_future(paying(slow, body)())
        for _ in range(turns):
            await asyncio.sleep(0)
        is_cancelled = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == is_cancelled
        outcomes = [record for record in slow.records().values() if record.response_data is not None]
        assert len(slow.rows) == len(outcomes) == len(slow.records())
        committed.add((is_cancelled, len(slow.rows)))
    assert committed == {(True, 0), (True, 1), (False, 1)}


# --- Again ----------------------------------------------------------------------------------------------------------


async def test_a_transaction_may_be_tried_again_after_it_was_rolled_back(layer: TransactionalLayer) -> None:
    async def try_twice(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        await transaction.rollback()
        again = layer.begin()
        again.rows.append("payment")
        await current_execution().complete({"number": 2}, transaction=again)
        await again.commit()

    assert await paying(layer, try_twice)() == {"number": 2}
    assert layer.rows == ["payment"]


@pytest.mark.parametrize("commits", [True, False])
async def test_a_second_completion_is_refused_unless_the_first_was_rolled_back(
    layer: TransactionalLayer, commits: bool
) -> None:
    message = "completed before, and that was committed" if commits else "in a transaction that is still open"

    async def complete_twice(transaction: MemoryTransaction) -> Any:
        await (commit(transaction) if commits else complete(transaction))
        with pytest.raises(IdempotencyUsageError, match=message):
            await complete(layer.begin())
        await transaction.commit()

    assert await paying(layer, complete_twice)() == RECEIPT
    assert layer.rows == ["payment"]


async def test_a_driver_error_may_be_followed_by_another_try(layer: TransactionalLayer) -> None:
    async def fail_once(transaction: MemoryTransaction) -> Any:
        working = layer.complete_in
        layer.complete_in = _serialization_failure  # type: ignore[assignment, method-assign]
        with pytest.raises(OSError, match="40001"):
            await complete(transaction)
        layer.complete_in = working  # type: ignore[method-assign]
        await transaction.rollback()
        return await commit(layer.begin())

    assert await paying(layer, fail_once)() == RECEIPT


async def _serialization_failure(*_: object, **__: object) -> Any:
    raise OSError("40001")


# --- Renewal --------------------------------------------------------------------------------------------------------


async def test_a_claim_that_a_transaction_holds_is_not_lost_and_is_renewed_after_a_rollback(
    layer: TransactionalLayer, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    seen = list[DataRecord]()

    async def hold(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        await asyncio.sleep(100)
        seen.extend(layer.records().values())
        await transaction.rollback()
        await asyncio.sleep(100)
        seen.extend(layer.records().values())
        return await commit(layer.begin())

    assert await paying(layer, hold, lease_seconds=30, hooks=(listener,))() == RECEIPT
    held, renewed = [(record.in_progress_expiry_timestamp or 0) / 1000 - wall_clock() for record in seen]
    assert held < -100
    assert renewed > 0
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED]
    assert caplog.records == []


async def test_a_renewal_under_way_is_waited_for_and_meets_no_transaction(layer: TransactionalLayer) -> None:
    order = list[str]()

    class Slow(TransactionalLayer):
        async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:  # type: ignore[override]
            order.append("renewal begins")
            await asyncio.sleep(0.5)
            order.append("renewal ends")
            return await super().renew(record, now=now)

        def complete_in(self, transaction: Any, record: DataRecord, *, now: float) -> Immediate[bool]:
            order.append("completion")
            return super().complete_in(transaction, record, now=now)

    async def during_a_renewal(transaction: MemoryTransaction) -> Any:
        await asyncio.sleep(10.1)
        return await commit(transaction)

    await paying(Slow(clock=wall_clock), during_a_renewal, lease_seconds=30)()
    assert order == ["renewal begins", "renewal ends", "completion"]


async def test_a_claim_is_renewed_on_when_its_completion_was_cancelled_before_it_was_written() -> None:
    class Slow(TransactionalLayer):
        async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:  # type: ignore[override]
            await asyncio.sleep(0.5)
            return await super().renew(record, now=now)

    layer = Slow(clock=wall_clock)

    async def give_up_and_go_on(transaction: MemoryTransaction) -> Any:
        await asyncio.sleep(10.1)  # a renewal is under way, and the completion waits for it
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await complete(transaction)
        await asyncio.sleep(100)
        claim = claim_of(current_execution().key, now=wall_clock(), owner="theirs")
        assert isinstance(await layer.acquire(claim, now=wall_clock()), Blocked)
        return await commit(transaction)

    assert await paying(layer, give_up_and_go_on, lease_seconds=30)() == RECEIPT
    assert layer.rows == ["payment"]


async def test_a_lease_without_end_needs_no_renewal(layer: TransactionalLayer) -> None:
    assert await paying(layer, commit, lease_seconds=None)() == RECEIPT


async def test_a_held_record_is_not_renewed_by_hand(layer: TransactionalLayer) -> None:
    async def ask(transaction: MemoryTransaction) -> Any:
        await complete(transaction)
        with pytest.raises(IdempotencyUsageError, match="ensure_owned"):
            await current_execution().ensure_owned()
        await transaction.commit()

    await paying(layer, ask)()


# --- A completion in a task of its own, which the body has left behind -----------------------------------------------


def leave_behind(left: list[asyncio.Task[Any]], *, after_seconds: float = 0.0) -> Body:
    """Return a body that starts to complete its call, goes on, and raises half a second later."""

    async def body(transaction: MemoryTransaction) -> Any:
        await asyncio.sleep(after_seconds)
        executions.append(current_execution())
        left.append(asyncio.create_task(complete(transaction)))
        await asyncio.sleep(0.5)
        raise DeclinedError

    executions = list[Any]()  # which keep the call alive, as a variable of the caller's does
    return body


async def test_a_claim_is_not_renewed_once_its_body_has_left_a_completion_behind() -> None:
    class Slow(TransactionalLayer):
        async def complete_in(self, transaction: Any, record: DataRecord, *, now: float) -> bool:  # type: ignore[override]
            is_ours = await super().complete_in(transaction, record, now=now)
            await asyncio.sleep(2)
            return is_ours

    layer, left = Slow(clock=wall_clock), list[asyncio.Task[Any]]()
    pay = paying(layer, leave_behind(left), lease_seconds=30)
    with pytest.raises(DeclinedError):
        await pay()
    assert len(layer.records()) == 1  # the transaction is open, so the claim is left to its lease
    await left[0]
    await layer.transactions[0].rollback()
    await asyncio.sleep(30)
    assert await paying(layer, commit, lease_seconds=30)() == RECEIPT


async def test_a_completion_that_the_body_has_left_behind_before_it_was_written_writes_nothing() -> None:
    class Slow(TransactionalLayer):
        async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:  # type: ignore[override]
            await asyncio.sleep(1.5)
            return await super().renew(record, now=now)

    layer, left = Slow(clock=wall_clock), list[asyncio.Task[Any]]()
    with pytest.raises(DeclinedError):
        await paying(layer, leave_behind(left, after_seconds=10.1), lease_seconds=30)()  # a renewal is under way
    with pytest.raises(IdempotencyUsageError, match="for the body of a call that runs"):
        await left[0]
    assert layer.records() == layer.transactions[0].outcomes == {}


async def test_a_completion_that_is_refused_when_its_body_has_ended_does_not_begin_the_call_again() -> None:
    class Slow(TransactionalLayer):
        async def complete_in(self, transaction: Any, record: DataRecord, *, now: float) -> bool:  # type: ignore[override]
            await asyncio.sleep(2)
            raise IdempotencyHeldByTransactionError("another transaction holds the record")

    async def again(transaction: MemoryTransaction) -> Any:
        for message in ("another transaction holds the record", "for the body of a call that runs"):
            with pytest.raises(IdempotencyUsageError, match=message):
                await complete(transaction)

    async def body(transaction: MemoryTransaction) -> Any:
        left.append(asyncio.create_task(again(transaction)))
        executions.append(current_execution())
        await asyncio.sleep(1)
        raise DeclinedError

    left, executions = list[asyncio.Task[Any]](), list[Any]()
    with pytest.raises(DeclinedError):
        await paying(Slow(clock=wall_clock), body)()
    await left[0]


# --- Refused before anything is written -----------------------------------------------------------------------------


async def test_a_layer_that_cannot_is_told_with_those_that_can() -> None:
    @idempotent_function(persistence_store=MemoryPersistenceLayer())
    async def pay(order: str) -> None:
        for complete, can in (
            (
                current_execution().complete(RECEIPT, transaction=object()),
                "PostgresPersistenceLayer, or SQLitePersistenceLayer with in_application_database=True, can",
            ),
            (current_execution().completion_item(RECEIPT), "DynamoDBPersistenceLayer can"),
        ):
            with pytest.raises(IdempotencyUsageError, match=rf"MemoryPersistenceLayer cannot complete.*{can}"):
                await complete

    await pay("o-1")
    await pay("o-1")


@pytest.mark.parametrize("transaction", [None, "transaction"])
async def test_what_is_no_transaction_is_refused_and_the_call_goes_on(
    layer: TransactionalLayer, transaction: Any
) -> None:
    async def use_another(_: MemoryTransaction) -> Any:
        with pytest.raises(IdempotencyUsageError, match="pass an open transaction"):
            await complete(transaction)
        return {"number": 3}

    assert await paying(layer, use_another)() == {"number": 3}
    assert await paying(layer, never)() == {"number": 3}


async def test_a_result_that_cannot_be_stored_is_raised_before_the_commit(layer: TransactionalLayer) -> None:
    async def complete_with_an_object(transaction: MemoryTransaction) -> Any:
        return await current_execution().complete(object(), transaction=transaction)

    with pytest.raises(IdempotencySerializationError):
        await paying(layer, complete_with_an_object)()
    assert layer.records() == {}


async def test_an_outcome_that_the_layer_refuses_is_raised_and_the_key_released(layer: TransactionalLayer) -> None:
    def too_large(*_: object, **__: object) -> Any:
        raise IdempotencySerializationError("too large")

    layer.complete_in = too_large  # type: ignore[method-assign]
    with pytest.raises(IdempotencySerializationError, match="too large"):
        await paying(layer, complete)()
    assert layer.records() == {}


async def test_a_block_has_one_result(layer: TransactionalLayer) -> None:
    async def receipt() -> dict[str, int]:
        return RECEIPT

    async with idempotency("run", persistence_store=layer) as execution:
        await execution.run(receipt)
        with pytest.raises(IdempotencyUsageError, match=r"complete\(\) was called beside run\(\)"):
            await execution.complete(RECEIPT, transaction=layer.begin())
    async with idempotency("result", persistence_store=layer) as execution:
        execution.result = RECEIPT
        with pytest.raises(IdempotencyUsageError, match=r"completion_item\(\) was called beside `execution.result"):
            await execution.completion_item(RECEIPT)
    async with idempotency("complete", persistence_store=layer) as execution:
        transaction = layer.begin()
        await execution.complete(RECEIPT, transaction=transaction)
        with pytest.raises(IdempotencyUsageError, match=r"run\(\) was used beside complete\(\)"):
            await execution.run(receipt)
        with pytest.raises(IdempotencyUsageError, match=r"result was used beside complete\(\)"):
            execution.result = RECEIPT
        await transaction.commit()
    with pytest.raises(IdempotencyUsageError, match="for the body of a call that runs and is no replay"):
        await execution.complete(RECEIPT, transaction=layer.begin())
    async with idempotency("complete", persistence_store=layer) as execution:
        with pytest.raises(IdempotencyUsageError, match=r"no replay; look at execution.replayed first"):
            await execution.complete(RECEIPT, transaction=layer.begin())
        with pytest.raises(IdempotencyUsageError, match=r"no replay; look at execution.replayed first"):
            await execution.completion_item(RECEIPT)
    assert layer.transactions[-1].outcomes == {}


async def test_a_bypassed_call_writes_nothing_and_answers_the_value_after_its_round_trip(
    layer: TransactionalLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "true")
    answered = list[Any]()

    async def complete_with_a_tuple(transaction: MemoryTransaction) -> Any:
        answered.append(await current_execution().complete((1, 2), transaction=transaction))
        answered.append(await current_execution().completion_item((1, 2)))
        assert transaction.outcomes == {}
        return "another"

    with pytest.warns(IdempotencyWarning, match="runs without idempotency"):
        result = await paying(layer, complete_with_a_tuple)()
    assert answered == [result, None]
    with pytest.warns(IdempotencyWarning, match="runs without idempotency"):
        async with idempotency("o-1", persistence_store=layer) as execution:
            await execution.complete(RECEIPT, transaction=layer.begin())
    assert execution.result == RECEIPT
    assert layer.records() == {}


async def test_a_fork_of_the_owner_completes_nothing(layer: TransactionalLayer) -> None:
    async def complete_in_child(transaction: MemoryTransaction) -> Any:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - the child needs nothing of this loop
            return {"status": status}
        try:
            await complete(transaction)
        except IdempotencyLeaseLostError:
            os._exit(7)
        os._exit(0)

    assert await paying(layer, complete_in_child)() == {"status": 7 << 8}


async def test_a_usage_error_of_the_layer_reaches_the_caller_as_it_is(layer: TransactionalLayer) -> None:
    releases = list[DataRecord]()

    class InsideTransaction(TransactionalLayer):
        def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
            raise IdempotencyUsageError("commit it first")

        def release(self, record: DataRecord) -> Immediate[bool]:
            releases.append(record)
            return super().release(record)

    with pytest.raises(IdempotencyUsageError, match=r"^commit it first$"):
        await paying(InsideTransaction(clock=wall_clock), never)()
    assert releases == []


# --- Items ----------------------------------------------------------------------------------------------------------


class ItemsOf(ItemLayer):
    """Counts the rows of the requests that were applied."""

    rows = 0

    async def write(self, item: dict[str, Any]) -> bool:
        is_applied = await self.send(item)
        self.rows += is_applied
        return is_applied


@pytest.fixture
def items() -> ItemsOf:
    return ItemsOf(clock=wall_clock)


def sending(layer: ItemsOf, body: Callable[[], Awaitable[Any]], **options: Any) -> Callable[[], Awaitable[Any]]:
    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(**options), key_prefix="pay")
    async def pay(order: str) -> Any:
        return await body()

    return lambda: pay("o-1")


async def item_of() -> dict[str, Any]:
    item = await current_execution().completion_item(RECEIPT)
    assert item is not None
    return item


async def test_an_item_and_the_rows_of_its_request_are_written_together(items: ItemsOf, listener: Listener) -> None:
    async def send() -> None:
        assert await items.write(await item_of())

    for _ in range(2):
        assert await sending(items, send, hooks=(listener,))() == RECEIPT
    assert items.rows == 1
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED]


async def test_a_block_is_completed_by_an_item(items: ItemsOf) -> None:
    async with idempotency("o-1", persistence_store=items) as execution:
        item = await execution.completion_item(RECEIPT)
        assert item is not None
        assert execution.result == RECEIPT
        assert await items.write(item)
    assert execution.result == RECEIPT


async def test_a_request_that_was_not_sent_is_an_error_and_the_key_is_released(items: ItemsOf) -> None:
    kept = list[dict[str, Any]]()

    async def keep() -> None:
        kept.append(await item_of())

    with pytest.raises(IdempotencyUsageError, match=r"request with completion_item\(\) was not applied"):
        await sending(items, keep)()
    assert items.records() == {}
    assert not await items.write(kept[0])  # a request that arrives late finds no claim


async def test_a_request_that_is_sent_again_is_applied_once(items: ItemsOf) -> None:
    async def send_twice() -> None:
        await item_of()
        assert await items.write(await item_of())
        assert not await items.write(await item_of())

    assert await sending(items, send_twice)() == RECEIPT


async def test_an_item_is_not_met_by_a_renewal(items: ItemsOf) -> None:
    renewals = list[float]()

    class Renewing(ItemsOf):
        def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
            renewals.append(now)
            return super().renew(record, now=now)

    layer = Renewing(clock=wall_clock)

    async def wait() -> None:
        await asyncio.sleep(15)
        item = await item_of()
        await asyncio.sleep(14)
        assert await layer.write(item)

    await sending(layer, wait, lease_seconds=30)()
    assert len(renewals) == 1


async def test_an_item_of_a_result_that_is_too_large_leaves_the_call_as_it_was(items: ItemsOf) -> None:
    def too_large(*_: object, **__: object) -> Any:
        raise IdempotencySerializationError("too large")

    async def complete_otherwise() -> Any:
        items.completion_item = too_large  # type: ignore[method-assign]
        with pytest.raises(IdempotencySerializationError, match="too large"):
            await item_of()
        return {"number": 2}

    assert await sending(items, complete_otherwise)() == {"number": 2}
