"""Rows and outcomes are one for each key, whatever happens to the network, the server and those who write them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aidem import idempotency
from aidem.exceptions import IdempotencyAlreadyInProgressError
from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.paying import start_worker
from tests.support.postgres import PostgresServer, connected, started
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.server, pytest.mark.timeout(150)]
PAYMENTS = "CREATE TABLE payments (number serial, key text)"
WORKERS, KEYS, MAX_LIVES, CRASHES = 4, 50, 400, 2


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that may be crashed."""
    with started() as server:
        yield server


async def prepared(url: str) -> None:
    layer = PostgresPersistenceLayer(url)
    await layer.create_table()
    await layer.aclose()
    async with connected(url) as client:
        await client.execute(PAYMENTS)


async def rows(url: str, query: str) -> list[Any]:
    async with connected(url) as client:
        return [tuple(row) for row in await client.fetch(query)]


# --- One commit -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def through(proxy: Proxy, server: PostgresServer) -> AsyncGenerator[Any]:
    """A connection of the application, which the proxy may cut; the layer's are not."""
    connection = await asyncpg.connect(server.url.replace(f":{server.port}", f":{proxy.port}"))
    yield connection
    connection.terminate()


@pytest.fixture
async def payments(client: Any) -> None:
    await client.execute(f"DROP TABLE IF EXISTS payments; {PAYMENTS}")


async def pay(layer: PostgresPersistenceLayer, connection: Any, before_commit: Any = lambda: None) -> Any:
    async with idempotency("o-1", persistence_store=layer) as execution:
        if not execution.replayed:
            await connection.execute("BEGIN")
            number = await connection.fetchval("INSERT INTO payments DEFAULT VALUES RETURNING number")
            await execution.complete(number, transaction=connection)
            before_commit()
            await connection.execute("COMMIT")
    return execution.result


@pytest.mark.usefixtures("payments")
async def test_a_commit_whose_answer_was_lost_is_found_and_replayed(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with Proxy.to(server.port) as proxy:
        async with through(proxy, server) as connection:
            with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
                await pay(layer, connection, proxy.cut_after_reply_is_dropped)
        assert proxy.dropped.replies
        assert await pay(layer, client) == 1
    assert await client.fetchval("SELECT count(*) FROM payments") == 1


@pytest.mark.usefixtures("payments")
async def test_a_commit_that_arrives_late_wins_or_finds_its_transaction_ended(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with Proxy.to(server.port) as proxy, through(proxy, server) as connection:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await pay(layer, connection, proxy.hold)
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await pay(layer, client)  # the transaction may yet be committed, so nobody takes the key over
        proxy.heal()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if await client.fetchval("SELECT count(*) FROM payments"):
                break
        assert await pay(layer, client) == 1
    assert await client.fetchval("SELECT count(*) FROM payments") == 1


async def test_a_server_that_crashes_before_the_commit_leaves_neither_row_nor_outcome(
    own_server: PostgresServer,
) -> None:
    await prepared(own_server.url)
    async with PostgresPersistenceLayer(own_server.url) as layer:
        connection = await asyncpg.connect(own_server.url)

        def crash_and_restart() -> None:
            own_server.crash()
            own_server.start()

        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await pay(layer, connection, crash_and_restart)
        connection.terminate()
        assert await rows(own_server.url, "SELECT * FROM payments") == []
        async with connected(own_server.url) as client:
            number = await pay(layer, client)
        assert await rows(own_server.url, "SELECT number FROM payments") == [(number,)]


# --- Thousands ------------------------------------------------------------------------------------------------------


class Service:
    """Workers on one database, each replaced when it dies, until as many have lived to the end."""

    def __init__(self, server: PostgresServer, log: Path, how: str) -> None:
        self.server, self.log, self.how = server, log, how
        self.lives = self.kills = 0

    def start(self) -> subprocess.Popen[bytes]:
        self.lives += 1
        assert self.lives < MAX_LIVES
        return start_worker(self.server.url, self.log, seed=self.lives, keys=KEYS, how=self.how)

    def run(self, *, crashes: int) -> None:
        workers = [self.start() for _ in range(WORKERS)]
        while workers:
            worker = workers.pop(0)
            try:
                ended = worker.wait(timeout=3 if crashes else 60)
            except subprocess.TimeoutExpired:
                crashes -= 1
                self.server.crash()
                self.server.start()
                workers.append(worker)
                continue
            assert ended in {0, -signal.SIGKILL}
            if ended != 0:
                self.kills += 1
                workers.append(self.start())
        assert crashes == 0

    def answers(self) -> list[tuple[str, str]]:
        return [(key, answer) for key, answer in map(str.split, self.log.read_text().splitlines())]


async def test_rows_and_outcomes_are_one_for_each_key_and_equal_every_answer(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    await prepared(own_server.url)
    service = Service(own_server, tmp_path / "answers", "together")
    await asyncio.to_thread(service.run, crashes=CRASHES)
    payments = await rows(own_server.url, "SELECT key, number::text FROM payments")
    answers = service.answers()
    told = [(key, answer) for key, answer in answers if answer.isdigit()]
    errors = Counter(answer for _, answer in answers if not answer.isdigit())
    print(f"\nPostgreSQL: {len(answers)} answers, {service.kills} kills, {CRASHES} crashes, {dict(errors)}")  # noqa: T201
    assert set(told) <= set(payments)
    assert len(payments) == len(dict(payments))
    outcomes = await rows(own_server.url, "SELECT data FROM aidem_records WHERE status = 'COMPLETED'")
    assert sorted(outcomes) == sorted((number,) for _, number in payments)
    assert service.kills > 0
    assert errors["BrokenOffError"] > 0


async def test_without_completion_in_the_transaction_some_keys_are_paid_twice(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    await prepared(own_server.url)
    service = Service(own_server, tmp_path / "answers", "apart")
    await asyncio.to_thread(service.run, crashes=0)
    payments = await rows(own_server.url, "SELECT key, number::text FROM payments")
    assert len(payments) > len(dict(payments))
