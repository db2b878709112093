"""The contract, with every way to reach the server, under every isolation level, and by both clocks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar

import asyncpg
import pytest
from anyio import to_thread
from psycopg_pool import AsyncConnectionPool
from sqlalchemy.ext.asyncio import create_async_engine

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence import PersistenceLayer
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.testing import (
    FakeClock,
    PersistenceLayerConformance,
    PurgeConformance,
    ScanConformance,
    TakeOverConformance,
    Trial,
)
from tests.support.postgres import PgBouncer, PostgresServer, connected, make_database

pytestmark = pytest.mark.server


class OnServer(TakeOverConformance):
    """Judged by the clock that the layer was given."""

    pytestmark: ClassVar = [*PersistenceLayerConformance.pytestmark, pytest.mark.server]
    url: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _url(cls, server: PostgresServer) -> None:
        cls.url = server.url

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return PostgresPersistenceLayer(self.url, clock=clock)


class OnEmptyTable(OnServer, ScanConformance, PurgeConformance):
    """With nothing in the table that other tests have left, as what was purged is counted."""

    @contextlib.asynccontextmanager
    async def make_trial(self) -> AsyncGenerator[Trial]:
        async with connected(self.url) as client:
            await client.execute("TRUNCATE aidem_records")
        async with super().make_trial() as trial:
            yield trial


class TestStraight(OnEmptyTable):
    pass


class TestPgBouncer(OnEmptyTable):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _url(cls, pgbouncer: PgBouncer) -> None:
        cls.url = pgbouncer.url


class InDatabase(OnServer):
    """With a database of its own, whose settings hold for every session."""

    settings: ClassVar[tuple[str, ...]]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _url(cls, server: PostgresServer) -> None:
        async def make() -> str:
            url = await make_database(server, cls.__name__)
            async with connected(url) as client:
                for setting in cls.settings:
                    await client.execute(setting.format(database=cls.__name__))
            layer = PostgresPersistenceLayer(url)
            await layer.create_table()
            await layer.aclose()
            return url

        cls.url = asyncio.run(make())


class TestServerClock(InDatabase):
    """Judged by the clock of the server, which the test moves."""

    settings = (
        "CREATE TABLE clock (epoch double precision)",
        "INSERT INTO clock VALUES (0)",
        """CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql
        BEGIN ATOMIC SELECT to_timestamp(epoch) FROM public.clock; END""",
        'ALTER DATABASE "{database}" SET search_path = public, pg_catalog',
    )

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        await self.advance(clock, 0)
        return PostgresPersistenceLayer(self.url, max_connections=1)

    async def advance(self, clock: FakeClock, seconds: float) -> None:
        clock.advance(seconds)
        async with connected(self.url) as client:
            await client.execute(f"UPDATE clock SET epoch = {clock()!r}")


class TestRepeatableRead(InDatabase):
    settings = ('ALTER DATABASE "{database}" SET default_transaction_isolation = "repeatable read"',)


class TestSerializable(InDatabase):
    settings = ('ALTER DATABASE "{database}" SET default_transaction_isolation = "serializable"',)


class OnPool(OnServer):
    """On a pool of the user, which belongs to one event loop."""

    def pool(self) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def make_trial(self) -> AsyncGenerator[Trial]:
        async with self.pool() as self.opened, super().make_trial() as trial:
            yield trial

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return PostgresPersistenceLayer(pool=self.opened, clock=clock)

    async def test_one_of_many_claims_from_many_event_loops_is_granted(self, trial: Trial) -> None:
        await self.test_another_event_loop_may_use_the_layer(trial)

    async def test_another_event_loop_may_use_the_layer(self, trial: Trial) -> None:
        claimed = await trial.claimed(trial.claim())
        with pytest.raises(IdempotencyPersistenceConfigError, match="belongs to another event loop"):
            await to_thread.run_sync(lambda: asyncio.run(trial.stored()))
        assert await trial.stored() == claimed


class TestPoolOfAsyncpg(OnPool):
    def pool(self) -> AbstractAsyncContextManager[Any]:
        return asyncpg.create_pool(self.url, min_size=1)


class TestPoolOfPsycopg(OnPool):
    def pool(self) -> AbstractAsyncContextManager[Any]:
        return AsyncConnectionPool(self.url, min_size=1, max_size=5, open=False)


class OnEngine(OnPool):
    driver: ClassVar[str]

    @contextlib.asynccontextmanager
    async def pool(self) -> AsyncGenerator[Any]:
        url = self.url.replace("postgresql://", f"postgresql+{self.driver}://").partition("?")[0]
        engine = create_async_engine(url)
        yield engine
        await engine.dispose()


class TestEngineOnAsyncpg(OnEngine):
    driver = "asyncpg"


class TestEngineOnPsycopg(OnEngine):
    driver = "psycopg"
