"""Connections of our own, a few for each event loop: made when they are needed, and again after they broke.

A connection that is idle is used at once. When all of them are busy, questions queue up, and each connection goes on
with the next one as soon as it has the answer to the last, without a reset in between, for nothing is left behind on
it. So there is one task for each busy connection, none for an idle one, and none for a question.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

import asyncpg

from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence._errors import copy_of
from aidem.persistence.postgres import _errors
from aidem.persistence.postgres._questions import AGAIN, Question, Reply, next_pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem.persistence.postgres._questions import Rows
    from aidem.persistence.postgres._statements import Statement
    from aidem.persistence.postgres._table import Table

T = TypeVar("T")

LOOKED_AT_AFTER_SECONDS: Final = 1.0
"""After how long a connection that was idle is looked at before it is used."""

KEPT_IDLE_SECONDS: Final = 60.0
"""After how long an idle connection is closed: servers have few, and networks forget those that say nothing."""

NEXT_TRY_SECONDS: Final = 1.0
"""After how long one more connection is tried again, when the server had none to spare."""

CLOSING_SECONDS: Final = 1.0

_HELLO: Final = "SELECT pg_backend_pid(), pg_is_in_recovery()"


class _Connection(asyncpg.Connection):
    """A connection that leaves the server alone when it is finalized in a forked child: the socket is the parent's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._made_in = os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self._made_in:
            super().__del__()


class OwnConnection:
    """A connection with its prepared statements.

    Attributes:
        driver: asyncpg's connection.
        idle_since: In seconds of the loop's clock.
    """

    __slots__ = ("_prepared", "_prepares", "driver", "idle_since")

    def __init__(self, driver: asyncpg.Connection, *, prepares: bool) -> None:
        self.driver = driver
        self.idle_since = 0.0
        self._prepares = prepares
        self._prepared: dict[str, Any] = {}

    async def fetch(self, statement: Statement, arguments: tuple[Any, ...], *, timeout_seconds: float) -> Rows:
        """Execute a statement; prepared statements take one round trip, others two."""
        if not self._prepares:
            return await self.driver.fetch(statement.text, *arguments, timeout=timeout_seconds)
        prepared = self._prepared.get(statement.name)
        if prepared is None:
            prepared = await self.driver.prepare(statement.text, name=statement.name, timeout=timeout_seconds)
            self._prepared[statement.name] = prepared
        rows: Rows = await prepared.fetch(*arguments, timeout=timeout_seconds)
        return rows


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    """A question and who waits for its answer.

    Attributes:
        deadline: Until when it may be answered, in seconds of the loop's clock.
        asked_again: How often it was asked again.
        found_held: How often the record was found to be held.
    """

    future: UncancellableFuture[T]
    question: Question[T]
    deadline: float
    asked_again: int = 0
    found_held: int = 0


