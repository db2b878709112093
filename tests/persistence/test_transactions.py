"""Transactions of PostgreSQL's drivers, recognised and written in; the connections here are connected to nothing."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

from aidem.exceptions import IdempotencyUsageError
from aidem.persistence._transactions import recognised

STATEMENT = 'UPDATE "100% of ? records" SET data = ?::text WHERE id = ?::text'
VALUES = ("data", "key")


def disconnected(kind: type[Any], **members: Any) -> Any:
    """Return a connection of a library that has no server."""
    nothing = {"__init__": lambda _: None, "__del__": lambda *_: None, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), nothing | members)()


def asyncpg_connection(*, is_closed: bool = False, is_open: bool = True) -> Any:
    async def execute(_: Any, *arguments: Any) -> str:
        executed.append(arguments)
        return "UPDATE 1"

    executed = list[Any]()
    return disconnected(
        asyncpg.Connection,
        is_closed=lambda _: is_closed,
        is_in_transaction=lambda _: is_open,
        execute=execute,
        executed=executed,
    )


def psycopg_connection(
    kind: type[Any] = psycopg.Connection, *, closed: bool = False, status: str = "INTRANS", pipeline: str = "OFF"
) -> Any:
    info = SimpleNamespace(
        transaction_status=SimpleNamespace(name=status), pipeline_status=SimpleNamespace(name=pipeline)
    )
    return disconnected(kind, closed=closed, info=info)


async def test_a_statement_has_the_placeholders_of_asyncpg() -> None:
    connection = asyncpg_connection()
    assert await recognised(connection, database="postgresql").execute(STATEMENT, VALUES) == 1
    assert connection.executed == [
        ('UPDATE "100% of ? records" SET data = $1::text WHERE id = $2::text', "data", "key"),
    ]


def test_an_open_transaction_is_told_from_one_that_has_ended() -> None:
    for connection, is_open in (
        (asyncpg_connection(), True),
        (psycopg_connection(), True),
    ):
        assert recognised(connection, database="postgresql").is_open() == is_open


@pytest.mark.parametrize(
    ("connection", "fault"),
    [
        (asyncpg_connection(is_closed=True), "the connection is closed"),
        (asyncpg_connection(is_open=False), "no transaction is open on it"),
        (psycopg_connection(closed=True), "the connection is closed"),
        (psycopg_connection(status="IDLE"), "no transaction is open on it"),
        (psycopg_connection(status="INERROR"), "it can only be rolled back"),
        (psycopg_connection(status="ACTIVE"), "a statement is under way on it"),
        (psycopg_connection(pipeline="ON"), "it is in pipeline mode"),
    ],
    ids=["closed asyncpg", "idle asyncpg", "closed psycopg", "idle psycopg", "failed psycopg", "busy", "pipeline"],
)
def test_a_connection_that_cannot_be_used_is_refused(connection: Any, fault: str) -> None:
    with pytest.raises(IdempotencyUsageError, match=f"cannot be used: .*{fault}"):
        recognised(connection, database="postgresql")


@pytest.mark.parametrize("blocking", [True, False])
def test_functions_of_each_kind_are_told_what_they_can_pass(blocking: bool) -> None:
    takes = "a psycopg Connection, or" if blocking else "an asyncpg connection, a psycopg AsyncConnection, or"
    of_other_kind = psycopg_connection(psycopg.AsyncConnection if blocking else psycopg.Connection)
    with pytest.raises(IdempotencyUsageError, match=f"function transaction= takes {takes}"):
        recognised(of_other_kind, database="postgresql", blocking=blocking)


@pytest.mark.parametrize(
    ("transaction", "named"),
    [(asyncpg_connection(), "an asyncpg Connection"), ("begun", "a str"), (7, "an int"), (b"", "a bytes")],
)
def test_what_was_passed_is_named(transaction: object, named: str) -> None:
    with pytest.raises(IdempotencyUsageError, match=rf"not ({named})( on postgresql)?$"):
        recognised(transaction, database="sqlite", blocking=False)


def test_a_session_that_is_not_bound_to_one_database_is_told_what_to_pass() -> None:
    engine = sqlalchemy.create_engine("sqlite://")

    class Routing(sqlalchemy.orm.Session):
        def get_bind(self, mapper: Any = None, **_: Any) -> Any:
            return {"payments": engine}[mapper]

    for session in (sqlalchemy.orm.Session(binds={sqlalchemy.table("payments"): engine}), Routing()):
        session.begin()
        with pytest.raises(IdempotencyUsageError, match=r"not bound to one database.* session\.connection\("):
            recognised(session, database="sqlite", blocking=True)
        session.close()
    with engine.connect() as connection, connection.begin():
        assert recognised(connection, database="sqlite", blocking=True).database == "sqlite"
    engine.dispose()


async def test_the_part_of_an_async_session_or_connection_that_is_not_async_is_told_from_it() -> None:
    engine = sqlalchemy.ext.asyncio.create_async_engine("postgresql+asyncpg://")
    session = sqlalchemy.ext.asyncio.AsyncSession(engine)
    _ = session.sync_session.begin()
    recognised(session, database="postgresql", blocking=False)
    with pytest.raises(IdempotencyUsageError, match="belongs to an AsyncSession or AsyncConnection; pass that one"):
        recognised(session.sync_session, database="postgresql", blocking=False)
    await session.close()


@pytest.mark.parametrize("database", ["postgresql", "sqlite"])
def test_what_interrupts_the_look_at_a_transaction_is_not_taken_for_a_closed_connection(database: str) -> None:
    def interrupted(_: Any) -> Any:  # as by a signal handler
        raise TimeoutError

    connection = asyncpg_connection()
    type(connection).is_in_transaction = interrupted
    if database == "sqlite":
        connection = disconnected(sqlite3.Connection, in_transaction=property(interrupted))
    with pytest.raises(TimeoutError):
        recognised(connection, database=database)


async def test_a_connection_that_was_not_awaited_is_told_to_be() -> None:
    engine = sqlalchemy.ext.asyncio.create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(IdempotencyUsageError, match=r"not started; await it, or use it in `async with"):
        recognised(engine.connect(), database="sqlite", blocking=False)
    await engine.dispose()
