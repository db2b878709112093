"""SQLite: against aiosqlite and the bare module, as durable; and growth from a thousand to a million records."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import aiosqlite

from aidem import idempotent_function
from aidem.persistence.sqlite import SQLitePersistenceLayer, _records
from benchmarks._measure import first_and_replay, one_after_another, race
from benchmarks._rows import A_THOUSAND, at_least, at_most
from benchmarks._servers import directory_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks._measure import Call, Effort, Stopwatch
    from benchmarks._rows import Row

AIOSQLITE, BARE = "aiosqlite", "sqlite3, blocking"
SIZES = (10_000, 100_000, 1_000_000)
SCHEMA = tuple(statement for step in _records.Tables("").schema_steps for statement in step)
DURABLE = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL")

INSERT = "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)"
UPDATE = "UPDATE records SET status = ?, data = ?, expiration = ? WHERE id = ? AND owner = ?"
SELECT = "SELECT status, data FROM records WHERE id = ?"
OWNER = "0123456789abcdef0123456789abcdef"


def rows(effort: Effort) -> Iterator[Row]:
    with directory_on_disk() as directory:
        yield from _against_others(directory, effort)
        yield from _growth(directory, effort)


# --- Against others ---------------------------------------------------------------------------------------------------


def _against_others(directory: Path, effort: Effort) -> Iterator[Row]:
    calls = effort.calls(300)  # short laps, since disks are moody
    with asyncio.Runner() as runner, ExitStack() as cleanup:
        stack = AsyncExitStack()
        cleanup.callback(lambda: runner.run(stack.aclose()))
        ours = runner.run(_ours(directory / "ours", stack))
        theirs = runner.run(_aiosqlite(directory / "theirs", stack))

        def contender(call: Call, *tasks: int) -> Callable[[Stopwatch], None]:
            return lambda stopwatch: runner.run(first_and_replay(stopwatch, call, calls=calls, tasks=tasks))

        result = race(
            {
                "aidem": contender(ours, 32, 1),
                AIOSQLITE: contender(theirs, 32, 1),
                BARE: one_after_another(_bare(directory / "bare", cleanup), calls=calls),
            },
            rounds=effort.rounds(31),
        )
    yield result.rates("first calls, 32 tasks", lap="first/32", against=AIOSQLITE, by="wall", target=at_least(2))
    yield result.rates("replays, 32 tasks", lap="replay/32", against=AIOSQLITE, by="wall")
    for what, lap in (("first calls, one task", "first/1"), ("replays, one task", "replay/1")):
        yield result.times(what, lap=lap, against=AIOSQLITE, by="wall")
        yield result.times(what, lap=lap, against=BARE, by="wall")


async def _ours(path: Path, stack: AsyncExitStack) -> Call:
    layer = await stack.enter_async_context(SQLitePersistenceLayer(path))

    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


async def _aiosqlite(path: Path, stack: AsyncExitStack) -> Call:
    connection = await stack.enter_async_context(aiosqlite.connect(path, isolation_level=None))
    for statement in (*DURABLE, *SCHEMA):
        await connection.execute(statement)

    async def pay(order: str) -> None:
        key = _key(order)
        try:
            await connection.execute(INSERT, _claim(key))
        except sqlite3.IntegrityError:
            async with connection.execute(SELECT, (key,)) as cursor:
                await cursor.fetchone()
        else:
            await connection.execute(UPDATE, _outcome(key))

    return pay


def _bare(path: Path, cleanup: ExitStack) -> Callable[[str], None]:
    connection = sqlite3.connect(path, isolation_level=None)
    cleanup.callback(connection.close)
    for statement in (*DURABLE, *SCHEMA):
        connection.execute(statement)

    def pay(order: str) -> None:
        key = _key(order)
        try:
            connection.execute(INSERT, _claim(key))
        except sqlite3.IntegrityError:
            connection.execute(SELECT, (key,)).fetchone()
        else:
            connection.execute(UPDATE, _outcome(key))

    return pay


def _key(order: str) -> str:
    return f"test-func.benchmarks.sqlite.pay#{hashlib.sha256(order.encode()).hexdigest()}"


def _claim(key: str) -> tuple[str | int | None, ...]:
    now = int(time.time())
    return key, now + 3600, (now + 30) * 1000, "INPROGRESS", None, None, OWNER, now * 1000, None, None


def _outcome(key: str) -> tuple[str | int, ...]:
    return "COMPLETED", '{"paid": true}', int(time.time()) + 3600, key, OWNER


# --- Growth -----------------------------------------------------------------------------------------------------------


def _growth(directory: Path, effort: Effort) -> Iterator[Row]:
    sizes, calls = [effort.calls(size) for size in SIZES], effort.calls(5000)
    with asyncio.Runner() as runner, ExitStack() as cleanup:
        stack = AsyncExitStack()
        cleanup.callback(lambda: runner.run(stack.aclose()))

        def contender(size: int) -> Callable[[Stopwatch], None]:
            path = directory / f"{size}"
            call = runner.run(_ours(path, stack))
            _fill(path, size)

            def take_laps(stopwatch: Stopwatch) -> None:
                runner.run(first_and_replay(stopwatch, call, calls=calls, tasks=(32,)))
                _forget_new(path)

            return take_laps

        few = contender(1000)
        results = {size: race({"aidem": contender(size), A_THOUSAND: few}, rounds=effort.rounds(9)) for size in sizes}
    for size, result in results.items():
        for lap, what in (("first/32", "first calls"), ("replay/32", "replays")):
            grown = f"{what} among {size:,} records, 32 tasks"
            yield result.times(grown, lap=lap, against=A_THOUSAND, by="wall", target=at_most(1.3))


def _fill(path: Path, size: int) -> None:
    """Add completed records that do not expire while it is measured."""
    expires = int(time.time()) + 7200
    records = (
        (
            _key(f"old-{number}"),
            expires + number // 300,
            None,
            "COMPLETED",
            '{"paid": true}',
            None,
            OWNER,
            1,
            None,
            None,
        )
        for number in range(size)
    )
    with _maintained(path) as connection:
        connection.executemany(INSERT, records)


def _forget_new(path: Path) -> None:
    """Bring a file back to its size; its log, too, begins anew in every round."""
    with _maintained(path) as connection:
        connection.execute("DELETE FROM records WHERE fence > 1")


@contextmanager
def _maintained(path: Path) -> Iterator[sqlite3.Connection]:
    """Change a file in one transaction, fast, and leave nothing in its log."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for setting in ("synchronous = OFF", "cache_size = -1000000"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
