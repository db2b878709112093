"""Rows and outcomes are one for each key, whatever happens to the network, the server and those who write them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aidem import IdempotencyConfig, idempotency
from aidem.exceptions import IdempotencyAlreadyInProgressError
from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.paying import SECONDS, Torture
from tests.support.postgres import PostgresServer, connected, started
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.server, pytest.mark.timeout(SECONDS)]
PAYMENTS = "CREATE TABLE payments (number serial, key text)"
PAID = "SELECT key, number::text FROM payments"


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


async def pay(
    layer: PostgresPersistenceLayer, connection: Any, before_commit: Any = lambda: None, **options: Any
) -> Any:
    config = IdempotencyConfig(lease_seconds=5, **options)
    async with idempotency("o-1", persistence_store=layer, config=config) as execution:
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
        paying = asyncio.create_task(pay(layer, connection, proxy.hold))
        while not proxy.held.requests:  # noqa: ASYNC110 - the proxy counts, and tells nobody
            await asyncio.sleep(0.01)
        paying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await paying
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await pay(layer, client)  # the transaction may yet be committed, so nobody takes the key over
        proxy.heal()  # and with the commit comes the request to cancel it
        number = await pay(layer, client, wait_timeout_seconds=30)
    assert [row["number"] for row in await client.fetch("SELECT number FROM payments")] == [number]


async def test_a_server_that_crashes_before_the_commit_leaves_neither_row_nor_outcome(
    own_server: PostgresServer,
) -> None:
    await prepared(own_server.url)
    async with PostgresPersistenceLayer(own_server.url) as layer:
        connection = await asyncpg.connect(own_server.url)
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await pay(layer, connection, own_server.restart_after_crash)
        connection.terminate()
        assert await rows(own_server.url, "SELECT * FROM payments") == []
        async with connected(own_server.url) as client:
            number = await pay(layer, client)
        assert await rows(own_server.url, "SELECT number FROM payments") == [(number,)]


# --- Thousands ------------------------------------------------------------------------------------------------------


async def test_rows_and_outcomes_are_one_for_each_key_and_equal_every_answer(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    await prepared(own_server.url)
    torture = Torture(own_server.url, tmp_path / "answers")
    await asyncio.to_thread(torture.run, own_server.restart_after_crash)
    await asyncio.to_thread(torture.drain)
    payments = await rows(own_server.url, PAID)
    torture.report(payments)
    outcomes = await rows(own_server.url, "SELECT data FROM aidem_records WHERE status = 'COMPLETED'")
    torture.check(payments, [number for (number,) in outcomes])


async def test_without_completion_in_the_transaction_some_keys_are_paid_twice(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    await prepared(own_server.url)
    torture = Torture(own_server.url, tmp_path / "answers", "apart")
    await asyncio.to_thread(torture.run)
    payments = await rows(own_server.url, PAID)
    torture.report(payments)
    assert len(payments) > len(dict(payments))
