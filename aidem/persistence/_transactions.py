"""The transactions that users pass to `execution.complete`: recognised, checked, and written in.

Nothing is imported here: an object of a library is only there where that library is loaded.
"""

from __future__ import annotations

import inspect
import re
import sys
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Transaction(Protocol):
    """A transaction of the user's, in one shape for all libraries."""

    @property
    def database(self) -> str:
        """The kind of database, as SQLAlchemy calls it: `sqlite` or `postgresql`."""
        ...

    @property
    def is_blocking(self) -> bool:
        """Whether it is for ordinary functions."""
        ...

    def fault(self) -> str | None:
        """Say why nothing can be written in it, as far as that is known without asking the database."""
        ...

    def is_open(self) -> bool:
        """Whether it is neither committed nor rolled back."""
        ...

    async def execute(self, statement: str, parameters: Sequence[object]) -> int:
        """Execute a statement with a `?` for each parameter; return how many rows it has changed or selected.

        A blocking one never suspends.
        """
        ...


CLOSED: Final = "the connection is closed, or was given back to its pool"
NOT_BEGUN: Final = (
    "no transaction is open on it; begin one, write your rows in it, and call complete() as the last statement before "
    "the commit"
)
FAILED: Final = "its transaction has failed, so it can only be rolled back; begin another one inside the block"
OF_ASYNC: Final = "it belongs to an AsyncSession or AsyncConnection; pass that one"
BUSY: Final = (
    "a statement is under way on it, or it is in pipeline mode; wait until that has ended, and call complete() as the "
    "last statement before the commit"
)


def recognised(transaction: object, *, database: str, blocking: bool | None = None) -> Transaction:
    """Return the open transaction that a user has passed.

    Args:
        transaction: What was passed.
        database: Which kind of database holds the records: `sqlite` or `postgresql`.
        blocking: Whether an ordinary function passes it. Default: None, which takes a transaction for either.

    Raises:
        IdempotencyUsageError: It is no open transaction on such a database, for such a function; the message says
            what to pass.
    """
    known = _known(transaction)
    is_for_either = blocking is None or (database == "sqlite" and not blocking)  # sqlite3 has nothing to wait for
    if known is None or known.database != database or not (is_for_either or known.is_blocking is blocking):
        what = _named(transaction) if known is None else f"{_named(transaction)} on {known.database}"
        caller = "an ordinary function" if blocking else "an async function"
        raise IdempotencyUsageError(
            f"in {caller} transaction= takes {_TAKES[database, bool(blocking)]}, on the database that holds the "
            f"records; not {what}"
        )
    fault = known.fault()
    if fault is not None:
        raise IdempotencyUsageError(f"transaction= got {_named(transaction)} that cannot be used: {fault}")
    return known


_TAKES: Final = {
    ("sqlite", True): "a sqlite3 connection, or a SQLAlchemy Session or Connection on one",
    ("sqlite", False): (
        "an aiosqlite or sqlite3 connection, or a SQLAlchemy AsyncSession, AsyncConnection, Session or Connection on "
        "one of them"
    ),
    ("postgresql", True): "a psycopg Connection, or a SQLAlchemy Session or Connection on psycopg",
    ("postgresql", False): (
        "an asyncpg connection, a psycopg AsyncConnection, or a SQLAlchemy AsyncSession or AsyncConnection on either"
    ),
}


def _named(transaction: object) -> str:
    kind = type(transaction)
    name = f"{kind.__module__.partition('.')[0]} {kind.__name__}".removeprefix("builtins ")
    return f"an {name}" if name.startswith(tuple("aeiou")) else f"a {name}"


class _SQLite3:
    """A connection of the standard library."""

    database: str = "sqlite"
    is_blocking: bool = True

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def opening(self) -> str | None:
        """BEGIN IMMEDIATE: a statement follows that writes."""
        return None if self._connection.isolation_level is None else "BEGIN IMMEDIATE"

    def fault(self) -> str | None:
        try:
            return None if self._connection.in_transaction else NOT_BEGUN
        except (sys.modules["sqlite3"].Error, ValueError):  # the latter of aiosqlite
            return CLOSED

    def is_open(self) -> bool:
        return self.fault() is None

    async def execute(self, statement: str, parameters: Sequence[object]) -> int:
        cursor = await _answer(self._connection.execute(statement, parameters))
        rows: int = cursor.rowcount
        await _answer(cursor.close())
        return rows


class _AioSQLite(_SQLite3):
    """A connection of aiosqlite, which has the same methods."""

    is_blocking = False


class _Asyncpg:
    """A connection of asyncpg, as it is or as its pool hands it out."""

    database: str = "postgresql"
    is_blocking: bool = False
    opening: ClassVar[str | None] = "SELECT 1"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def fault(self) -> str | None:
        try:
            if self._connection.is_closed():
                return CLOSED
            return None if self._connection.is_in_transaction() else NOT_BEGUN
        except sys.modules["asyncpg"].InterfaceError:  # it was given back to its pool
            return CLOSED

    def is_open(self) -> bool:
        return self.fault() is None

    async def execute(self, statement: str, parameters: Sequence[object]) -> int:
        status = await self._connection.execute(_in_style_of("asyncpg", statement), *parameters)
        return int(status.rpartition(" ")[2])


