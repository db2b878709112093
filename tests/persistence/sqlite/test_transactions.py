from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from sqlalchemy.dialects.sqlite import pysqlite

from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem.exceptions import (
    IdempotencyHeldByTransactionError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyUsageError,
)
from aidem.persistence import PersistenceLayer, SupportsCompletionInTransaction
from aidem.persistence.sqlite import SQLitePersistenceLayer, _records
from aidem.persistence.sqlite._file import DatabaseFile
from aidem.testing import (
    CompletionInTransactionConformance,
    FakeClock,
    OpenTransaction,
    PurgeConformance,
    ScanConformance,
    TakeOverConformance,
    claim_of,
    completed_of,
)
from tests.support.transactional import ask_about_a_held_claim

BUSY_TIMEOUT_SECONDS = 0.05


class Opened:
    """A transaction of a library, and how it is ended."""

    def __init__(
        self,
        transaction: Any,
        *,
        insert: Callable[[], Any],
        commit: Callable[[], Any],
        rollback: Callable[[], Any],
        close: Callable[[], Any],
    ) -> None:
        self.transaction = transaction
        self._insert, self._commit, self._rollback, self._close = insert, commit, rollback, close

    async def insert(self) -> None:
        await answer(self._insert())

    async def commit(self) -> None:
        await answer(self._commit())

    async def rollback(self) -> None:
        await answer(self._rollback())

    async def close(self) -> None:
        await answer(self._close())


