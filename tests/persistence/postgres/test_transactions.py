"""Calls completed in transactions of the application, by every library, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, ClassVar

import asyncpg
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

from aidem import idempotency, sync
from aidem._rules.record import DataRecord
from aidem.exceptions import IdempotencyHeldByTransactionError, IdempotencyUsageError
from aidem.persistence import PersistenceLayer, SupportsCompletionInTransaction
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.testing import (
    CompletionInTransactionConformance,
    FakeClock,
    OpenTransaction,
    PersistenceLayerConformance,
    completed_of,
)
from tests.support.postgres import PgBouncer, PostgresServer, claimed, connected, make_database
from tests.support.transactional import ask_about_a_held_claim

pytestmark = pytest.mark.server

INSERT = "INSERT INTO payments DEFAULT VALUES"
AT_ONCE_SECONDS = 4.5
"""Far less than the other transaction lasts."""


class Opened:
    """A transaction of a library, and how it is used and ended."""

    def __init__(self, transaction: Any, execute: Callable[[str], Any], close: Callable[[], Any]) -> None:
        self.transaction = transaction
        self._execute, self._close = execute, close

    async def execute(self, statement: str) -> None:
        await answer(self._execute(statement))

    async def commit(self) -> None:
        await self._end("commit", "COMMIT")

    async def rollback(self) -> None:
        await self._end("rollback", "ROLLBACK")

    async def _end(self, method: str, statement: str) -> None:
        if hasattr(self.transaction, method):
            await answer(getattr(self.transaction, method)())
        elif self.transaction.is_in_transaction():
            await self.execute(statement)

    async def close(self) -> None:
        await answer(self._close())


async def answer(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


def of_sqlalchemy(url: str, driver: str) -> str:
    return url.partition("?")[0].replace("postgresql://", f"postgresql+{driver}://")


async def begin_asyncpg(url: str) -> Opened:
    connection = await asyncpg.connect(url)
    await connection.execute("BEGIN")
    return Opened(connection, connection.execute, connection.close)


async def begin_in_pool(url: str) -> Opened:
    pool = await asyncpg.create_pool(url, min_size=1)
    connection = await pool.acquire()
    await connection.execute("BEGIN")

    async def close() -> None:
        await pool.release(connection)
        await pool.close()

    return Opened(connection, connection.execute, close)


async def begin_psycopg(url: str) -> Opened:
    connection = await psycopg.AsyncConnection.connect(url)
    await connection.execute("SELECT 1")
    return Opened(connection, lambda statement: connection.execute(statement.encode()), connection.close)


async def begin_blocking_psycopg(url: str) -> Opened:
    connection = psycopg.connect(url)
    connection.execute("SELECT 1")
    return Opened(connection, lambda statement: connection.execute(statement.encode()).close(), connection.close)


async def begin_session(url: str) -> Opened:
    engine = sqlalchemy.create_engine(of_sqlalchemy(url, "psycopg"))
    session = sqlalchemy.orm.Session(engine)
    session.begin()

    def close() -> None:
        session.close()
        engine.dispose()

    return Opened(session, lambda statement: session.execute(sqlalchemy.text(statement)).close(), close)


async def _begin_async_session(url: str, driver: str) -> Opened:
    engine = sqlalchemy.ext.asyncio.create_async_engine(of_sqlalchemy(url, driver))
    session = sqlalchemy.ext.asyncio.AsyncSession(engine)
    _ = await session.begin()

    async def close() -> None:
        await session.close()
        await engine.dispose()

    return Opened(session, lambda statement: session.execute(sqlalchemy.text(statement)), close)


async def begin_asyncpg_session(url: str) -> Opened:
    return await _begin_async_session(url, "asyncpg")


async def begin_psycopg_session(url: str) -> Opened:
    return await _begin_async_session(url, "psycopg")


KINDS = {
    "asyncpg": begin_asyncpg,
    "asyncpg pool": begin_in_pool,
    "psycopg": begin_psycopg,
    "blocking psycopg": begin_blocking_psycopg,
    "Session": begin_session,
    "AsyncSession on asyncpg": begin_asyncpg_session,
    "AsyncSession on psycopg": begin_psycopg_session,
}
BLOCKING = {"blocking psycopg", "Session"}


class TestConformance(CompletionInTransactionConformance):
    pytestmark: ClassVar = [*PersistenceLayerConformance.pytestmark, pytest.mark.server]
    url: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _url(cls, server: PostgresServer) -> None:
        cls.url = server.url

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return PostgresPersistenceLayer(self.url, clock=clock)

    @contextlib.asynccontextmanager
    async def begun(self, trial: Any) -> AsyncGenerator[OpenTransaction]:
        opened = await begin_asyncpg(self.url)
        try:
            yield opened
        finally:
            await opened.close()


class TestConformanceThroughPgBouncer(TestConformance):
    """The layer's connections and the application's, both in transaction mode."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _url(cls, pgbouncer: PgBouncer) -> None:
        cls.url = pgbouncer.url


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def opened(kind: str, server: PostgresServer, client: Any) -> AsyncGenerator[Opened]:
    await client.execute("DROP TABLE IF EXISTS payments")
    await client.execute("CREATE TABLE payments (number serial)")
    opened = await KINDS[kind](server.url)
    yield opened
    await opened.close()