class _Psycopg:
    """A connection of psycopg 3."""

    database: str = "postgresql"
    is_blocking: bool = True
    opening: ClassVar[str | None] = "SELECT 1"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def fault(self) -> str | None:
        if self._connection.closed:
            return CLOSED
        info = self._connection.info
        if info.pipeline_status.name != "OFF":
            return BUSY  # how many rows a statement has changed is known too late
        return {"IDLE": NOT_BEGUN, "ACTIVE": BUSY, "INERROR": FAILED}.get(info.transaction_status.name)

    def is_open(self) -> bool:
        return self.fault() is None

    async def execute(self, statement: str, parameters: Sequence[object]) -> int:
        # Those that the connection makes may be of a cursor_factory that wants other placeholders, such as RawCursor.
        psycopg = sys.modules["psycopg"]
        cursor = (psycopg.Cursor if self.is_blocking else psycopg.AsyncCursor)(self._connection)
        await _answer(cursor.execute(_in_style_of("psycopg", statement), parameters))
        rows: int = cursor.rowcount
        return rows


class _AsyncPsycopg(_Psycopg):
    """A connection of psycopg 3 for asyncio."""

    is_blocking = False


_DRIVERS: Final[dict[str, type[_SQLite3 | _Asyncpg | _Psycopg]]] = {
    "pysqlite": _SQLite3,
    "aiosqlite": _AioSQLite,
    "asyncpg": _Asyncpg,
    "psycopg": _Psycopg,
}
"""By the name that SQLAlchemy has for the driver."""


class _SQLAlchemy:
    """A session or a connection of SQLAlchemy, on one of the drivers above.

    Statements go through SQLAlchemy, which may not have begun the driver's transaction yet.
    """

    def __init__(self, transaction: Any) -> None:
        if hasattr(transaction, "registry"):  # it stands for the session of this thread or task
            transaction = transaction.registry()
        self._transaction = transaction
        self._is_session = hasattr(transaction, "get_bind")
        self._driver_connection: _SQLite3 | _Asyncpg | _Psycopg | None = None
        try:
            dialect = (transaction.get_bind() if self._is_session else transaction).dialect
        except Exception as error:  # also what a get_bind of the user's raises
            what_to_do = "it is not started; await it, or use it in `async with engine.connect() as connection:`"
            if self._is_session:
                what_to_do = (
                    "it is not bound to one database, as of its own binds or get_bind(); pass "
                    "session.connection(bind_arguments=...), the connection to the database that holds the records"
                )
            raise IdempotencyUsageError(f"transaction= got {_named(transaction)}: {what_to_do}") from error
        self.database: str = dialect.name
        self.is_blocking: bool = not dialect.is_async
        self._driver: str = dialect.driver

    def fault(self) -> str | None:
        if self._driver not in _DRIVERS:
            return f"SQLAlchemy uses the driver {self._driver}; aidem knows {', '.join(_DRIVERS)}"
        if not self.is_blocking and not hasattr(
            self._transaction, "sync_session" if self._is_session else "sync_connection"
        ):
            return OF_ASYNC
        if not self._is_session and self._transaction.closed:
            return CLOSED
        if not self._transaction.in_transaction():
            return NOT_BEGUN
        return None if not self._is_session or self._transaction.is_active else FAILED

    def is_open(self) -> bool:
        driver = self._driver_connection
        return driver is not None and self.fault() is None and driver.is_open()

    async def execute(self, statement: str, parameters: Sequence[object]) -> int:
        connection = self._transaction
        if self._is_session:
            connection = await _answer(connection.connection())
        raw = connection.connection if self.is_blocking else await connection.get_raw_connection()
        driver = self._driver_connection = _DRIVERS[self._driver](raw.driver_connection)
        if not driver.is_open() and driver.opening is not None:
            await _answer(connection.exec_driver_sql(driver.opening))
        if not driver.is_open():
            raise IdempotencyUsageError(f"transaction= got SQLAlchemy in AUTOCOMMIT mode: {NOT_BEGUN}")
        result = await _answer(connection.exec_driver_sql(_in_style_of(self._driver, statement), tuple(parameters)))
        rows: int = result.rowcount
        result.close()
        return rows


async def _answer(answer: Any) -> Any:
    """Wait for what may be awaitable: a blocking connection answers at once."""
    return await answer if inspect.isawaitable(answer) else answer


def _in_style_of(driver: str, statement: str) -> str:
    """Return a statement with the placeholders of a driver: of PostgreSQL's, each has its type, as in `?::text`."""
    if driver == "asyncpg":
        number = count(1)
        return re.sub(r"\?(?=::)", lambda _: f"${next(number)}", statement)
    return re.sub(r"\?(?=::)", "%s", statement.replace("%", "%%")) if driver == "psycopg" else statement


_KINDS: Final = (
    ("sqlite3", "Connection", _SQLite3),
    ("aiosqlite", "Connection", _AioSQLite),
    ("asyncpg", "Connection", _Asyncpg),
    ("asyncpg.pool", "PoolConnectionProxy", _Asyncpg),
    ("psycopg", "Connection", _Psycopg),
    ("psycopg", "AsyncConnection", _AsyncPsycopg),
    ("sqlalchemy.engine", "Connection", _SQLAlchemy),
    ("sqlalchemy.orm", "Session", _SQLAlchemy),
    ("sqlalchemy.orm", "scoped_session", _SQLAlchemy),
    ("sqlalchemy.ext.asyncio", "AsyncConnection", _SQLAlchemy),
    ("sqlalchemy.ext.asyncio", "AsyncSession", _SQLAlchemy),
    ("sqlalchemy.ext.asyncio", "async_scoped_session", _SQLAlchemy),
)
"""Module and name of every class that is known. Where the module is not loaded, nobody can have passed one."""


def _known(transaction: object) -> _SQLite3 | _Asyncpg | _Psycopg | _SQLAlchemy | None:
    for module, name, kind in _KINDS:
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and isinstance(transaction, known):
            return kind(transaction)
    return None