async def answer(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


INSERT = "INSERT INTO payments DEFAULT VALUES"


async def begin_sqlite3(path: Path) -> Opened:
    connection = sqlite3.connect(path, isolation_level=None, timeout=1)
    connection.execute("BEGIN IMMEDIATE")
    return Opened(
        connection,
        insert=lambda: connection.execute(INSERT).close(),
        commit=connection.commit,
        rollback=connection.rollback,
        close=connection.close,
    )


async def begin_aiosqlite(path: Path) -> Opened:
    connection = await aiosqlite.connect(path, isolation_level=None, timeout=1)
    await connection.execute("BEGIN IMMEDIATE")
    return Opened(
        connection,
        insert=lambda: connection.execute(INSERT),
        commit=connection.commit,
        rollback=connection.rollback,
        close=connection.close,
    )


async def begin_session(path: Path) -> Opened:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    session = sqlalchemy.orm.Session(engine)
    session.begin()

    def close() -> None:
        session.close()
        engine.dispose()

    return Opened(
        session,
        insert=lambda: session.execute(sqlalchemy.text(INSERT)).close(),
        commit=session.commit,
        rollback=session.rollback,
        close=close,
    )


async def begin_connection(path: Path) -> Opened:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    connection = engine.connect()
    connection.begin()

    def close() -> None:
        connection.close()
        engine.dispose()

    return Opened(
        connection,
        insert=lambda: connection.execute(sqlalchemy.text(INSERT)).close(),
        commit=connection.commit,
        rollback=connection.rollback,
        close=close,
    )


async def begin_async_session(path: Path) -> Opened:
    engine = sqlalchemy.ext.asyncio.create_async_engine(f"sqlite+aiosqlite:///{path}")
    session = sqlalchemy.ext.asyncio.AsyncSession(engine)
    _ = await session.connection()

    async def close() -> None:
        await session.close()
        await engine.dispose()

    return Opened(
        session,
        insert=lambda: session.execute(sqlalchemy.text(INSERT)),
        commit=session.commit,
        rollback=session.rollback,
        close=close,
    )


async def begin_async_connection(path: Path) -> Opened:
    engine = sqlalchemy.ext.asyncio.create_async_engine(f"sqlite+aiosqlite:///{path}")
    connection = await engine.connect()
    _ = await connection.begin()

    async def close() -> None:
        await connection.close()
        await engine.dispose()

    return Opened(
        connection,
        insert=lambda: connection.execute(sqlalchemy.text(INSERT)),
        commit=connection.commit,
        rollback=connection.rollback,
        close=close,
    )


KINDS = {
    "sqlite3": begin_sqlite3,
    "aiosqlite": begin_aiosqlite,
    "Session": begin_session,
    "Connection": begin_connection,
    "AsyncSession": begin_async_session,
    "AsyncConnection": begin_async_connection,
}


class TestConformance(CompletionInTransactionConformance, TakeOverConformance, ScanConformance, PurgeConformance):
    @pytest.fixture(autouse=True, params=["wal", "delete"])
    def in_directory(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        self.path = tmp_path / "application.sqlite3"
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute(f"PRAGMA journal_mode = {request.param}")
            connection.execute("CREATE TABLE payments (number INTEGER PRIMARY KEY)")

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return SQLitePersistenceLayer(
            self.path, in_application_database=True, clock=clock, busy_timeout_seconds=BUSY_TIMEOUT_SECONDS
        )

    @contextlib.asynccontextmanager
    async def begun(self, trial: Any) -> AsyncIterator[OpenTransaction]:
        await trial.layer.open()
        opened = await begin_aiosqlite(self.path)
        try:
            yield opened
        finally:
            await opened.close()


# --- Each library ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "application.sqlite3"
    execute(path, "CREATE TABLE payments (number INTEGER PRIMARY KEY)", "PRAGMA journal_mode = WAL")
    return path


@pytest.fixture
async def layer(path: Path) -> AsyncIterator[SQLitePersistenceLayer]:
    async with SQLitePersistenceLayer(path, in_application_database=True, clock=FakeClock()) as layer:
        yield layer


@pytest.fixture(params=KINDS)
async def opened(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Opened]:
    opened = await KINDS[request.param](path)
    yield opened
    await opened.close()


def execute(path: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def payments(path: Path) -> int:
    ((number,),) = execute(path, "SELECT count(*) FROM payments")
    return int(number)


@contextlib.contextmanager
def writer(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction of the application that has the write lock."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


async def claimed(layer: SQLitePersistenceLayer, key: str = "key", *, owner: str = "ours") -> DataRecord:
    now = layer.clock()
    answer = await layer.acquire(claim_of(key, now=now, owner=owner), now=now)
    assert isinstance(answer, Claimed)
    return answer.record


async def complete_in(layer: SQLitePersistenceLayer, transaction: Any, record: DataRecord) -> bool:
    layer.check_transaction(transaction, blocking=False)
    return await layer.complete_in(transaction, completed_of(record, now=layer.clock()), now=layer.clock())


async def is_completed(layer: SQLitePersistenceLayer, key: str = "key") -> bool:
    record = await layer.get(key)
    return record is not None and record.response_data is not None


def test_a_layer_in_a_database_of_an_application_supports_completion_in_its_transactions(path: Path) -> None:
    assert isinstance(SQLitePersistenceLayer(path, in_application_database=True), SupportsCompletionInTransaction)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("inserts_first", [True, False])
async def test_rows_and_outcome_are_committed_together_or_not_at_all(
    layer: SQLitePersistenceLayer, path: Path, opened: Opened, commits: bool, inserts_first: bool
) -> None:
    record = await claimed_beside(layer, path, opened)
    if inserts_first:
        await opened.insert()
    assert await complete_in(layer, opened.transaction, record)
    if not inserts_first:
        await opened.insert()
    assert not await is_completed(layer)
    assert payments(path) == 0
    await (opened.commit() if commits else opened.rollback())
    assert await is_completed(layer) == commits
    assert payments(path) == commits


async def claimed_beside(layer: SQLitePersistenceLayer, path: Path, opened: Opened) -> DataRecord:
    """Claim a key, though the transaction may have the write lock already: as if it had been begun afterwards."""
    now = layer.clock()
    await opened.rollback()
    record = await claimed(layer)
    transaction = opened.transaction
    if isinstance(transaction, sqlite3.Connection | aiosqlite.Connection):
        await answer(transaction.execute("BEGIN IMMEDIATE"))
    else:
        await answer(transaction.begin())
    assert record.idempotency_key == "key"
    assert now == layer.clock()
    return record


@pytest.mark.parametrize("ending", ["commit", "rollback"])
async def test_a_transaction_that_has_ended_is_refused(
    layer: SQLitePersistenceLayer, opened: Opened, ending: str
) -> None:
    layer.check_transaction(opened.transaction, blocking=False)
    await getattr(opened, ending)()
    with pytest.raises(IdempotencyUsageError, match=r"no transaction is open on it; begin one"):
        layer.check_transaction(opened.transaction, blocking=False)


async def test_a_connection_that_is_closed_is_refused(layer: SQLitePersistenceLayer, opened: Opened) -> None:
    await opened.close()
    with pytest.raises(IdempotencyUsageError, match=r"the connection is closed|no transaction is open"):
        layer.check_transaction(opened.transaction, blocking=False)


async def test_a_session_whose_transaction_has_failed_is_refused(layer: SQLitePersistenceLayer, path: Path) -> None:
    opened = await begin_session(path)
    registry = sqlalchemy.orm.registry()

    @registry.mapped
    class Payment:
        __table__ = sqlalchemy.Table(
            "payments", registry.metadata, sqlalchemy.Column("number", sqlalchemy.Integer, primary_key=True)
        )

    opened.transaction.add_all([Payment(number=1), Payment(number=1)])  # type: ignore[call-arg]
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        opened.transaction.flush()
    with pytest.raises(IdempotencyUsageError, match="can only be rolled back"):
        layer.check_transaction(opened.transaction, blocking=False)
    await opened.close()


@pytest.mark.parametrize("other", [None, "connection", 1, Path], ids=repr)
@pytest.mark.parametrize("blocking", [True, False])
def test_anything_else_is_refused_with_what_to_pass(path: Path, other: object, blocking: bool) -> None:
    layer = SQLitePersistenceLayer(path, in_application_database=True)
    takes = "a sqlite3 connection, or" if blocking else "an aiosqlite or sqlite3 connection, or"
    with pytest.raises(IdempotencyUsageError, match=rf"transaction= takes {takes}.*; not an? "):
        layer.check_transaction(other, blocking=blocking)


class PsycopgConnection(psycopg.Connection[Any]):
    def __init__(self) -> None:
        """Connect to nothing."""

    def __del__(self, *_: object) -> None:
        """Complain of nothing."""


class AsyncPsycopgConnection(psycopg.AsyncConnection[Any]):
    def __init__(self) -> None:
        """Connect to nothing."""

    def __del__(self, *_: object) -> None:
        """Complain of nothing."""


OF_POSTGRESQL: dict[str, Callable[[], Any]] = {
    "psycopg": PsycopgConnection,
    "async psycopg": AsyncPsycopgConnection,
    "asyncpg": type(
        "AsyncpgConnection", (asyncpg.Connection,), {"__init__": lambda _: None, "__del__": lambda _: None}
    ),
    "Session": lambda: sqlalchemy.orm.Session(sqlalchemy.create_engine("postgresql+psycopg://")),
    "AsyncSession": lambda: sqlalchemy.ext.asyncio.AsyncSession(
        sqlalchemy.ext.asyncio.create_async_engine("postgresql+asyncpg://")
    ),
}


@pytest.mark.parametrize("kind", OF_POSTGRESQL)
def test_transactions_of_another_kind_of_database_are_refused(path: Path, kind: str) -> None:
    layer = SQLitePersistenceLayer(path, in_application_database=True)
    with pytest.raises(IdempotencyUsageError, match=r"not an? \w+ \w+ on postgresql"):
        layer.check_transaction(OF_POSTGRESQL[kind](), blocking=False)


async def test_an_ordinary_function_cannot_pass_a_transaction_that_must_be_awaited(
    layer: SQLitePersistenceLayer, opened: Opened
) -> None:
    is_async = "sync" in type(opened.transaction).__name__ or isinstance(opened.transaction, aiosqlite.Connection)
    if is_async:
        with pytest.raises(IdempotencyUsageError, match="in an ordinary function transaction= takes a sqlite3"):
            layer.check_transaction(opened.transaction, blocking=True)
    else:
        layer.check_transaction(opened.transaction, blocking=True)


async def test_a_blocking_transaction_is_completed_in_without_suspending(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    record = await claimed(layer)
    for begin in (begin_sqlite3, begin_session, begin_connection):
        opened = await begin(path)
        completion = layer.complete_in(opened.transaction, completed_of(record, now=1), now=1)
        with pytest.raises(StopIteration) as stopped:
            completion.send(None)
        assert stopped.value.value is True
        await opened.close()


@pytest.mark.parametrize("is_async", [True, False])
async def test_sqlalchemy_in_autocommit_mode_is_refused_before_anything_is_written(
    layer: SQLitePersistenceLayer, path: Path, is_async: bool
) -> None:
    record = await claimed(layer)
    opened = await (begin_async_connection if is_async else begin_connection)(path)
    await opened.rollback()
    await answer(opened.transaction.execution_options(isolation_level="AUTOCOMMIT"))
    await answer(opened.transaction.begin())
    with pytest.raises(IdempotencyUsageError, match="AUTOCOMMIT mode: no transaction is open"):
        await complete_in(layer, opened.transaction, record)
    assert await layer.get("key") == record
    await opened.close()


async def test_a_scoped_session_is_taken_as_the_session_that_it_stands_for(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    record = await claimed(layer)
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    session = sqlalchemy.orm.scoped_session(sqlalchemy.orm.sessionmaker(engine))
    session.execute(sqlalchemy.text(INSERT))
    assert await complete_in(layer, session, record)
    session.commit()
    session.remove()
    engine.dispose()
    assert await is_completed(layer)


async def test_a_transaction_of_sqlalchemy_in_which_nothing_was_executed_yet_is_begun(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    record = await claimed(layer)
    opened = await begin_async_session(path)
    assert await complete_in(layer, opened.transaction, record)
    await opened.rollback()
    assert await layer.get("key") == record
    await opened.close()


def test_a_driver_of_sqlalchemy_that_is_not_known_is_refused(path: Path) -> None:
    dialect = pysqlite.dialect()
    dialect.driver = "pysqlcipher"
    engine = sqlalchemy.create_engine("sqlite://", creator=lambda: sqlite3.connect(path))
    engine.dialect = dialect
    layer = SQLitePersistenceLayer(path, in_application_database=True)
    with pytest.raises(IdempotencyUsageError, match="uses the driver pysqlcipher; aidem knows pysqlite, aiosqlite,"):
        layer.check_transaction(sqlalchemy.orm.Session(engine), blocking=True)


# --- Other files, old snapshots, locked files -----------------------------------------------------------------------


def test_a_file_of_their_own_has_no_rows_to_commit_with(path: Path) -> None:
    layer = SQLitePersistenceLayer(path.with_name("records.sqlite3"))
    with writer(path) as connection, pytest.raises(IdempotencyUsageError, match="in_application_database=True"):
        layer.check_transaction(connection, blocking=True)


@pytest.mark.parametrize("begin", [begin_sqlite3, begin_aiosqlite, begin_session, begin_async_session])
async def test_a_transaction_on_another_file_is_refused(
    layer: SQLitePersistenceLayer, path: Path, begin: Callable[[Path], Awaitable[Opened]]
) -> None:
    record = await claimed(layer)
    opened = await begin(path.with_name("other.sqlite3"))
    with pytest.raises(IdempotencyUsageError, match=rf"the transaction is not on {path}, where the records are"):
        await complete_in(layer, opened.transaction, record)
    await opened.close()


async def test_a_transaction_on_another_file_with_records_finds_no_claim(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    record = await claimed(layer)
    other = path.with_name("other.sqlite3")
    async with SQLitePersistenceLayer(other, in_application_database=True, clock=layer.clock):
        opened = await begin_sqlite3(other)
        assert not await complete_in(layer, opened.transaction, record)
        await opened.close()


@pytest.mark.parametrize("begin", [begin_sqlite3, begin_async_connection])
async def test_a_snapshot_that_is_older_than_the_claim_is_refused(
    layer: SQLitePersistenceLayer, path: Path, begin: Callable[[Path], Awaitable[Opened]]
) -> None:
    opened = await begin(path)
    connection = opened.transaction
    if isinstance(connection, sqlite3.Connection):
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM payments")
    else:
        await connection.exec_driver_sql("BEGIN")
        await connection.exec_driver_sql("SELECT * FROM payments")
    record = await claimed(layer)
    with pytest.raises(IdempotencyUsageError, match=r"as it was before the last write.*BEGIN IMMEDIATE"):
        await complete_in(layer, connection, record)
    await opened.close()


async def test_an_error_of_the_driver_is_raised_as_it_is_with_a_note(layer: SQLitePersistenceLayer, path: Path) -> None:
    record = await claimed(layer)
    with writer(path), closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        with pytest.raises(sqlite3.OperationalError, match="database is locked") as raised:
            await complete_in(layer, connection, record)
    assert raised.value.__notes__ == [
        "aidem: the call is not completed; roll back, and try the transaction again in its body"
    ]


# --- The file of the application ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["wal", "delete"])
async def test_nothing_in_the_file_is_changed_but_tables_named_after_aidem_are_added(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "application.sqlite3"
    execute(path, f"PRAGMA journal_mode = {mode}", "PRAGMA user_version = 7", "PRAGMA application_id = 8")
    execute(path, "CREATE TABLE records (mine)", "INSERT INTO records VALUES (1)")
    async with SQLitePersistenceLayer(path, in_application_database=True) as layer:
        await claimed(layer)
    async with SQLitePersistenceLayer(path, in_application_database=True) as layer:
        assert await layer.get("key") is not None
    assert execute(path, "PRAGMA journal_mode") == [(mode,)]
    assert execute(path, "PRAGMA user_version") == [(7,)]
    assert execute(path, "PRAGMA application_id") == [(8,)]
    assert execute(path, "SELECT * FROM records") == [(1,)]
    tables = {name for (name,) in execute(path, "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
    assert {name for name in tables if not name.startswith("aidem_")} == {"records"}


async def test_a_file_that_does_not_exist_yet_is_made(tmp_path: Path) -> None:
    path = tmp_path / "application.sqlite3"
    async with SQLitePersistenceLayer(path, in_application_database=True) as layer:
        await claimed(layer)
    assert execute(path, "PRAGMA journal_mode") == [("delete",)]


async def test_tables_of_a_later_version_are_refused(layer: SQLitePersistenceLayer, path: Path) -> None:
    execute(path, "UPDATE aidem_schema SET version = 3")
    other = SQLitePersistenceLayer(path, in_application_database=True)
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"newer aidem \(schema 3\)"):
        await other.open()
    await other.aclose()


@pytest.mark.parametrize("table", ["aidem_records", "aidem_last_fence"])
async def test_tables_that_were_changed_are_refused(layer: SQLitePersistenceLayer, path: Path, table: str) -> None:
    execute(path, f"DROP TABLE {table}")
    with pytest.raises(IdempotencyPersistenceConfigError, match="its tables aidem_… were changed; drop them all"):
        await claimed(layer)


def test_a_database_of_an_application_is_refused_without_being_told(path: Path) -> None:
    layer = SQLitePersistenceLayer(path)
    with pytest.raises(IdempotencyPersistenceConfigError, match="or set in_application_database=True"):
        asyncio.run(layer.open())
    asyncio.run(layer.aclose())


@pytest.mark.parametrize("mode", ["wal", "delete"])
async def test_many_layers_that_open_one_file_at_once_make_its_tables_once(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "application.sqlite3"
    execute(path, f"PRAGMA journal_mode = {mode}", "CREATE TABLE payments (number)")
    layers = [SQLitePersistenceLayer(path, in_application_database=True) for _ in range(8)]
    await asyncio.gather(*(layer.open() for layer in layers))
    await asyncio.gather(*(layer.aclose() for layer in layers))
    assert execute(path, "SELECT * FROM aidem_schema") == [(2,)]


async def test_tables_that_others_make_at_the_last_moment_are_not_made_again(path: Path) -> None:
    class LateConnection(sqlite3.Connection):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            if statement == "BEGIN IMMEDIATE":
                with closing(file.connect()):
                    """Somebody else opens the file just before."""
            return super().execute(statement, *parameters)

    file = DatabaseFile(path, busy_timeout_seconds=1, is_of_application=True)
    with closing(file.connect()):
        execute(path, *[f"DROP TABLE aidem_{name}" for name in ("schema", "records", "last_fence")])
        with closing(sqlite3.connect(path, isolation_level=None, factory=LateConnection)) as late:
            file._prepare(late)
    assert execute(path, "SELECT * FROM aidem_schema") == [(2,)]


async def test_opening_a_file_whose_tables_are_there_does_not_wait_for_the_application(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    with writer(path):
        async with SQLitePersistenceLayer(path, in_application_database=True, timeout_seconds=20) as other:
            assert await other.get("key") is None


# --- While a transaction of the application writes ------------------------------------------------------------------


async def test_replays_are_read_while_the_application_writes(layer: SQLitePersistenceLayer, path: Path) -> None:
    record = await claimed(layer)
    outcome = completed_of(record, now=layer.clock())
    assert await layer.complete(outcome, now=layer.clock())
    with writer(path):
        waiting = layer.acquire(claim_of("other", now=layer.clock()), now=layer.clock())
        for _ in range(3):  # at once, and while another operation waits for the lock
            answer = await layer.acquire(claim_of("key", now=layer.clock(), owner="theirs"), now=layer.clock())
            assert isinstance(answer, Blocked)
            assert answer.record == await layer.get("key")
            assert await layer.complete(outcome, now=layer.clock())
            assert not await layer.release(record)
            assert not waiting.done()
    assert isinstance(await waiting, Claimed)


async def test_what_waits_for_the_application_fails_in_time_and_was_not_applied(path: Path) -> None:
    async with layer_in_a_hurry(path) as layer:
        done, held = await claimed(layer, "done"), await claimed(layer, "held")
        with writer(path):
            with pytest.raises(IdempotencyPersistenceConnectionError, match="locked") as raised:
                await claimed(layer, "new")
            assert not raised.value.may_be_applied
            with pytest.raises(IdempotencyPersistenceConnectionError, match="locked"):
                await layer.complete(completed_of(done, now=layer.clock()), now=layer.clock())
            with pytest.raises(IdempotencyHeldByTransactionError, match="keeps it locked"):
                await layer.renew(held.replace(expiry_timestamp=10**10), now=layer.clock())
            with pytest.raises(IdempotencyHeldByTransactionError):
                await layer.release(held)
            assert not await layer.is_free(held)
        assert await layer.get("held") == held
        assert await layer.get("new") is None
        assert await layer.is_free(held)


def layer_in_a_hurry(path: Path) -> SQLitePersistenceLayer:
    return SQLitePersistenceLayer(
        path, in_application_database=True, clock=FakeClock(), busy_timeout_seconds=BUSY_TIMEOUT_SECONDS
    )


async def test_a_renewal_waits_for_a_short_transaction(
    layer: SQLitePersistenceLayer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidem.persistence.sqlite.RENEWAL_SECONDS", 30.0)  # on a slow machine it is not so short
    record = await claimed(layer)
    with writer(path) as connection:
        renewal = layer.renew(record.replace(expiry_timestamp=10**10), now=layer.clock())
        await layer.get("key")
        connection.execute("COMMIT")
        assert (await renewal) is not None


async def test_a_renewal_does_not_wait_for_a_long_transaction(layer: SQLitePersistenceLayer, path: Path) -> None:
    record = await claimed(layer)
    with writer(path):
        asked = time.monotonic()
        with pytest.raises(IdempotencyHeldByTransactionError):
            await layer.renew(record.replace(expiry_timestamp=10**10), now=layer.clock())
        assert time.monotonic() - asked < layer._file.busy_timeout_seconds


async def test_a_claim_that_has_lapsed_counts_as_running_while_the_application_writes(path: Path) -> None:
    async with layer_in_a_hurry(path) as layer:
        record = await claimed(layer)
        assert isinstance(layer.clock, FakeClock)
        layer.clock.advance(3)
        with writer(path):
            answer = await layer.acquire(claim_of("key", now=layer.clock(), owner="theirs"), now=layer.clock())
        assert answer == Blocked(record)
        assert (await claimed(layer, owner="theirs")).owner == "theirs"


async def test_a_claim_in_doubt_is_not_taken_over_while_the_application_writes(path: Path) -> None:
    async with layer_in_a_hurry(path) as layer:
        claim = claim_of("key", now=layer.clock(), may_be_taken_over=False)
        record = (await layer.acquire(claim, now=layer.clock())).record
        assert isinstance(layer.clock, FakeClock)
        layer.clock.advance(3)
        theirs = claim_of("key", now=layer.clock(), owner="theirs")
        with writer(path):
            assert await layer.take_over(record, theirs, now=layer.clock()) is None
            assert not await layer.is_free(record)
        assert await layer.take_over(record, theirs, now=layer.clock()) is not None


@pytest.mark.parametrize("commits", [True, False])
async def test_no_check_is_asked_about_a_claim_that_an_open_transaction_holds(path: Path, commits: bool) -> None:
    opened = None

    async def begin() -> Opened:
        nonlocal opened
        opened = await begin_aiosqlite(path)
        return opened

    async with layer_in_a_hurry(path) as layer:
        await ask_about_a_held_claim(layer, begin, commits=commits)
    assert opened is not None
    await opened.close()


async def test_another_call_inside_a_transaction_that_has_completed_one_is_refused_at_once(
    layer: SQLitePersistenceLayer, path: Path, opened: Opened
) -> None:
    record = await claimed_beside(layer, path, opened)
    assert await complete_in(layer, opened.transaction, record)
    asked = time.monotonic()
    with pytest.raises(IdempotencyUsageError, match="would wait for its end for ever; commit it first"):
        await claimed(layer, "another")
    assert not await layer.is_free(record)
    assert time.monotonic() - asked < layer._file.busy_timeout_seconds
    await opened.commit()
    await claimed(layer, "another")


async def test_a_connection_that_others_use_after_the_look_refuses_no_call(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    opened = await begin_sqlite3(path)
    record = await claimed_beside(layer, path, opened)
    assert await complete_in(layer, opened.transaction, record)
    await opened.commit()
    await layer.get("key")
    opened.transaction.execute("BEGIN IMMEDIATE")  # by another task, which has the connection from a pool
    another = asyncio.ensure_future(claimed(layer, "another"))
    await asyncio.sleep(0)
    for _ in range(2):  # the second is answered after the claim was tried
        await layer.get("key")
    assert not another.done()
    await opened.commit()
    assert (await another).idempotency_key == "another"
    await opened.close()


async def test_another_task_waits_for_a_transaction_that_has_completed_a_call(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    opened = await begin_sqlite3(path)
    await opened.rollback()
    record = await claimed(layer)
    opened.transaction.execute("BEGIN IMMEDIATE")
    other = asyncio.create_task(claimed(layer, "another"))
    await asyncio.sleep(0)
    assert await complete_in(layer, opened.transaction, record)
    await layer.get("key")
    assert not other.done()
    await opened.commit()
    assert (await other).idempotency_key == "another"
    await opened.close()


async def test_closing_ends_when_the_application_has_ended_its_transaction(path: Path) -> None:
    layer = SQLitePersistenceLayer(path, in_application_database=True)
    await layer.open()
    with writer(path) as connection:
        waiting = layer.acquire(claim_of("key", now=1), now=1)
        await layer.get("key")
        closing_layer = asyncio.ensure_future(layer.aclose())
        done, _ = await asyncio.wait([closing_layer], timeout=0.05)
        assert not done
        connection.execute("COMMIT")
        await closing_layer
    assert isinstance(await waiting, Claimed)


async def test_what_fails_beside_what_waits_fails_alone(layer: SQLitePersistenceLayer, path: Path) -> None:
    with writer(path) as connection:
        waiting = layer.acquire(claim_of("key", now=1), now=1)
        with pytest.raises(UnicodeEncodeError):
            await layer.get("unencodable \ud800")
        connection.execute("COMMIT")
    assert isinstance(await waiting, Claimed)


# --- Without a write-ahead log --------------------------------------------------------------------------------------


@pytest.fixture
def path_without_log(path: Path) -> Path:
    execute(path, "PRAGMA journal_mode = DELETE")
    return path


async def test_without_a_log_even_reading_waits_for_a_commit(path_without_log: Path) -> None:
    async with layer_in_a_hurry(path_without_log) as layer:
        await claimed(layer)
        with closing(sqlite3.connect(path_without_log, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            with pytest.raises(IdempotencyPersistenceConnectionError, match="locked"):
                await layer.get("key")
            reading = layer.get("key")
            await asyncio.sleep(0.01)
            connection.execute("COMMIT")
        assert await reading is not None


async def test_without_a_log_a_commit_waits_for_readers(path_without_log: Path) -> None:
    async with SQLitePersistenceLayer(path_without_log, in_application_database=True) as layer:
        with closing(sqlite3.connect(path_without_log, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM payments")
            waiting = layer.acquire(claim_of("key", now=1), now=1)
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done
            connection.execute("COMMIT")
            assert isinstance(await waiting, Claimed)


async def test_tables_of_an_earlier_aidem_keep_their_records_and_get_the_columns_they_lack(path: Path) -> None:
    earlier = (
        *_records.Tables("aidem_").schema_steps[0],
        "CREATE TABLE aidem_schema (version INTEGER NOT NULL)",
        "INSERT INTO aidem_schema VALUES (1)",
        "INSERT INTO aidem_records (id, status, fence) VALUES ('old', 'COMPLETED', 7)",
    )
    execute(path, *earlier)
    for _opened in ("first", "again"):
        async with SQLitePersistenceLayer(path, in_application_database=True) as layer:
            old = await layer.get("old")
            assert old is not None
            assert (old.fence, old.note) == (7, None)
            await layer.acquire(claim_of("new", now=1, note="order 7"), now=1)
            new = await layer.get("new")
            assert new is not None
            assert new.note == "order 7"
    assert execute(path, "SELECT * FROM aidem_schema") == [(2,)]


async def test_a_claim_is_not_taken_over_while_a_transaction_has_the_lock(path: Path) -> None:
    layer = SQLitePersistenceLayer(path, in_application_database=True, busy_timeout_seconds=0.05)
    async with layer:
        now = layer.clock()
        found = (await layer.acquire(claim_of("key", now=now), now=now)).record
        ours = claim_of("key", now=now, owner="others")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            assert await layer.take_over(found, ours, now=now, force=True) is None
            connection.execute("COMMIT")
        assert await layer.take_over(found, ours, now=now, force=True) is not None


async def test_without_a_log_making_the_tables_waits_for_readers(path_without_log: Path) -> None:
    layer = SQLitePersistenceLayer(path_without_log, in_application_database=True)
    with closing(sqlite3.connect(path_without_log, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM payments")
        opening = asyncio.ensure_future(layer.open())
        done, _ = await asyncio.wait([opening], timeout=0.05)
        assert not done
        connection.execute("COMMIT")
        await opening
    await layer.aclose()
    assert execute(path_without_log, "SELECT * FROM aidem_schema") == [(2,)]
