"""`crash_everywhere` on effects in SQLite: what vanishes leaves no transaction behind, nor a thread."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from aidem import current_execution, idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import CrashReport, FakeClock, crash_everywhere

INSERT = "INSERT INTO charges VALUES ('o-1')"


class Shop:
    """A database of an application, which has the records, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.layer = SQLitePersistenceLayer(path, in_application_database=True, clock=self.clock)
        with closing(self.connect()) as connection:
            connection.execute("CREATE TABLE charges (order_id TEXT)")

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, timeout=0)

    def forget(self) -> None:
        with closing(self.connect()) as connection:
            connection.execute("DELETE FROM charges")

    def count(self) -> int:
        with closing(self.connect()) as connection:
            [count] = connection.execute("SELECT count(*) FROM charges").fetchone()
        return int(count)

    async def prove(self, body: Callable[[], Awaitable[None]]) -> CrashReport:
        decorate: Any = idempotent_function(key_prefix="charge", persistence_store=self.layer)
        charge = decorate(body)
        async with self.layer:
            report = await crash_everywhere(
                charge, clock=self.clock, reset=self.forget, effects=self.count, ways=["vanish"], timeout_seconds=30
            )
        assert [point for point in report.points if point.outcome != "returned"] == []
        assert "await asyncio.sleep(0)" in {point.line for point in report.points}, "none in the transaction"
        return report


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path / "shop.sqlite3")


async def test_a_completion_in_a_transaction_of_sqlite3_is_exactly_once(shop: Shop) -> None:
    async def charge() -> None:
        with closing(shop.connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(INSERT)
            await asyncio.sleep(0)
            await current_execution().complete("charged", transaction=connection)
            connection.execute("COMMIT")

    (await shop.prove(charge)).check()


async def test_a_completion_in_a_transaction_of_aiosqlite_is_exactly_once_and_leaves_no_thread(shop: Shop) -> None:
    threads = set(threading.enumerate())

    async def charge() -> None:
        async with aiosqlite.connect(shop.path, isolation_level=None) as connection:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.execute(INSERT)
            await asyncio.sleep(0)
            await current_execution().complete("charged", transaction=connection)
            await connection.execute("COMMIT")

    (await shop.prove(charge)).check()
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive(), thread


async def test_a_connection_that_is_older_than_the_process_is_rolled_back_and_stays_open(shop: Shop) -> None:
    async with aiosqlite.connect(shop.path, isolation_level=None) as connection:

        async def charge() -> None:
            await connection.execute("BEGIN IMMEDIATE")
            await connection.execute(INSERT)
            await asyncio.sleep(0)
            await current_execution().complete("charged", transaction=connection)
            await connection.execute("COMMIT")

        (await shop.prove(charge)).check()
        assert not connection.in_transaction


async def test_rows_that_are_committed_before_the_completion_are_written_twice(shop: Shop) -> None:
    async def charge() -> None:
        async with aiosqlite.connect(shop.path, isolation_level=None) as connection:
            await connection.execute(INSERT)
            await asyncio.sleep(0)

    report = await shop.prove(charge)
    twice = {point.line for point in report.points if point.effects == 2}
    assert twice >= {"await connection.execute(INSERT)", "await asyncio.sleep(0)"}


async def test_the_clock_of_the_loop_does_not_jump_while_a_thread_of_aiosqlite_works() -> None:
    clock = FakeClock()

    async def charge() -> None:
        sleeping = asyncio.create_task(asyncio.sleep(100))
        async with aiosqlite.connect(":memory:") as connection, asyncio.timeout(60):
            await connection.create_function("slow", 0, lambda: time.sleep(0.05))
            await connection.execute("SELECT slow()")
        sleeping.cancel()

    layer = MemoryPersistenceLayer(clock=clock)
    call: Any = idempotent_function(key_prefix="charge", persistence_store=layer)(charge)
    report = await crash_everywhere(call, clock=clock, effects=lambda: 1, ways=["lost_reply"])
    assert {(point.when, point.outcome) for point in report.points} == {
        ("acquire", "returned"),
        ("complete", "returned"),
    }


async def test_what_a_vanished_process_asked_of_its_layer_is_done_before_leases_pass() -> None:
    class Queueing(MemoryPersistenceLayer):
        """Answers what it can by reading before it writes, as SQLite's layer does in an application's file."""

        def __init__(self, clock: FakeClock) -> None:
            super().__init__(clock=clock)
            self.reads = 0
            self.to_write: list[Callable[[], object]] = []

        async def acquire(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
            earlier, self.to_write = self.to_write, [lambda: super(Queueing, self).acquire(*args, **options)]
            for write in earlier:
                write()
            self.reads = 0
            await asyncio.sleep(0)
            self.to_write = []
            return await super().acquire(*args, **options)

        async def get(self, key: str) -> Any:  # type: ignore[override]
            self.reads += 1
            while self.reads == 2 and self.to_write:
                self.to_write.pop()()
            return await super().get(key)

    clock = FakeClock()

    async def charge() -> None: ...

    decorate: Any = idempotent_function(key_prefix="charge", persistence_store=Queueing(clock))
    report = await crash_everywhere(decorate(charge), clock=clock, effects=lambda: 1, ways=["vanish"])
    assert "during acquire" in {point.when for point in report.points}
    assert {point.outcome for point in report.points} == {"returned"}
