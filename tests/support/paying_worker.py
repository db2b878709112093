"""A service that is treated badly: `python paying_worker.py DATABASE LOG SEED KEYS HOW`.

Pays each of some keys, in the order in which all workers do: a payment is a row or an item, and its number is the
result. Each answer goes to the log. `HOW` is one of:

- `together`: on the way it kills itself, stands still for longer than its lease, is cancelled, loses the answer to a
  commit, or leaves the body by an exception.
- `apart`: the same, but the row is committed first and the call completed afterwards, as without `execution.complete`.
- `undisturbed`: as `together`, and nothing of this happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from aidem import IdempotencyConfig, idempotency
from aidem.exceptions import IdempotencyError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
    from aidem.persistence.postgres import PostgresPersistenceLayer
    from aidem.persistence.sqlite import SQLitePersistenceLayer

LEASE_SECONDS = 1.0
PAUSE_SECONDS = 0.2
CONFIG = IdempotencyConfig(lease_seconds=LEASE_SECONDS, expires_after_seconds=86400, wait_timeout_seconds=5)


class BrokenOffError(Exception):
    """The body goes no further."""


class LostCommitError(Exception):
    """The answer to a commit did not come."""


class Fate:
    """What happens to a body on its way: something, or mostly nothing."""

    def __init__(self, seed: str, log: str, *, is_kind: bool) -> None:
        self.dice, self.log, self.is_kind = random.Random(seed), log, is_kind
        self.spares_this_body = is_kind

    def seconds_for(self, key: str) -> float:
        """Return how long a call may take: some are cancelled, but not those whose first owner loses its lease."""
        is_cancelled = not self.is_kind and not key.endswith("7") and self.dice.random() < 0.3
        return self.dice.uniform(0.001, 0.02) if is_cancelled else 30

    def begin_body(self, key: str) -> None:
        """Let the first owner of some keys stand still until another has taken over, and then go on unharmed."""
        self.spares_this_body = self.is_kind
        if key.endswith("7") and not self.is_kind:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.log}.{key}", os.O_CREAT | os.O_EXCL))
                self.spares_this_body = True
                time.sleep(2.5 * LEASE_SECONDS)

    async def strike(self) -> None:
        what = 1 if self.spares_this_body else self.dice.random()
        if what < 0.04:
            os.kill(os.getpid(), signal.SIGKILL)
        elif what < 0.05:
            time.sleep(1.5 * LEASE_SECONDS)  # noqa: ASYNC251 - the loop stands still, and no renewal goes out
        elif what < 0.1:
            raise BrokenOffError
        await asyncio.sleep(0)

    async def commit(self, commit: Awaitable[object]) -> None:
        """Send a commit; whether one that is not waited for is applied, nobody knows."""
        is_lost = not self.spares_this_body and self.dice.random() < 0.08
        try:
            async with asyncio.timeout(self.dice.uniform(0, 0.005) if is_lost else None) as limit:
                await commit
        except TimeoutError as error:
            raise LostCommitError if limit.expired() else error from None


class Store(ABC):
    """Payments, and the records beside them; the clients of the others are not imported, as workers start often."""

    layer: SQLitePersistenceLayer | PostgresPersistenceLayer | DynamoDBPersistenceLayer
    errors: tuple[type[Exception], ...] = ()

    @abstractmethod
    async def pay(self, key: str, execution: Any, fate: Fate) -> int:
        """Make a payment and return its number; complete the call with it, unless `execution` is None."""


class SQLStore(Store):
    begin = "BEGIN"

    @abstractmethod
    def connect(self) -> AbstractAsyncContextManager[Any]:
        """Open a connection of the application's."""

    @abstractmethod
    async def insert(self, connection: Any, key: str) -> int:
        """Insert a payment, and return its number."""

    async def pay(self, key: str, execution: Any, fate: Fate) -> int:
        async with self.connect() as connection:
            await connection.execute(self.begin)
            await fate.strike()
            number = await self.insert(connection, key)
            await fate.strike()
            if execution is not None:
                await execution.complete(number, transaction=connection)
                await fate.strike()
            await fate.commit(connection.execute("COMMIT"))
        return number


