"""Pools of the user: used as they are, given back as they were, and never closed."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Blocked
from aidem.exceptions import (
    IdempotencyHeldByTransactionError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
)
from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.postgres import PostgresServer, acquired, claimed, completed, connected, failing
from tests.support.proxy import Proxy

pytestmark = pytest.mark.server
KINDS = ["asyncpg", "psycopg", "engine on asyncpg", "engine on psycopg"]


@asynccontextmanager
async def pool_of(kind: str, url: str, *, size: int = 4) -> AsyncGenerator[Any]:
    if kind == "asyncpg":
        async with asyncpg.create_pool(url, min_size=1, max_size=size) as pool:
            yield pool
    elif kind == "psycopg":
        async with AsyncConnectionPool(
            url, min_size=1, max_size=size, kwargs={"row_factory": dict_row}, open=False
        ) as pool:
            yield pool
    else:
        driver = kind.rpartition(" ")[2]
        engine = create_async_engine(
            url.replace("postgresql:", f"postgresql+{driver}:").partition("?")[0], pool_size=size, max_overflow=0
        )
        yield engine
        await engine.dispose()


@pytest.fixture(params=KINDS)
async def pool(request: pytest.FixtureRequest, server: PostgresServer, client: Any) -> AsyncGenerator[Any]:
    async with pool_of(request.param, server.url) as pool:
        yield pool


@pytest.fixture
async def layer(pool: Any) -> AsyncGenerator[PostgresPersistenceLayer]:
    layer = PostgresPersistenceLayer(pool=pool)
    yield layer
    await layer.aclose()


async def test_calls_share_a_pool_with_the_application_which_stays_open(
    layer: PostgresPersistenceLayer, pool: Any
) -> None:
    async with layer:
        effects = list[int]()

        @idempotent_function(
            persistence_store=layer, key_prefix="pool", config=IdempotencyConfig(wait_timeout_seconds=30)
        )
        async def effect(number: int) -> int:
            effects.append(number)
            return number

        assert await asyncio.gather(*(effect(number % 10) for number in range(50))) == [n % 10 for n in range(50)]
        assert sorted(effects) == list(range(10))
    assert await effect(1) == 1


async def test_a_connection_of_psycopg_is_given_back_as_it_was(server: PostgresServer, client: Any) -> None:
    for autocommit in (False, True):
        async with pool_of("psycopg", server.url, size=1) as pool:
            async with pool.connection() as connection:
                await connection.set_autocommit(autocommit)
            await PostgresPersistenceLayer(pool=pool).open()
            async with pool.connection() as connection:
                assert connection.autocommit is autocommit
                assert await (await connection.execute("SELECT 1 AS one")).fetchone() == {"one": 1}


async def test_an_engine_is_given_back_its_connection_outside_of_a_transaction(
    server: PostgresServer, client: Any
) -> None:
    for kind in KINDS[2:]:
        async with pool_of(kind, server.url, size=1) as engine:
            layer = PostgresPersistenceLayer(pool=engine)
            await claimed(layer, kind)
            await layer.aclose()
            async with engine.begin() as connection:
                found = await connection.execute(
                    text("SELECT count(*) FROM aidem_records WHERE id = :id"), {"id": kind}
                )
                assert found.scalar() == 1


async def test_errors_of_every_driver_are_translated_alike(layer: PostgresPersistenceLayer, client: Any) -> None:
    layer._next_purge_at = math.inf
    async with failing(client, "53100"):
        with pytest.raises(IdempotencyPersistenceConnectionError, match="disk is full") as failed:
            await acquired(layer)
        assert not failed.value.may_be_applied
    async with failing(client, "40001", times=3):
        await claimed(layer)
    await client.execute("ALTER TABLE aidem_records RENAME TO elsewhere")
    try:
        with pytest.raises(IdempotencyPersistenceConfigError, match="CREATE TABLE IF NOT EXISTS"):
            await acquired(layer)
    finally:
        await client.execute("ALTER TABLE elsewhere RENAME TO aidem_records")


async def test_what_cannot_be_serialized_or_stays_locked_fails_in_time(
    pool: Any, server: PostgresServer, client: Any
) -> None:
    layer = PostgresPersistenceLayer(pool=pool, timeout_seconds=2.0)
    layer._next_purge_at = math.inf
    async with failing(client, "40001"):
        with pytest.raises(IdempotencyPersistenceConnectionError, match="kept failing to serialize"):
            await acquired(layer)
    await completed(layer, await claimed(layer))
    await client.execute("UPDATE aidem_records SET expiration = 1")
    async with connected(server.url) as holder, holder.transaction():
        await holder.execute("SELECT FROM aidem_records FOR UPDATE")
        with pytest.raises(IdempotencyPersistenceConnectionError, match="has held the record for 2 s"):
            await acquired(layer)


async def test_a_claim_that_a_transaction_holds_is_not_waited_for(
    layer: PostgresPersistenceLayer, server: PostgresServer
) -> None:
    claim = await claimed(layer, lease_seconds=0)
    async with connected(server.url) as holder, holder.transaction():
        await holder.execute("UPDATE aidem_records SET status = 'COMPLETED'")
        async with asyncio.timeout(4.5):  # the layer would wait for longer
            assert isinstance(await acquired(layer, owner="another"), Blocked)
            with pytest.raises(IdempotencyHeldByTransactionError):
                await layer.release(claim)


async def test_a_session_that_the_server_ends_in_the_middle_is_an_outage_and_the_next_call_has_another(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    async with failing(client, "00000", statement="PERFORM pg_terminate_backend(pg_backend_pid())", times=1):
        with pytest.raises(IdempotencyPersistenceConnectionError) as failed:
            await acquired(layer)
        assert failed.value.may_be_applied
        await claimed(layer)


async def test_a_pool_whose_connections_are_all_in_use_is_an_outage(server: PostgresServer, client: Any) -> None:
    for kind in KINDS:
        async with pool_of(kind, server.url, size=1) as pool:
            patient = PostgresPersistenceLayer(pool=pool)
            await claimed(patient, kind)
            await patient.aclose()
            layer = PostgresPersistenceLayer(pool=pool, timeout_seconds=0.3)
            borrow = getattr(pool, "acquire", None) or getattr(pool, "connection", None) or pool.connect
            async with borrow():
                with pytest.raises(
                    IdempotencyPersistenceConnectionError, match=r"no connection to lend within 0\.3"
                ) as failed:
                    await acquired(layer, "another")
                assert not failed.value.may_be_applied  # so nothing is to be released
            assert await patient.get(kind) is not None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_falls_silent_fails_in_time_whatever_the_pool_waits_for(
    server: PostgresServer, client: Any, kind: str
) -> None:
    async def ask() -> None:
        with pytest.raises(IdempotencyPersistenceConnectionError, match=r"did not answer within 0\.5 s") as failed:
            await PostgresPersistenceLayer(pool=pool, timeout_seconds=0.5).get("key")
        assert failed.value.may_be_applied

    async with (
        Proxy.to(server.port) as proxy,
        pool_of(kind, server.url.replace(f":{server.port}", f":{proxy.port}"), size=1) as pool,
    ):
        layer = PostgresPersistenceLayer(pool=pool, timeout_seconds=30)
        await claimed(layer)
        await layer.aclose()
        proxy.hold()
        asking = asyncio.create_task(ask())
        await asyncio.wait([asking], timeout=8)  # psycopg gives up after 10
        assert proxy.held.requests
        was_in_time = asking.done()
        proxy.heal()
        await asking
        assert was_in_time
        while proxy.open_connections > 1:  # noqa: ASYNC110 - until the driver has cancelled the statement
            await asyncio.sleep(0.01)
        assert await layer.get("key") is not None  # when the pool has its connection back


async def test_a_server_that_cannot_be_reached_is_an_outage_in_which_nothing_was_applied(vacant_port: int) -> None:
    engine = create_async_engine(f"postgresql+asyncpg://user:secret@127.0.0.1:{vacant_port}/x")
    with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached") as failed:
        await acquired(PostgresPersistenceLayer(pool=engine))
    assert not failed.value.may_be_applied
    assert "secret" not in str(failed.value)


async def test_a_pool_that_is_closed_or_was_not_opened_is_a_wrong_setting(server: PostgresServer) -> None:
    unopened: Any = asyncpg.create_pool(server.url)
    never = AsyncConnectionPool(server.url, open=False)
    async with pool_of("asyncpg", server.url) as closed, pool_of("psycopg", server.url) as closed_too:
        pass
    for pool in (unopened, never, closed, closed_too):
        with pytest.raises(IdempotencyPersistenceConfigError, match="the pool is closed, or was not opened"):
            await PostgresPersistenceLayer(pool=pool).open()


def test_a_pool_may_be_used_on_the_next_loop_once_its_own_has_ended(server: PostgresServer) -> None:
    from sqlalchemy.pool import NullPool

    engine = create_async_engine(server.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool)
    layer = PostgresPersistenceLayer(pool=engine)
    for _ in range(2):
        asyncio.run(layer.open())


def test_the_loop_that_ends_takes_a_purge_with_it_that_is_under_way(caplog: pytest.LogCaptureFixture) -> None:
    class Exhausted(asyncpg.Pool):
        """Lends no connection, so that whoever asks for one waits."""

        def __init__(self) -> None: ...

        @asynccontextmanager
        async def acquire(self, **_: Any) -> AsyncGenerator[Any]:  # type: ignore[override]
            waiting.append(True)
            yield await asyncio.get_running_loop().create_future()

    async def purge_and_leave() -> None:
        layer = PostgresPersistenceLayer(pool=Exhausted())
        layer._purge_sometimes(layer._sources.here())
        await asyncio.sleep(0)
        assert waiting, "no purge is under way"

    waiting = list[bool]()
    caplog.set_level(logging.WARNING, "aidem")
    asyncio.run(purge_and_leave())
    assert [record.getMessage() for record in caplog.records if record.name == "aidem"] == []


async def test_a_purge_on_a_pool_that_fails_is_logged(
    layer: PostgresPersistenceLayer, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await client.execute("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'")
    await client.execute("CREATE TRIGGER no BEFORE DELETE ON aidem_records EXECUTE FUNCTION no()")
    try:
        await claimed(layer)
        await layer.aclose()
    finally:
        await client.execute("DROP FUNCTION no CASCADE")
    assert "records that have expired could not be removed: PostgreSQL answered SQLSTATE P0001" in caplog.text


def test_pools_and_engines_of_other_kinds_are_refused(server: PostgresServer) -> None:
    refused = [
        ConnectionPool(server.url, open=False),
        create_engine(server.url.replace("postgresql:", "postgresql+psycopg:")),
        "postgresql://host/",
    ]
    other = create_async_engine("postgresql+asyncpg://host/")
    other.dialect.driver = "aiosqlite"
    refused.append(other)
    for pool in refused:
        with pytest.raises(IdempotencyPersistenceConfigError, match=r"pool takes an asyncpg\.Pool"):
            PostgresPersistenceLayer(pool=pool)
