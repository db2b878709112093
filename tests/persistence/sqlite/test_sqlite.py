from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aidem import idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed, milliseconds
from aidem._rules.record import DataRecord
from aidem._runtime.clock import wall_clock
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
)
from aidem.persistence import PersistenceLayer
from aidem.persistence._stored import NOT_A_TEXT
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.persistence.sqlite._thread import MAX_BATCH
from aidem.testing import FakeClock, PurgeConformance, ScanConformance, TakeOverConformance, claim_of, completed_of
from aidem.testing._trial import KEPT_SECONDS, LEASE_SECONDS


class GatedClock(FakeClock):
    """Counts transactions, as each asks once, and can hold one up in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions = 0
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def __call__(self) -> float:
        if threading.current_thread().name.startswith("aidem "):
            self.transactions += 1
            self.reached.set()
            assert self.open.wait(30)
        return super().__call__()

    def hold(self) -> None:
        self.open.clear()
        self.reached.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite3"


@pytest.fixture
def clock() -> GatedClock:
    return GatedClock()


@pytest.fixture
def layer(path: Path, clock: GatedClock) -> Iterator[SQLitePersistenceLayer]:
    layer = SQLitePersistenceLayer(path, clock=clock)
    yield layer
    clock.open.set()
    asyncio.run(layer.aclose())


async def claimed(layer: SQLitePersistenceLayer, key: str = "key", *, owner: str = "ours") -> DataRecord:
    now = layer.clock()
    answer = await layer.acquire(claim_of(key, now=now, owner=owner), now=now)
    assert isinstance(answer, Claimed)
    return answer.record


async def in_one_batch(
    clock: GatedClock, layer: SQLitePersistenceLayer, ask: Callable[[], list[Awaitable[Any]]]
) -> Any:
    """Ask for everything while a transaction is held up, and return the answers, or errors."""
    clock.hold()
    first = layer.get("other")
    assert await asyncio.to_thread(clock.reached.wait, 30)
    asked = ask()
    before = clock.transactions
    clock.open.set()
    answers = await asyncio.gather(first, *asked, return_exceptions=True)
    assert clock.transactions == before + 1
    return answers[1:]


_threads_of_others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def threads_of_others() -> None:
    """Leave out the threads of layers that earlier tests and examples have left open."""
    _threads_of_others.clear()
    _threads_of_others.update(threading.enumerate())


def threads() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("aidem ") and thread not in _threads_of_others
    ]


def names_of_threads() -> list[str]:
    return [thread.name for thread in threads()]


def files_beside(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))  # noqa: PTH208 - names


def replace_by_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("moved")))


def rows(path: Path, query: str = "SELECT id FROM records ORDER BY id") -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


class TestConformance(TakeOverConformance, ScanConformance, PurgeConformance):
    @pytest.fixture(autouse=True)
    def in_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return SQLitePersistenceLayer(self.directory / "records.sqlite3", clock=clock)


# --- Transactions ---------------------------------------------------------------------------------------------------


def test_an_sqlite_layer_is_a_persistence_layer_judged_by_the_machines_clock(path: Path) -> None:
    layer = SQLitePersistenceLayer(path)
    assert isinstance(layer, PersistenceLayer)
    assert layer.clock is wall_clock


async def test_an_answer_comes_after_its_commit(layer: SQLitePersistenceLayer, path: Path) -> None:
    await layer.open()
    with closing(sqlite3.connect(path)) as other:
        for number in range(50):
            await claimed(layer, f"key-{number}")
            assert other.execute("SELECT count(*) FROM records").fetchone() == (number + 1,)


async def test_what_is_asked_during_a_transaction_becomes_one(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    records = await in_one_batch(
        clock, layer, lambda: [layer.acquire(claim_of(f"key-{n}", now=1), now=1) for n in range(32)]
    )
    assert len({answer.record.fence for answer in records}) == len(rows(path)) == 32


async def test_an_operation_that_fails_fails_alone(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    await layer.open()
    change(
        path,
        "CREATE TRIGGER fault AFTER INSERT ON records WHEN NEW.id = 'faulty' BEGIN SELECT RAISE(ABORT, 'fault'); END",
    )
    keys = ["a", "faulty", "b", "unencodable \ud800", "c"]
    answers = await in_one_batch(clock, layer, lambda: [layer.acquire(claim_of(k, now=1), now=1) for k in keys])
    assert [type(answer) for answer in answers] == [
        Claimed,
        IdempotencyPersistenceLayerError,
        Claimed,
        UnicodeEncodeError,
        Claimed,
    ]
    assert "SQLITE_CONSTRAINT_TRIGGER" in str(answers[1])
    assert isinstance(answers[1].__cause__, sqlite3.IntegrityError)
    assert rows(path) == [("a",), ("b",), ("c",)]


async def test_a_transaction_that_sqlite_takes_back_fails_as_a_whole(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    await layer.open()
    change(
        path,
        "CREATE TRIGGER fault AFTER INSERT ON records WHEN NEW.id = 'faulty' "
        "BEGIN SELECT RAISE(ROLLBACK, 'fault'); END",
    )
    answers = await in_one_batch(
        clock, layer, lambda: [layer.acquire(claim_of(k, now=1), now=1) for k in ("a", "faulty", "b")]
    )
    assert [type(answer) for answer in answers] == [IdempotencyPersistenceLayerError] * 3
    assert len(set(answers)) == 3  # each caller may add its own notes
    assert rows(path) == []
    await claimed(layer, "a")
    assert rows(path) == [("a",)]


async def test_callers_that_are_refused_together_get_an_error_each(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    clock.hold()
    first = layer.get("key")
    assert await asyncio.to_thread(clock.reached.wait, 30)
    replace_by_link(path)
    refused = [layer.get("key"), layer.get("key")]
    clock.open.set()
    await first
    errors = await asyncio.gather(*refused, return_exceptions=True)
    assert [type(error) for error in errors] == [IdempotencyPersistenceConfigError] * 2
    assert errors[0] is not errors[1]


async def test_a_transaction_is_bounded(layer: SQLitePersistenceLayer, clock: GatedClock) -> None:
    clock.hold()
    first = layer.get("other")
    assert await asyncio.to_thread(clock.reached.wait, 30)
    asked = [layer.acquire(claim_of(f"key-{n}", now=1), now=1) for n in range(2 * MAX_BATCH + 1)]
    clock.open.set()
    await asyncio.gather(first, *asked)
    assert clock.transactions == 1 + 3


async def test_a_look_does_not_wait_for_a_writer(layer: SQLitePersistenceLayer, path: Path) -> None:
    record = await claimed(layer)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert await layer.get("key") == record


@pytest.mark.parametrize("owner", ["theirs", "ours"])
async def test_a_claim_that_changes_nothing_writes_nothing(
    layer: SQLitePersistenceLayer, path: Path, clock: GatedClock, owner: str
) -> None:
    record = await claimed(layer)
    log = path.with_name(path.name + "-wal")
    before = log.stat()
    answer = await layer.acquire(claim_of("key", now=clock(), owner=owner), now=clock())
    assert answer == (Claimed(record) if owner == "ours" else Blocked(record, clock()))
    assert (log.stat().st_size, log.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    await claimed(layer, "another")
    assert log.stat().st_mtime_ns > before.st_mtime_ns


async def test_what_was_asked_for_counts_from_when_it_is_done(layer: SQLitePersistenceLayer, clock: GatedClock) -> None:
    asked = clock()
    claim = claim_of("key", now=asked)
    clock.hold()
    operation = layer.acquire(claim, now=asked)
    assert await asyncio.to_thread(clock.reached.wait, 30)
    clock.advance(2.5)
    clock.open.set()
    answer = await operation
    assert answer.record.in_progress_expiry_timestamp == milliseconds(asked + LEASE_SECONDS + 2.5)
    renewed = await layer.renew(claim, now=asked)
    assert renewed is not None
    assert renewed.in_progress_expiry_timestamp == milliseconds(asked + LEASE_SECONDS + 2.5)
    assert await layer.complete(completed_of(answer.record, now=asked), now=asked)
    stored = await layer.get("key")
    assert stored is not None
    assert stored.expiry_timestamp == asked + KEPT_SECONDS + 3


async def test_a_clock_that_fails_fails_what_was_asked_and_no_more(path: Path) -> None:
    fails = [True]

    def clock() -> float:
        return 1 / 0 if fails.pop() else 1.0

    layer = SQLitePersistenceLayer(path, clock=clock)
    with pytest.raises(ZeroDivisionError):
        await layer.get("key")
    fails.append(False)
    assert await layer.get("key") is None
    await layer.aclose()


# --- Fences and purging ---------------------------------------------------------------------------------------------


async def test_fences_grow_over_release_a_clock_that_goes_back_and_a_restart(
    layer: SQLitePersistenceLayer, clock: GatedClock
) -> None:
    first = await claimed(layer)
    assert first.fence == int(clock() * 1000)
    assert await layer.release(first)
    second = await claimed(layer)
    assert second.fence == first.fence + 1
    await layer.forget("key")
    clock.advance(-3600)
    await layer.aclose()
    assert (await claimed(layer)).fence == second.fence + 1


async def test_a_foreign_fence_is_remembered(layer: SQLitePersistenceLayer, clock: GatedClock) -> None:
    outcome = completed_of(claim_of("key", now=clock()), now=clock()).replace(fence=10**15)
    assert await layer.complete(outcome, now=clock())
    await layer.forget("key")
    assert (await claimed(layer)).fence == 10**15 + 1


async def test_claims_remove_expired_records_a_few_at_a_time(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    await in_one_batch(
        clock, layer, lambda: [layer.acquire(claim_of(f"old-{n}", now=clock()), now=clock()) for n in range(5)]
    )
    clock.advance(3600)
    left = []
    for number in range(4):
        await claimed(layer, f"new-{number}")
        left.append(len(rows(path, "SELECT id FROM records WHERE id LIKE 'old-%'")))
    assert left == [3, 1, 0, 0]
    assert len(rows(path)) == 4


async def test_a_record_that_never_expires_is_not_purged(layer: SQLitePersistenceLayer, clock: GatedClock) -> None:
    eternal = claim_of("eternal", now=clock()).replace(expiry_timestamp=None)
    await layer.acquire(eternal, now=clock())
    clock.advance(10**9)
    await claimed(layer)
    assert await layer.get("eternal") is not None


async def test_expired_records_are_found_by_an_index(layer: SQLitePersistenceLayer, path: Path) -> None:
    await layer.open()
    plan = rows(path, "EXPLAIN QUERY PLAN SELECT rowid FROM records WHERE expiration < 1 ORDER BY expiration LIMIT 2")
    assert "USING COVERING INDEX records_by_expiration" in plan[0][3]
    assert len(plan) == 1


@pytest.mark.parametrize("column", ["status", "outcome"])
async def test_a_status_of_a_later_version_is_refused(layer: SQLitePersistenceLayer, path: Path, column: str) -> None:
    await claimed(layer)
    change(path, f"UPDATE records SET {column} = 'LATER', data = 'private'")
    with pytest.raises(IdempotencyInvalidStatusError, match=r"'key'.*'LATER'.*forget\(key\)") as raised:
        await layer.get("key")
    assert raised.value.key == "key"
    assert "private" not in str(raised.value)
    await layer.forget("key")
    assert await layer.get("key") is None


@pytest.mark.parametrize("stored", ["x'ff'", "CAST(x'22ff22' AS TEXT)"])
async def test_a_result_of_another_type_is_unavailable_and_no_second_run(path: Path, stored: str) -> None:
    runs = list[str]()
    async with SQLitePersistenceLayer(path) as layer:

        @idempotent_function(persistence_store=layer)
        async def charge(order_id: str) -> str:
            runs.append(order_id)
            return "charged"

        assert await charge("o-1") == "charged"
        change(path, f"UPDATE records SET data = {stored}")
        with pytest.raises(IdempotencyResultUnavailableError):
            await charge("o-1")
    assert runs == ["o-1"]


@pytest.mark.parametrize("column", ["validation", "owner"])
async def test_a_hash_or_an_owner_of_another_type_is_nobodys(
    layer: SQLitePersistenceLayer, path: Path, column: str
) -> None:
    record = await claimed(layer)
    change(path, f"UPDATE records SET {column} = x'ff'")
    found = await layer.get("key")
    assert found is not None
    assert found == record.replace(**{{"validation": "payload_hash"}.get(column, column): NOT_A_TEXT})


@pytest.mark.parametrize(
    "change_of",
    ["status = x'ff'", "outcome = x'ff'", "expiration = 'soon'", "in_progress_expiration = x'31'", "fence = 1.5"],
)
async def test_a_record_of_other_types_is_refused_with_what_to_do(
    layer: SQLitePersistenceLayer, path: Path, change_of: str
) -> None:
    await claimed(layer)
    change(path, f"UPDATE records SET {change_of}")
    with pytest.raises(IdempotencyInvalidStatusError, match=r"'key'.*forget\(key\)"):
        await claimed(layer, owner="theirs")
    await layer.forget("key")
    await claimed(layer)


# --- Time limits ----------------------------------------------------------------------------------------------------


async def test_operations_have_a_time_limit_after_which_outcomes_and_releases_are_still_applied_but_no_claims(
    path: Path, clock: GatedClock
) -> None:
    layer = SQLitePersistenceLayer(path, clock=clock, timeout_seconds=2)
    done, failed = await claimed(layer, "done"), await claimed(layer, "failed")
    clock.hold()
    late = "SQLite did not answer within 2 s, which timeout_seconds allows; the operation may have been applied"
    held_up = asyncio.ensure_future(claimed(layer, "held up"))
    assert await asyncio.to_thread(clock.reached.wait, 30)
    with pytest.raises(IdempotencyPersistenceConnectionError, match=late):
        await claimed(layer, "behind it")
    for operation in (held_up, layer.complete(completed_of(done, now=clock()), now=clock()), layer.release(failed)):
        with pytest.raises(IdempotencyPersistenceConnectionError, match=late):
            await operation
    clock.open.set()
    assert (await claimed(layer, "next")).owner == "ours"
    await layer.aclose()
    assert rows(path, "SELECT id, status FROM records ORDER BY id") == [("done", "COMPLETED"), ("next", "INPROGRESS")]


async def test_an_answer_in_time_is_not_taken_back(path: Path) -> None:
    async with SQLitePersistenceLayer(path, clock=FakeClock(), timeout_seconds=2) as layer:
        for number in range(3):
            await claimed(layer, f"key {number}")
            await asyncio.sleep(0.8)  # beyond the limit of the first
        assert await layer.get("key 0") is not None


# --- Loops, threads and the end -------------------------------------------------------------------------------------


def test_a_new_loop_per_call_works(layer: SQLitePersistenceLayer) -> None:
    record = asyncio.run(claimed(layer))
    for _ in range(3):
        assert asyncio.run(claimed(layer)) == record
    assert len(names_of_threads()) == 1


def test_several_loops_in_several_threads_share_a_layer(layer: SQLitePersistenceLayer) -> None:
    fences: list[int] = []

    async def claim_some(worker: int) -> None:
        records = [await claimed(layer, f"{worker}-{number}") for number in range(20)]
        fences.extend(record.fence for record in records)

    threads = [threading.Thread(target=asyncio.run, args=[claim_some(worker)]) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(fences)) == 80
    assert len(names_of_threads()) == 1


def test_a_loop_that_was_closed_does_not_disturb_others(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    async def ask_and_leave() -> None:
        clock.hold()
        asked: list[Any] = [layer.get("other")]
        assert await asyncio.to_thread(clock.reached.wait, 30)
        asked.append(layer.acquire(claim_of("left", now=1), now=1))

    async def ask() -> None:
        operation = layer.acquire(claim_of("key", now=1), now=1)
        clock.open.set()
        await operation

    asyncio.run(ask_and_leave())
    asyncio.run(ask())
    assert clock.transactions == 2
    assert rows(path) == [("key",), ("left",)]


async def test_a_caller_that_is_cancelled_leaves_its_write_whole_and_does_not_disturb_others(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    clock.hold()
    first = asyncio.ensure_future(claimed(layer, "cancelled"))
    assert await asyncio.to_thread(clock.reached.wait, 30)
    second = asyncio.ensure_future(claimed(layer, "other"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()
    clock.open.set()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert rows(path) == [("cancelled",), ("other",)]


async def test_closing_finishes_what_was_asked_and_ends_the_thread(
    layer: SQLitePersistenceLayer, clock: GatedClock, path: Path
) -> None:
    clock.hold()
    asked = [layer.acquire(claim_of("before", now=1), now=1)]
    assert await asyncio.to_thread(clock.reached.wait, 30)
    asked.append(layer.acquire(claim_of("queued", now=1), now=1))
    closing_layer = asyncio.ensure_future(layer.aclose())
    await asyncio.sleep(0)
    asked.append(layer.acquire(claim_of("after", now=1), now=1))
    assert len(names_of_threads()) == 2
    clock.open.set()
    await closing_layer
    await asyncio.gather(*asked)
    assert rows(path) == [("after",), ("before",), ("queued",)]
    await layer.aclose()
    assert names_of_threads() == []
    assert files_beside(path) == [path.name]


async def test_closing_does_not_block_the_loop(layer: SQLitePersistenceLayer, clock: GatedClock) -> None:
    clock.hold()
    look = layer.get("key")
    closing_layer = asyncio.ensure_future(layer.aclose())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not closing_layer.done()
    clock.open.set()
    await closing_layer
    assert look.done()


async def test_no_operation_is_lost_while_others_close_the_layer(path: Path) -> None:
    layer = SQLitePersistenceLayer(path)
    stop = False

    async def close_again_and_again() -> None:
        while not stop:
            await layer.aclose()

    closer = asyncio.ensure_future(asyncio.to_thread(asyncio.run, close_again_and_again()))
    for number in range(50):
        await asyncio.wait_for(claimed(layer, f"key-{number}"), 30)
    stop = True
    await closer
    await layer.aclose()
    assert len(rows(path)) == 50


async def test_nothing_happens_before_the_first_use_nor_when_it_is_closed_unused(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    await layer.aclose()
    assert files_beside(path) == []
    assert names_of_threads() == []
    async with layer as opened:
        assert opened is layer
        assert path.name in files_beside(path)
    assert names_of_threads() == []


@pytest.mark.filterwarnings("error")
async def test_a_layer_that_is_dropped_ends_its_thread_and_closes_its_file(path: Path) -> None:
    layer = SQLitePersistenceLayer(path)
    await claimed(layer)
    (thread,) = threads()
    del layer
    gc.collect()
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()
    assert files_beside(path) == [path.name]


def test_a_layer_that_could_not_be_made_is_dropped_quietly() -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="MemoryPersistenceLayer"):
        SQLitePersistenceLayer(":memory:")
    with pytest.raises(TypeError, match="path"):
        SQLitePersistenceLayer()  # type: ignore[call-arg]
    gc.collect()


# --- Listing ----------------------------------------------------------------------------------------------------------


async def test_records_are_listed_by_key_and_what_cannot_be_read_is_left_out(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    for key in ("b#2", "a#2", "a#3", "a#1"):
        await claimed(layer, key)
    change(path, "UPDATE records SET status = 'LATER' WHERE id = 'a#2'")
    assert [record.idempotency_key async for record in layer.scan()] == ["a#1", "a#3", "b#2"]
    assert [record.idempotency_key async for record in layer.scan(prefix="a#")] == ["a#1", "a#3"]


async def test_listing_and_purging_take_a_page_in_each_transaction(
    layer: SQLitePersistenceLayer, clock: GatedClock
) -> None:
    await asyncio.gather(*(claimed(layer, f"key#{number}") for number in range(250)))
    before = clock.transactions
    assert len([record async for record in layer.scan()]) == 250
    assert clock.transactions - before == 3
    clock.advance(60)
    before = clock.transactions
    assert await layer.purge() == 250
    assert clock.transactions - before == 4
    assert await layer.purge() == 0