class OwnConnections:
    """Answers questions from anywhere in one event loop."""

    def __init__(
        self,
        url: str,
        table: Table,
        *,
        max_connections: int,
        prepared_statements: bool | None,
        timeout_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._url = url
        self._table = table
        self._max_connections = max_connections
        self._prepared_statements = prepared_statements
        self._timeout_seconds = timeout_seconds
        self._open: set[OwnConnection] = set()
        self._idle: list[OwnConnection] = []  # used last is used first, so that those that are too many stay idle
        self._jobs: deque[_Job[Any]] = deque()
        self._paused: set[_Job[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._next_try_at = 0.0
        self._sweep_timer: asyncio.TimerHandle | None = None

    def ask(self, question: Question[T]) -> UncancellableFuture[T]:
        """Ask as soon as a connection is free; the future is settled, whatever happens."""
        future: UncancellableFuture[T] = UncancellableFuture(loop=self._loop)
        self._enqueue(_Job(future, question, self._loop.time() + self._timeout_seconds))
        return future

    def ask_in_background(self, question: Question[None], failed: Callable[[BaseException], None]) -> None:
        """Ask a question whose answer nobody waits for; `failed` is told why there is none."""

        def ended(future: asyncio.Future[None]) -> None:
            failure = future.exception()
            if failure is not None:
                failed(failure)

        self.ask(question).add_done_callback(ended, context=Context())

    async def aclose(self) -> None:
        """Finish what was asked so far, then close all connections."""
        while pending := [*self._tasks, *(job.future for job in self._paused)]:
            await asyncio.wait(pending)
        for connection in list(self._open):
            self._drop(connection, gently=True)
        if self._closings:
            await asyncio.wait(self._closings)
        await self.abort()

    async def abort(self) -> None:
        """Close all connections now."""
        closed = IdempotencyPersistenceConnectionError("the persistence layer was closed")
        self._jobs.extend(self._paused)
        self._fail_all(closed)
        tasks = [*self._tasks, *self._closings]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self._open):
            self._drop(connection)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        await asyncio.sleep(0)  # until their sockets are closed

    # --- Questions --------------------------------------------------------------------------------------------------

    def _enqueue(self, job: _Job[Any]) -> None:
        self._jobs.append(job)
        if self._idle:
            self._start(self._idle.pop())
        elif len(self._tasks) < self._max_connections and (not self._open or self._loop.time() >= self._next_try_at):
            self._start(None)

    def _start(self, connection: OwnConnection | None) -> None:
        # In an empty context: a connection outlives the caller, and must not keep what that has in its own.
        task = self._loop.create_task(self._serve(connection), name="aidem asks PostgreSQL", context=Context())
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, connection))  # which does nothing unless it never started

    async def _serve(self, connection: OwnConnection | None) -> None:
        """Answer questions on a connection, or on a new one, until there are none."""
        try:
            if connection is not None and not await self._is_usable(connection):
                self._drop(connection)
                connection = None
            if connection is None:
                connection = await self._connected()
            while self._jobs and connection in self._open and not connection.driver.is_closed():
                await self._answer(connection, self._jobs.popleft())
        except IdempotencyPersistenceLayerError as failure:
            self._next_try_at = self._loop.time() + NEXT_TRY_SECONDS
            if len(self._tasks) == 1:  # or others go on with what was asked
                self._fail_all(failure)
        finally:
            self._ended(connection, cast("asyncio.Task[None]", asyncio.current_task()))

    def _ended(self, connection: OwnConnection | None, task: asyncio.Task[None]) -> None:
        """Keep the connection of a task that ends; what is left to be asked is asked by another."""
        if task not in self._tasks:
            return
        self._tasks.remove(task)
        if connection is not None:
            self._park(connection)
        if self._jobs and not self._tasks:
            self._start(None)

    async def _answer(self, connection: OwnConnection, job: _Job[Any]) -> None:
        if job.future.done():
            return  # what was given up is never sent
        remaining = job.deadline - self._loop.time()
        if remaining <= 0:
            job.future.fail(_errors.none_was_free(self._timeout_seconds))
            return
        question = job.question
        try:
            rows = await connection.fetch(question.statement, question.arguments, timeout_seconds=remaining)
            answer = question.read(Reply.of(rows, found_held=job.found_held))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            self._failed(connection, job, error)
        except asyncio.CancelledError:
            # Whoever ends all tasks of a loop means the caller, too, which asks again if it must.
            connection.driver.terminate()
            job.future.fail(IdempotencyPersistenceConnectionError(f"the event loop ends; {_errors.MAY_BE_APPLIED}"))
            raise
        else:
            if answer is not AGAIN:
                job.future.settle(answer)
                return
            job.found_held += 1
            if not self._ask_again(job):
                job.future.fail(_errors.stayed_locked(self._timeout_seconds))

    def _failed(self, connection: OwnConnection, job: _Job[Any], error: Exception) -> None:
        if _errors.spoils_connection(error):
            self._drop(connection, gently=True)
        if _errors.is_worth_another_try(error) and self._ask_again(job):
            return
        if isinstance(error, TimeoutError):
            error = _errors.timed_out(self._timeout_seconds)
        job.future.fail(error if isinstance(error, IdempotencyError) else _errors.translated(error, self._table))

    def _ask_again(self, job: _Job[Any]) -> bool:
        """Ask once more, after a pause; False: there is no time for that."""
        remaining = job.deadline - self._loop.time()
        pause = next_pause(job.asked_again, remaining_seconds=remaining, timeout_seconds=self._timeout_seconds)
        if pause is None:
            return False
        job.asked_again += 1
        self._paused.add(job)
        self._loop.call_later(pause, self._resume, job, context=Context())
        return True

    def _resume(self, job: _Job[Any]) -> None:
        self._paused.discard(job)
        if not job.future.done():
            self._enqueue(job)

    def _fail_all(self, failure: IdempotencyPersistenceLayerError) -> None:
        while self._jobs:
            self._jobs.popleft().future.fail(copy_of(failure))

    # --- Connections ------------------------------------------------------------------------------------------------

    async def _connected(self) -> OwnConnection:
        """Return a new connection.

        Raises:
            IdempotencyPersistenceLayerError: None can be made.
        """
        deadline = self._loop.time() + self._timeout_seconds
        try:
            # Statements are prepared here, under names of ours, so asyncpg need not remember any.
            driver = await asyncpg.connect(
                self._url, timeout=self._timeout_seconds, connection_class=_Connection, statement_cache_size=0
            )
            try:
                [(pid, is_replica)] = await driver.fetch(_HELLO, timeout=deadline - self._loop.time())
            except BaseException:
                driver.terminate()
                raise
        except Exception as error:
            raise _errors.connecting_failed(error, self._table, timeout_seconds=self._timeout_seconds) from error
        if is_replica:
            driver.terminate()
            raise _errors.is_replica()
        prepares = self._prepared_statements
        if prepares is None:
            prepares = pid == driver.get_server_pid()  # a pooler answers with a number of its own
        connection = OwnConnection(driver, prepares=prepares)
        self._open.add(connection)
        return connection

    async def _is_usable(self, connection: OwnConnection) -> bool:
        idle = self._loop.time() - connection.idle_since
        if LOOKED_AT_AFTER_SECONDS < idle < KEPT_IDLE_SECONDS:
            for _ in range(6):  # turns of the loop: until it knows what the server has said meanwhile, and that it left
                await asyncio.sleep(0)
        return idle < KEPT_IDLE_SECONDS and not connection.driver.is_closed()

    def _park(self, connection: OwnConnection) -> None:
        """Keep a connection that is not used now, if it can be used again."""
        if connection not in self._open:
            return
        if connection.driver.is_closed():
            self._drop(connection)
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(KEPT_IDLE_SECONDS, self._sweep, context=Context())

    def _sweep(self) -> None:
        """Close what has been idle for long."""
        self._sweep_timer = None
        now = self._loop.time()
        while self._idle and now - self._idle[0].idle_since >= KEPT_IDLE_SECONDS:
            self._drop(self._idle[0])
        if self._idle:
            self._sweep_timer = self._loop.call_at(
                self._idle[0].idle_since + KEPT_IDLE_SECONDS, self._sweep, context=Context()
            )

    def _drop(self, connection: OwnConnection, *, gently: bool = False) -> None:
        """Use a connection no more; gently: after the server was asked to cancel what it is still doing."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if not gently:
            connection.driver.terminate()
            return
        task = self._loop.create_task(_close(connection.driver), name="aidem closes a connection", context=Context())
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)


async def _close(driver: asyncpg.Connection) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSING_SECONDS):  # its own time-out does not bound all that it waits for
            await driver.close()  # or terminates it