async def complete_in(layer: PostgresPersistenceLayer, opened: Opened, record: DataRecord, kind: str) -> bool:
    layer.check_transaction(opened.transaction, blocking=kind in BLOCKING)
    now = 1_800_000_000.0
    completion = layer.complete_in(opened.transaction, completed_of(record, now=now), now=now)
    if kind not in BLOCKING:
        return await completion
    with pytest.raises(StopIteration) as stopped:
        completion.send(None)
    return bool(stopped.value.value)


def test_the_layer_supports_completion_in_the_callers_transaction() -> None:
    assert isinstance(PostgresPersistenceLayer("postgresql://"), SupportsCompletionInTransaction)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("inserts_first", [True, False])
async def test_rows_and_outcome_are_committed_together_or_not_at_all(  # noqa: PLR0917 - fixtures
    layer: PostgresPersistenceLayer, client: Any, opened: Opened, kind: str, commits: bool, inserts_first: bool
) -> None:
    record = await claimed(layer)
    if inserts_first:
        await opened.execute(INSERT)
    assert await complete_in(layer, opened, record, kind)
    assert not await complete_in(layer, opened, record, kind)
    if not inserts_first:
        await opened.execute(INSERT)
    assert await layer.get("key") == record
    assert not await layer.is_free(record)
    await (opened.commit() if commits else opened.rollback())
    assert (await layer.get("key") == record) == (not commits)
    assert await layer.is_free(record) == (not commits)
    assert await client.fetchval("SELECT count(*) FROM payments") == commits


@pytest.mark.parametrize("ending", ["commit", "rollback"])
async def test_a_transaction_that_has_ended_is_refused(
    layer: PostgresPersistenceLayer, opened: Opened, kind: str, ending: str
) -> None:
    await getattr(opened, ending)()
    with pytest.raises(IdempotencyUsageError, match="no transaction is open on it"):
        layer.check_transaction(opened.transaction, blocking=kind in BLOCKING)