class SQLite(SQLStore):
    begin = "BEGIN IMMEDIATE"

    def __init__(self, path: str) -> None:
        import aiosqlite

        from aidem.persistence.sqlite import SQLitePersistenceLayer

        self.client, self.path = aiosqlite, path
        self.layer = SQLitePersistenceLayer(path, in_application_database=True, busy_timeout_seconds=30)

    def connect(self) -> AbstractAsyncContextManager[Any]:
        return self.client.connect(self.path, isolation_level=None, timeout=30)

    async def insert(self, connection: Any, key: str) -> int:
        cursor = await connection.execute("INSERT INTO payments (key) VALUES (?)", (key,))
        number: int = cursor.lastrowid
        return number


class Postgres(SQLStore):
    def __init__(self, url: str) -> None:
        import asyncpg

        from aidem.persistence.postgres import PostgresPersistenceLayer

        self.client, self.url = asyncpg, url
        self.errors = (asyncpg.PostgresError, asyncpg.InterfaceError)
        self.layer = PostgresPersistenceLayer(url)

    @contextlib.asynccontextmanager
    async def connect(self) -> Any:
        connection = await self.client.connect(self.url)
        try:
            yield connection
        finally:
            connection.terminate()

    async def insert(self, connection: Any, key: str) -> int:
        number: int = await connection.fetchval("INSERT INTO payments (key) VALUES ($1) RETURNING number", key)
        return number


class DynamoDB(Store):
    def __init__(self, tables: str, client: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        from aidem.persistence.dynamodb import DynamoDBPersistenceLayer

        self.errors = (BotoCoreError, ClientError)
        records, self.payments = tables.split("/")
        self.layer = DynamoDBPersistenceLayer(records, client=client)
        self.client = client

    async def pay(self, key: str, execution: Any, fate: Fate) -> int:
        number = secrets.randbelow(10**12)
        item = {"id": {"S": str(number)}, "key": {"S": key}}
        writes = [{"Put": {"TableName": self.payments, "Item": item}}]
        await fate.strike()
        if execution is not None:
            writes.append({"Update": await execution.completion_item(number)})
            await fate.strike()
        await fate.commit(self.client.transact_write_items(TransactItems=writes))
        return number


async def store_of(database: str, exits: contextlib.AsyncExitStack) -> Store:
    scheme, has_scheme, rest = database.partition("://")
    if scheme == "dynamodb":
        from aiobotocore.session import get_session

        return DynamoDB(rest, await exits.enter_async_context(get_session().create_client("dynamodb")))
    return Postgres(database) if has_scheme else SQLite(database)


async def pay(store: Store, key: str, fate: Fate, *, apart: bool) -> Any:
    async with idempotency(key, persistence_store=store.layer, config=CONFIG) as execution:
        if execution.replayed:
            return execution.result
        fate.begin_body(key)
        await fate.strike()
        number = await store.pay(key, None if apart else execution, fate)
        await fate.strike()
        if apart:
            execution.result = number
    return execution.result


async def main(database: str, log: str, seed: str, keys: str, how: str) -> None:
    fate = Fate(seed, log, is_kind=how == "undisturbed")
    answers = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with contextlib.AsyncExitStack() as exits:
        store = await store_of(database, exits)
        exits.push_async_callback(store.layer.aclose)
        await pay_all(store, answers, fate, int(keys), apart=how == "apart")


async def pay_all(store: Store, answers: int, fate: Fate, keys: int, *, apart: bool) -> None:
    failures: tuple[type[Exception], ...] = (IdempotencyError, OSError, *store.errors)
    for key in (f"key-{number}" for number in range(keys)):
        answer: Any
        try:
            async with asyncio.timeout(fate.seconds_for(key)):
                answer = await pay(store, key, fate, apart=apart)
        except (BrokenOffError, LostCommitError, TimeoutError) as error:
            answer = type(error).__name__
        except failures as error:
            answer = type(error).__name__
            await asyncio.sleep(PAUSE_SECONDS)  # or all keys would be over before a server that crashed is back
        os.write(answers, f"{key} {answer}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
