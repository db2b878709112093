"""A service that is treated badly: `python paying_worker.py DATABASE LOG SEED KEYS HOW`.

Pays each of some keys, in the order in which all workers do: a payment is a row, and its number is the result. On the
way it kills itself, stands still for longer than its lease, is cancelled, or leaves the body by an exception. Each
answer goes to the log. With `HOW` = `apart` the row is committed first and the call completed afterwards, as without
`execution.complete`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiosqlite
import asyncpg

from aidem import IdempotencyConfig, idempotency
from aidem.exceptions import IdempotencyError
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LEASE_SECONDS = 1.0
CONFIG = IdempotencyConfig(lease_seconds=LEASE_SECONDS, expires_after_seconds=86400, wait_timeout_seconds=5)


class BrokenOffError(Exception):
    """The body goes no further."""


class SQLite:
    """Payments and records in one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.layer = SQLitePersistenceLayer(path, in_application_database=True, busy_timeout_seconds=30)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with aiosqlite.connect(self.path, isolation_level=None, timeout=30) as connection:
            await connection.execute("BEGIN IMMEDIATE")
            yield connection
            await connection.execute("COMMIT")

    async def insert(self, connection: Any, key: str) -> int:
        cursor = await connection.execute("INSERT INTO payments (key) VALUES (?)", (key,))
        number: int = cursor.lastrowid
        return number


class Postgres:
    """Payments and records in one database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.layer = PostgresPersistenceLayer(url)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.url)
        try:
            async with connection.transaction():
                yield connection
        finally:
            connection.terminate()

    async def insert(self, connection: Any, key: str) -> int:
        number: int = await connection.fetchval("INSERT INTO payments (key) VALUES ($1) RETURNING number", key)
        return number


async def misfortune(dice: random.Random) -> None:
    """Let something happen, or mostly nothing."""
    what = dice.random()
    if what < 0.03:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what < 0.05:
        time.sleep(1.5 * LEASE_SECONDS)  # noqa: ASYNC251 - the loop stands still, and no renewal goes out
    elif what < 0.08:
        raise BrokenOffError
    await asyncio.sleep(0)


def lose_lease_once(key: str, log: str) -> None:
    """Let the first owner of some keys stand still until another has taken over."""
    if key.endswith("7"):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(f"{log}.{key}", os.O_CREAT | os.O_EXCL))
            time.sleep(2.5 * LEASE_SECONDS)


async def pay(store: SQLite | Postgres, key: str, log: str, dice: random.Random, *, apart: bool) -> Any:
    async with idempotency(key, persistence_store=store.layer, config=CONFIG) as execution:
        if execution.replayed:
            return execution.result
        lose_lease_once(key, log)
        await misfortune(dice)
        async with store.transaction() as transaction:
            await misfortune(dice)
            number = await store.insert(transaction, key)
            await misfortune(dice)
            if not apart:
                await execution.complete(number, transaction=transaction)
                await misfortune(dice)
        await misfortune(dice)
        if apart:
            execution.result = number
    return execution.result


async def main(path: str, log: str, seed: str, keys: str, how: str) -> None:
    store, dice = Postgres(path) if "://" in path else SQLite(path), random.Random(seed)
    answers = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for key in (f"key-{number}" for number in range(int(keys))):
        seconds = dice.uniform(0.001, 0.02) if dice.random() < 0.3 else 30
        try:
            async with asyncio.timeout(seconds):
                answer = await pay(store, key, log, dice, apart=how == "apart")
        except (BrokenOffError, IdempotencyError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            os.write(answers, f"{key} {type(error).__name__}\n".encode())
        else:
            os.write(answers, f"{key} {answer}\n".encode())
    await store.layer.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