async def test_a_connection_that_is_closed_is_refused(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    for begin in (begin_asyncpg, begin_psycopg):
        opened = await begin(server.url)
        await opened.close()
        with pytest.raises(IdempotencyUsageError, match="the connection is closed"):
            layer.check_transaction(opened.transaction, blocking=False)


async def test_a_connection_that_was_given_back_to_its_pool_is_refused(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with asyncpg.create_pool(server.url, min_size=1) as pool:
        async with pool.acquire() as connection:
            pass
        with pytest.raises(IdempotencyUsageError, match="given back to its pool"):
            layer.check_transaction(connection, blocking=False)


async def test_psycopg_without_a_transaction_is_refused_also_while_it_is_busy_or_in_pipeline_mode(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with await psycopg.AsyncConnection.connect(server.url, autocommit=True) as connection:
        with pytest.raises(IdempotencyUsageError, match="no transaction is open on it"):
            layer.check_transaction(connection, blocking=False)
        async with connection.cursor() as cursor:
            async for _ in cursor.stream("SELECT 1"):
                with pytest.raises(IdempotencyUsageError, match="a statement is under way on it"):
                    layer.check_transaction(connection, blocking=False)
        async with connection.pipeline():
            with pytest.raises(IdempotencyUsageError, match="it is in pipeline mode"):
                layer.check_transaction(connection, blocking=False)


async def test_a_transaction_that_has_failed_is_refused(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    opened = await begin_psycopg(server.url)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await opened.execute("SELECT 1 / 0")
    with pytest.raises(IdempotencyUsageError, match="can only be rolled back"):
        layer.check_transaction(opened.transaction, blocking=False)
    await opened.close()


async def test_a_function_of_the_other_kind_is_refused(
    layer: PostgresPersistenceLayer, opened: Opened, kind: str
) -> None:
    with pytest.raises(IdempotencyUsageError, match="function transaction= takes"):
        layer.check_transaction(opened.transaction, blocking=kind not in BLOCKING)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_sqlalchemy_in_autocommit_mode_is_refused_before_anything_is_written(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any, driver: str
) -> None:
    record = await claimed(layer)
    url = of_sqlalchemy(server.url, driver)
    engine = sqlalchemy.ext.asyncio.create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection, connection.begin():
        opened = Opened(connection, connection.exec_driver_sql, connection.close)
        with pytest.raises(IdempotencyUsageError, match="AUTOCOMMIT mode: no transaction is open"):
            await complete_in(layer, opened, record, driver)
    await engine.dispose()
    assert await layer.get("key") == record


async def test_a_claim_that_another_transaction_holds_is_not_waited_for(
    layer: PostgresPersistenceLayer, server: PostgresServer, opened: Opened, kind: str
) -> None:
    record = await claimed(layer)
    other = await begin_asyncpg(server.url)
    assert await complete_in(layer, other, record, "asyncpg")
    async with asyncio.timeout(AT_ONCE_SECONDS):
        with pytest.raises(IdempotencyHeldByTransactionError, match="an open transaction holds"):
            await complete_in(layer, opened, record, kind)
    assert await layer.get("key") == record
    await other.close()
    assert await complete_in(layer, opened, record, kind)


async def test_a_claim_that_is_held_for_a_moment_is_completed(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    class Connection(asyncpg.Connection):
        async def execute(self, query: str, *arguments: Any, **options: Any) -> str:
            executed.append(query)
            status: str = await super().execute(query, *arguments, **options)
            if "pg_sleep" in query:
                await other.rollback()
            return status

    executed = list[str]()
    record = await claimed(layer)
    other = await begin_asyncpg(server.url)
    await other.execute("SELECT FROM aidem_records FOR UPDATE")
    connection = await asyncpg.connect(server.url, connection_class=Connection)
    async with connection.transaction():
        executed.clear()
        assert await layer.complete_in(connection, completed_of(record, now=1), now=1)
        assert len(executed) == 3
    await connection.close()
    await other.close()
    assert await layer.get("key") != record


async def test_a_call_is_told_that_another_transaction_holds_its_record(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with idempotency("o-1", persistence_store=layer) as execution:
        assert not execution.replayed
        holder, opened = await begin_asyncpg(server.url), await begin_asyncpg(server.url)
        await holder.execute("SELECT FROM aidem_records FOR UPDATE")
        with pytest.raises(IdempotencyUsageError, match="another transaction holds the record of this call"):
            await execution.complete(1, transaction=opened.transaction)
        await holder.rollback()
        await execution.complete(2, transaction=opened.transaction)
        await opened.commit()
        await holder.close()
        await opened.close()
    assert execution.result == 2


@pytest.mark.parametrize("factory", [psycopg.AsyncRawCursor, psycopg.AsyncClientCursor])
async def test_a_connection_whose_cursors_want_other_placeholders_is_completed_in(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any, factory: Any
) -> None:
    record = await claimed(layer)
    connection = await psycopg.AsyncConnection.connect(server.url, cursor_factory=factory)
    async with connection.transaction():
        assert await layer.complete_in(connection, completed_of(record, now=1), now=1)
    await connection.close()
    assert await layer.get("key") != record


async def test_a_database_without_the_table_is_refused(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any, kind: str
) -> None:
    record = await claimed(layer)
    url = await make_database(server, "elsewhere")
    opened = await KINDS[kind](url)
    with pytest.raises(IdempotencyUsageError, match=r"has no table .*aidem_records.* of aidem's"):
        layer.check_transaction(opened.transaction, blocking=kind in BLOCKING)
        await layer.complete_in(opened.transaction, completed_of(record, now=1), now=1)
    await opened.close()


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("SET LOCAL ROLE pg_monitor", 'run GRANT SELECT, UPDATE ON "aidem_records" TO'),
        ("SET TRANSACTION READ ONLY", "begin one that writes, on the primary"),
    ],
    ids=["rights", "read only"],
)
async def test_a_transaction_that_may_not_write_the_record_is_told_what_helps(  # noqa: PLR0917 - fixtures
    layer: PostgresPersistenceLayer, client: Any, opened: Opened, kind: str, setting: str, remedy: str
) -> None:
    record = await claimed(layer)
    await opened.execute(setting)
    with pytest.raises(Exception, match=r"permission denied|read-only transaction") as refused:
        await complete_in(layer, opened, record, kind)
    [note] = refused.value.__notes__
    assert remedy in note
    assert "try the transaction again" not in note


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_older_than_the_claim_finds_none_and_one_older_than_a_renewal_fails(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any, level: str
) -> None:
    for claims_first in (False, True):
        opened = await begin_asyncpg(server.url)
        await opened.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        if claims_first:
            record = await claimed(layer)
        await opened.execute("SELECT count(*) FROM aidem_records")
        if not claims_first:
            record = await claimed(layer)
            assert not await complete_in(layer, opened, record, "asyncpg")
            await layer.forget("key")
        else:
            assert await layer.renew(record.replace(expiry_timestamp=10**10), now=1) is not None
            with pytest.raises(asyncpg.SerializationError) as raised:
                await complete_in(layer, opened, record, "asyncpg")
            assert raised.value.__notes__ == [
                "aidem: the call is not completed; roll back, and try the transaction again in its body"
            ]
        await opened.close()


async def test_a_table_with_an_awkward_name_is_completed_in(server: PostgresServer, kind: str, client: Any) -> None:
    layer = PostgresPersistenceLayer(server.url, table="100% of ? records")
    await layer.create_table()
    record = await claimed(layer)
    opened = await KINDS[kind](server.url)
    assert await complete_in(layer, opened, record, kind)
    await opened.commit()
    await opened.close()
    assert await layer.get("key") != record
    await client.execute('DROP TABLE "100% of ? records"')
    await layer.aclose()


# --- Whole calls ----------------------------------------------------------------------------------------------------


async def test_a_call_is_completed_in_a_transaction_of_asyncpg(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    await client.execute("DROP TABLE IF EXISTS payments")
    await client.execute("CREATE TABLE payments (number serial)")
    for _ in range(2):
        async with idempotency("o-1", persistence_store=layer) as execution:
            if not execution.replayed:
                async with connected(server.url) as connection, connection.transaction():
                    number = await connection.fetchval(f"{INSERT} RETURNING number")
                    await execution.complete({"number": number}, transaction=connection)
        assert execution.result == {"number": 1}
    with pytest.raises(IdempotencyUsageError, match="still open"):
        async with idempotency("o-2", persistence_store=layer) as execution:
            assert not execution.replayed
            opened = await begin_asyncpg(server.url)
            await execution.complete(2, transaction=opened.transaction)
    await opened.commit()
    await opened.close()
    async with idempotency("o-2", persistence_store=layer) as execution:
        assert execution.result == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_and_outcome_are_committed_together_or_not_at_all_through_pgbouncer(
    pgbouncer: PgBouncer, client: Any, kind: str
) -> None:
    await client.execute("DROP TABLE IF EXISTS payments; CREATE TABLE payments (number serial)")
    layer = PostgresPersistenceLayer(pgbouncer.url)
    for commits in (False, True):
        record = await claimed(layer)
        opened = await KINDS[kind](pgbouncer.url)
        await opened.execute(INSERT)
        assert await complete_in(layer, opened, record, kind)
        assert not await layer.is_free(record)
        await (opened.commit() if commits else opened.rollback())
        await opened.close()
        assert (await layer.get("key") == record) == (not commits)
        assert await client.fetchval("SELECT count(*) FROM payments") == commits
        await layer.release(record)
    await layer.aclose()


async def test_a_new_transaction_is_tried_after_a_rollback_and_refused_while_the_earlier_one_is_open(
    layer: PostgresPersistenceLayer, server: PostgresServer, client: Any
) -> None:
    async with idempotency("o-1", persistence_store=layer) as execution:
        assert not execution.replayed
        first, second = await begin_asyncpg(server.url), await begin_asyncpg(server.url)
        await execution.complete(1, transaction=first.transaction)
        with pytest.raises(IdempotencyUsageError, match="called before, in a transaction that is still open"):
            await execution.complete(2, transaction=second.transaction)
        await first.rollback()
        await execution.complete(2, transaction=second.transaction)
        await second.commit()
        await first.close()
        await second.close()
    assert execution.result == 2


def test_an_ordinary_function_completes_in_a_transaction_of_psycopg(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(server.url)
    with psycopg.connect(server.url) as connection:
        connection.execute("TRUNCATE aidem_records")
    for _ in range(2):
        with sync.idempotency("o-1", persistence_store=layer) as execution:
            if not execution.replayed:
                with psycopg.connect(server.url) as connection, connection.transaction():
                    assert execution.complete(1, transaction=connection) == 1
        assert execution.result == 1
    sync.close()


@pytest.mark.parametrize("commits", [True, False])
async def test_no_check_is_asked_about_a_claim_that_an_open_transaction_holds(
    server: PostgresServer, client: Any, commits: bool
) -> None:
    layer = PostgresPersistenceLayer(server.url, clock=FakeClock())
    opened = await begin_asyncpg(server.url)

    async def begin() -> Opened:
        return opened

    await ask_about_a_held_claim(layer, begin, commits=commits)
    await opened.close()
    await layer.aclose()
