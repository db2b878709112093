"""Calls of ordinary functions that complete in a transaction of their own, on an SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
import sqlalchemy
import sqlalchemy.orm

from aidem import DataRecord, IdempotencyConfig, current_execution, sync
from aidem.exceptions import IdempotencyLeaseLostError, IdempotencyUsageError
from aidem.hooks import EventKind
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.planned import Listener
from tests.support.transactional import MemoryTransaction, TransactionalLayer

RECEIPT = {"number": 1}


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "application.sqlite3", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE payments (number INTEGER PRIMARY KEY)")
        yield connection


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[SQLitePersistenceLayer]:
    yield SQLitePersistenceLayer(tmp_path / "application.sqlite3", in_application_database=True)
    sync.close()


def paying(
    layer: SQLitePersistenceLayer, body: Callable[[], Any], key: str = "o-1", **options: Any
) -> Callable[[], Any]:
    @sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(**options), key_prefix="pay")
    def pay(order: str) -> Any:
        return body()

    return lambda: pay(key)


def current() -> sync.Execution:
    execution = current_execution()
    assert isinstance(execution, sync.Execution)
    return execution


def insert(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO payments DEFAULT VALUES")


def payments(connection: sqlite3.Connection) -> int:
    ((number,),) = connection.execute("SELECT count(*) FROM payments")
    return int(number)


def never() -> Any:
    raise AssertionError("this call is a replay")


def test_rows_and_outcome_are_committed_together(layer: SQLitePersistenceLayer, connection: sqlite3.Connection) -> None:
    listener = Listener()

    def pay() -> str:
        insert(connection)
        assert current().complete(RECEIPT, transaction=connection) == RECEIPT
        connection.execute("COMMIT")
        return "another"

    assert paying(layer, pay, hooks=(listener,))() == RECEIPT
    assert paying(layer, never)() == RECEIPT
    assert payments(connection) == 1
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED]


def test_a_block_is_completed_in_a_session_of_sqlalchemy(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection, tmp_path: Path
) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'application.sqlite3'}")
    for _ in range(2):
        with sync.idempotency("o-1", persistence_store=layer) as execution:
            if not execution.replayed:
                with sqlalchemy.orm.Session(engine) as session, session.begin():
                    session.execute(sqlalchemy.text("INSERT INTO payments DEFAULT VALUES"))
                    assert execution.complete(RECEIPT, transaction=session) == RECEIPT
        assert execution.result == RECEIPT
    engine.dispose()
    assert payments(connection) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("commits", [True, False])
def test_an_exception_leaves_the_outcome_or_releases_the_key(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection, error: type[BaseException], commits: bool
) -> None:
    def pay() -> None:
        insert(connection)
        current().complete(RECEIPT, transaction=connection)
        connection.execute("COMMIT" if commits else "ROLLBACK")
        raise error

    with pytest.raises(error):
        paying(layer, pay)()
    assert paying(layer, never if commits else lambda: "second")() == (RECEIPT if commits else "second")
    assert payments(connection) == commits


def test_a_transaction_that_is_open_or_rolled_back_is_an_error(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection
) -> None:
    def pay() -> None:
        insert(connection)
        current().complete(RECEIPT, transaction=connection)

    with pytest.raises(IdempotencyUsageError, match="still open; commit it before the body ends"):
        paying(layer, pay)()
    connection.execute("COMMIT")
    assert paying(layer, never)() == RECEIPT

    def roll_back() -> None:
        pay()
        connection.execute("ROLLBACK")

    with pytest.raises(IdempotencyUsageError, match="not committed but rolled back"):
        paying(layer, roll_back, "o-2")()
    assert paying(layer, lambda: "second", "o-2")() == "second"


def test_another_call_inside_the_transaction_is_refused_at_once(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection
) -> None:
    def pay() -> None:
        insert(connection)
        current().complete(RECEIPT, transaction=connection)
        with pytest.raises(IdempotencyUsageError, match="another idempotent call would wait for its end for ever"):
            paying(layer, never, "o-2")()
        connection.execute("COMMIT")

    paying(layer, pay)()
    assert paying(layer, lambda: "second", "o-2")() == "second"


def test_a_lost_lease_is_raised_in_the_transaction(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection
) -> None:
    def pay() -> None:
        connection.execute("UPDATE aidem_records SET owner = 'theirs'")
        insert(connection)
        try:
            current().complete(RECEIPT, transaction=connection)
        finally:
            connection.execute("ROLLBACK")

    with pytest.raises(IdempotencyLeaseLostError):
        paying(layer, pay)()
    assert payments(connection) == 0


def test_a_second_completion_is_refused_while_the_first_is_not_rolled_back(
    layer: SQLitePersistenceLayer, connection: sqlite3.Connection
) -> None:
    def pay() -> None:
        insert(connection)
        current().complete(RECEIPT, transaction=connection)
        with pytest.raises(IdempotencyUsageError, match="called before, in a transaction that is still open"):
            current().complete(RECEIPT, transaction=connection)
        connection.execute("ROLLBACK")
        insert(connection)
        current().complete({"number": 2}, transaction=connection)
        connection.execute("COMMIT")

    assert paying(layer, pay)() == {"number": 2}
    assert payments(connection) == 1


def test_what_must_be_awaited_and_what_is_no_dynamodb_is_refused(layer: SQLitePersistenceLayer) -> None:
    def pay() -> str:
        with pytest.raises(IdempotencyUsageError, match="in an ordinary function transaction= takes a sqlite3"):
            current().complete(RECEIPT, transaction=aiosqlite.Connection(lambda: sqlite3.connect(":memory:"), 1))
        with pytest.raises(IdempotencyUsageError, match="DynamoDBPersistenceLayer can"):
            current().completion_item(RECEIPT)
        with sync.idempotency("o-2", persistence_store=layer) as execution:
            with pytest.raises(IdempotencyUsageError, match="DynamoDBPersistenceLayer can"):
                execution.completion_item(RECEIPT)
            execution.result = 1
        return "paid"

    assert paying(layer, pay)() == "paid"


class AwaitingLayer(TransactionalLayer):
    """Awaits something although the driver of its transactions is a blocking one."""

    async def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        raise AssertionError("nothing runs this in a thread without an event loop")


def test_a_layer_that_awaits_in_a_blocking_transaction_is_found_out() -> None:
    layer = AwaitingLayer()

    @sync.idempotent_function(persistence_store=layer, key_prefix="pay")
    def pay(order: str) -> Any:
        return current().complete(RECEIPT, transaction=layer.begin())

    try:
        with pytest.raises(TypeError, match="the persistence layer awaits"):
            pay("o-1")
    finally:
        sync.close()
