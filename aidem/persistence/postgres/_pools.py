"""Pools of the user: asyncpg's, psycopg's, and SQLAlchemy's engine on either driver. They are never closed here.

A class is recognised among what is loaded: whoever has a pool has imported its library.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

from aidem._runtime.cancellation import as_task
from aidem.exceptions import IdempotencyError, IdempotencyPersistenceConfigError
from aidem.persistence.postgres import _errors
from aidem.persistence.postgres._questions import AGAIN, Reply, next_pause

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.postgres._questions import Question, Rows
    from aidem.persistence.postgres._table import Table

T = TypeVar("T")

Borrow: TypeAlias = "Callable[[], AbstractAsyncContextManager[Any]]"
Fetch: TypeAlias = "Callable[[Any, str, tuple[Any, ...]], Awaitable[Rows]]"


class GivenPool:
    """Answers questions on connections that a pool of the user lends."""

    def __init__(self, pool: object, table: Table, *, timeout_seconds: float) -> None:
        self._borrow, self._fetch = _ways(pool)
        self._table = table
        self._timeout_seconds = timeout_seconds
        # The connections of a pool belong to one event loop, and another thread would break them.
        self._loop: asyncio.AbstractEventLoop | None = getattr(
            pool, "_loop", None
        )  # asyncpg knows it before the first use
        self._unattended: set[asyncio.Future[None]] = set()

    def here(self) -> Self:
        """Return itself, on the event loop of the pool.

        Raises:
            IdempotencyPersistenceConfigError: This is another one.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop = loop
        if self._loop is not loop:
            raise IdempotencyPersistenceConfigError(
                "the pool belongs to another event loop; use the layer there, or give it a URL in place of the pool: "
                "it then connects by itself on every loop"
            )
        return self

    def ask_in_background(self, question: Question[None], failed: Callable[[BaseException], None]) -> None:
        """Ask a question whose answer nobody waits for; `failed` is told why there is none."""
        future = Context().run(self.ask, question)
        self._unattended.add(future)

        def ended(future: asyncio.Future[None]) -> None:
            self._unattended.discard(future)
            if (failure := future.exception()) is not None:
                failed(failure)

        future.add_done_callback(ended, context=Context())

    async def aclose(self) -> None:
        """Finish what was asked in the background, and leave the pool open."""
        if self._unattended:
            await asyncio.wait(self._unattended)

    def ask(self, question: Question[T]) -> UncancellableFuture[T]:
        """Ask, again where that makes sense.

        The future is settled in time. A pool may take longer: where the server is silent, some wait for it to cancel
        the statement before they take their connection back.
        """
        is_lent = asyncio.Event()
        future = as_task(self._translated(question, is_lent))

        def give_up() -> None:
            late = _errors.timed_out if is_lent.is_set() else _errors.none_was_lent
            future.fail(late(self._timeout_seconds))  # which cancels the task

        timer = future.get_loop().call_later(self._timeout_seconds, give_up, context=Context())
        future.add_done_callback(lambda _: timer.cancel(), context=Context())
        return future

    async def _translated(self, question: Question[T], is_lent: asyncio.Event) -> T:
        try:
            return await self._answer(question, is_lent)
        except IdempotencyError:
            raise
        except Exception as error:
            raise _errors.translated(error, self._table) from error

    async def _answer(self, question: Question[T], is_lent: asyncio.Event) -> T:
        deadline = time.monotonic() + self._timeout_seconds
        asked_again = found_held = 0
        while True:
            failure: Exception = _errors.stayed_locked(self._timeout_seconds)
            try:
                is_lent.clear()
                rows = await self._rows(question, is_lent)
            except Exception as error:
                if not _errors.is_worth_another_try(error):
                    raise
                failure = error
            else:
                answer = question.read(Reply.of(rows, found_held=found_held))
                if answer is not AGAIN:
                    return answer
                found_held += 1
            remaining = deadline - time.monotonic()
            pause = next_pause(asked_again, remaining_seconds=remaining, timeout_seconds=self._timeout_seconds)
            if pause is None:
                raise failure
            await asyncio.sleep(pause)
            asked_again += 1

    async def _rows(self, question: Question[Any], is_lent: asyncio.Event) -> Rows:
        async with contextlib.AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self._borrow())
            except Exception as error:
                if type(error).__name__ in {"InterfaceError", "PoolClosed"}:
                    raise IdempotencyPersistenceConfigError(
                        "the pool is closed, or was not opened; open it before the layer is used, and close it after"
                    ) from error
                raise _errors.connecting_failed(error, self._table, timeout_seconds=self._timeout_seconds) from error
            is_lent.set()
            return await self._fetch(connection, question.statement.text, question.arguments)


def _ways(pool: object) -> tuple[Borrow, Fetch]:
    """Return how a pool lends a connection, and how that executes a statement.

    Raises:
        IdempotencyPersistenceConfigError: It is none of the pools that are supported.
    """
    known: Any = pool
    if _is_a(pool, "asyncpg", "Pool"):
        return known.acquire, _fetch_by_asyncpg
    if _is_a(pool, "psycopg_pool", "AsyncConnectionPool"):
        return known.connection, _fetch_by_psycopg
    if _is_a(pool, "sqlalchemy.ext.asyncio", "AsyncEngine"):
        driver = {"asyncpg": _fetch_by_asyncpg, "psycopg": _fetch_by_psycopg}.get(known.dialect.driver.split("_")[0])
        if driver is not None:
            return partial(_of_engine, known), driver
    raise IdempotencyPersistenceConfigError(
        "pool takes an asyncpg.Pool, a psycopg_pool.AsyncConnectionPool or a sqlalchemy.ext.asyncio.AsyncEngine on "
        f"asyncpg or psycopg, not {type(pool).__module__}.{type(pool).__qualname__}"
    )


def _is_a(value: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


@contextlib.asynccontextmanager
async def _of_engine(engine: Any) -> AsyncGenerator[Any]:
    """Lend the driver's own connection, on which SQLAlchemy begins no transaction, nor sees that it has failed."""
    async with engine.connect() as connection:
        try:
            yield (await connection.get_raw_connection()).driver_connection
        except Exception as error:
            if _errors.spoils_connection(error) or _errors.ends_session(error):
                await connection.invalidate()
            raise


async def _fetch_by_asyncpg(connection: Any, text: str, arguments: tuple[Any, ...]) -> Rows:
    rows: Rows = await connection.fetch(text, *arguments)
    return rows


async def _fetch_by_psycopg(connection: Any, text: str, arguments: tuple[Any, ...]) -> Rows:
    """Execute outside of a transaction: that takes one round trip in place of three."""
    import psycopg
    from psycopg.rows import tuple_row

    was_autocommit = connection.autocommit
    await connection.set_autocommit(True)
    try:
        async with psycopg.AsyncRawCursor(connection, row_factory=tuple_row) as cursor:
            await cursor.execute(text.encode(), arguments)
            rows: Rows = await cursor.fetchall() if cursor.description else ()
    finally:
        with contextlib.suppress(psycopg.Error):  # it is broken, and whoever lent it will notice
            await connection.set_autocommit(was_autocommit)
    return rows
