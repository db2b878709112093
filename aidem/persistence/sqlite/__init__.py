"""Records in one SQLite file: for one machine, and any number of processes, threads and event loops on it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aidem._rules import lifecycle
from aidem._runtime.cancellation import UncancellableFuture
from aidem._runtime.clock import wall_clock
from aidem.exceptions import (
    IdempotencyPersistenceConnectionError,
    IdempotencyUsageError,
)
from aidem.persistence._context import OpenedByAsyncWith
from aidem.persistence._scan import RECORDS_PER_PAGE, selected
from aidem.persistence._transactions import recognised
from aidem.persistence.sqlite import _checks, _thread
from aidem.persistence.sqlite._file import DatabaseFile
from aidem.persistence.sqlite._thread import ApplicationThread, Job, RecordThread

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from aidem._rules.record import DataRecord, RecordStatus
    from aidem.persistence import Blocked, Claimed, Diagnosis
    from aidem.persistence._transactions import Transaction
    from aidem.persistence.sqlite._records import Records

__all__ = ["SQLitePersistenceLayer"]

T = TypeVar("T")

RENEWAL_SECONDS: Final = 0.25
"""How long a renewal waits for the write lock of an application's file; a completion waits for a renewal under way."""


class _Completed:
    """The file and the transaction in which a task or thread has completed a call last.

    Attributes:
        transaction: None: it was seen to have ended, and others may use its connection by now.
    """

    __slots__ = ("path", "transaction")

    def __init__(self, path: Path, transaction: Transaction) -> None:
        self.path = path
        self.transaction: Transaction | None = transaction


_completed: ContextVar[_Completed | None] = ContextVar("aidem_sqlite_completed", default=None)


class SQLitePersistenceLayer(OpenedByAsyncWith):
    """Keeps records in an SQLite file, which is created at the first use.

    With `in_application_database=True` the file is the database of your application, and an idempotent call can store
    its result in the transaction that writes the rows: `execution.complete(result, transaction=connection)`. The
    records are then in tables of their own, whose names begin with `aidem_`; nothing else in the file is changed.

    Operations that arrive while a transaction runs share the next one, and every answer comes after its COMMIT has
    reached the disk. Each new claim removes a few expired records.

    The file must be on a local disk: SQLite's locks do not work on network file systems. `fork` is safe: it waits for
    the transaction that is running, and no connection is inherited.

    Args:
        path: The file, in a directory that exists. A relative path is resolved now, so that a later change of the
            working directory does not move it.
        in_application_database: Whether the file is your application's database. Default: False, which refuses such a
            file.
        clock: Returns epoch seconds; called inside the transaction. Default: the clock of the machine.
        busy_timeout_seconds: Time to wait while another process, or a transaction of your application, writes. Default:
            4.
        timeout_seconds: Time that an operation may take in all. Default: 5. An operation that takes longer, for example
            on a disk that hangs, fails with `IdempotencyPersistenceConnectionError` and may still be applied.

    Raises:
        IdempotencyPersistenceConfigError: The path is `:memory:`.
    """

    _thread: RecordThread | None = None  # here, since a layer that could not be made is dropped, too

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        in_application_database: bool = False,
        clock: Callable[[], float] = wall_clock,
        busy_timeout_seconds: float = 4.0,
        timeout_seconds: float = 5.0,
    ) -> None:
        self.clock = clock
        self._file = DatabaseFile(
            path, busy_timeout_seconds=busy_timeout_seconds, is_of_application=in_application_database
        )
        self._timeout_seconds = timeout_seconds
        self._deadlines: dict[asyncio.AbstractEventLoop, _Deadlines] = {}

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def holds_records(self) -> bool:
        """Whether the file is there, and was made for records; it is not made or changed, unlike at every other use."""
        return self._file.holds_records()

    def acquire(
        self,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - one machine, one clock
    ) -> UncancellableFuture[Claimed | Blocked]:
        """Store a claim unless a live record of another owner is there."""
        inside = self._is_inside_transaction()
        return self._ask(
            lambda records: records.acquire(record, now=now),
            on_locked=self._file.refused_inside if inside else self._file.blocked,
            locked_seconds=0.0 if inside else None,
        )

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - one machine, one clock
        force: bool = False,
    ) -> UncancellableFuture[DataRecord | None]:
        """Store a claim in the place of the one found."""
        return self._ask(
            lambda records: records.take_over(found, record, now=now, force=force),
            on_locked=lambda _found: None,  # a transaction of the application may hold the claim
        )

    def complete(self, record: DataRecord, *, now: float) -> UncancellableFuture[bool]:
        """Store an outcome over the claim of the same owner, or where no record is."""
        return self._ask(lambda records: records.complete(record, now=now), is_of_use_late=True)

    def renew(self, record: DataRecord, *, now: float) -> UncancellableFuture[DataRecord | None]:
        """Set the instants of our claim."""
        return self._ask(
            lambda records: records.renew(record, now=now), on_locked=self._file.held, locked_seconds=RENEWAL_SECONDS
        )

    def release(self, record: DataRecord) -> UncancellableFuture[bool]:
        """Delete our claim."""
        return self._ask(lambda records: records.release(record), is_of_use_late=True, on_locked=self._file.held)

    def get(self, key: str) -> UncancellableFuture[DataRecord | None]:
        """Return the record of a key as it is stored now."""
        self._is_inside_transaction()  # the look after a body: the transaction has ended, its connection is still ours
        return self._ask(lambda records: records.get(key), writes=False)

    def forget(self, key: str) -> UncancellableFuture[None]:
        """Drop any record of the key."""
        return self._ask(lambda records: records.forget(key), is_of_use_late=True)

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncGenerator[DataRecord]:
        """Iterate over the records by key."""
        return selected(self._pages(prefix), status=status, limit=limit)

    async def purge(self) -> int:
        """Remove all records that have expired, some in each transaction."""
        purged = 0
        while count := await self._ask(lambda records: records.purge(RECORDS_PER_PAGE)):
            purged += count
        return purged

    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        """Refuse what is no open transaction of sqlite3, aiosqlite or SQLAlchemy on one of them."""
        if not self._file.is_of_application:
            raise IdempotencyUsageError(
                f"transaction= needs the records in the same file as your rows, and {self._file.path} is a file of "
                "their own; make the layer with SQLitePersistenceLayer(path, in_application_database=True)"
            )
        recognised(transaction, database="sqlite", blocking=blocking)

    async def complete_in(self, transaction: object, record: DataRecord, *, now: float) -> bool:
        """Store an outcome over our claim, in a transaction of the application."""
        opened = recognised(transaction, database="sqlite")
        statement, values = self._file.tables.completion(lifecycle.shifted(record, seconds=self.clock() - now))
        try:
            is_stored = await opened.execute(statement, values) > 0
        except Exception as error:
            refusal = self._file.refusal_of_transaction(error)
            if refusal is not None:
                raise refusal from error
            error.add_note("aidem: the call is not completed; roll back, and try the transaction again in its body")
            raise
        if is_stored:
            _completed.set(_Completed(self._file.path, opened))
        return is_stored

    def is_free(self, record: DataRecord) -> UncancellableFuture[bool]:
        """Whether the claim is ours, and no transaction of the application has the write lock."""
        seconds = 0.0 if self._is_inside_transaction() else None
        return self._ask(
            lambda records: records.is_free(record), on_locked=lambda _found: False, locked_seconds=seconds
        )

    async def open(self) -> None:
        """Open the file, or make it.

        Raises:
            IdempotencyPersistenceConfigError: The file cannot be used.
        """
        await self._ask(lambda _records: None, writes=False)

    async def diagnose(self) -> Diagnosis:
        """Look at the file, its log, and the file system that it is on.

        Raises:
            IdempotencyPersistenceLayerError: The file cannot be used.
        """
        return await self._ask(
            lambda records: _checks.diagnosis(records.cursor, self.path, found=sorted(self._file.warnings)),
            writes=False,
        )

    async def aclose(self) -> None:
        """Finish what was asked so far, then close the file and end the thread."""
        done: UncancellableFuture[None] = UncancellableFuture(loop=asyncio.get_running_loop())
        with _thread.gate:
            thread, self._thread = self._thread, None
            if thread is None or thread.ended:
                return
            thread.end(done)
        await done
        thread.join()  # does not wait: to answer was the last thing it did

    async def _pages(self, prefix: str) -> AsyncGenerator[list[DataRecord]]:
        last: str | None = ""
        while last is not None:
            page, last = await self._ask(partial(_page, prefix=prefix, after=last), writes=False)
            yield page

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.end_unwatched()

    def _is_inside_transaction(self) -> bool:
        """Whether the caller's own transaction has the write lock: waiting for its end would never end."""
        completed = _completed.get()
        if completed is None or completed.transaction is None or completed.path != self._file.path:
            return False
        if not completed.transaction.is_open():
            completed.transaction = None
        return completed.transaction is not None

    def _ask(
        self,
        operation: Callable[[Records], T],
        *,
        writes: bool = True,
        is_of_use_late: bool = False,
        on_locked: Callable[[DataRecord | None], Any] | None = None,
        locked_seconds: float | None = None,
    ) -> UncancellableFuture[T]:
        loop = asyncio.get_running_loop()
        future: UncancellableFuture[T] = UncancellableFuture(loop=loop)
        if locked_seconds is None:
            locked_seconds = self._file.busy_timeout_seconds
        job = Job(
            future,
            operation,
            writes,
            is_of_use_late,
            on_locked or self._file.locked,
            time.monotonic() + locked_seconds,
        )
        with _thread.gate:
            if self._thread is None or self._thread.ended:
                kind = ApplicationThread if self._file.is_of_application else RecordThread
                self._thread = kind(self._file, self.clock)
            deadlines = self._deadlines.get(loop)
            if deadlines is None:
                open_loops = {other: kept for other, kept in self._deadlines.items() if not other.is_closed()}
                deadlines = _Deadlines(loop, self._file.path, timeout_seconds=self._timeout_seconds)
                self._deadlines = open_loops | {loop: deadlines}
            self._thread.jobs.put(job)
        deadlines.watch(future)
        return future


def _page(records: Records, *, prefix: str, after: str) -> tuple[list[DataRecord], str | None]:
    return records.page(prefix, after=after, limit=RECORDS_PER_PAGE)


class _Deadlines:
    """Fails what one event loop has asked for and has no answer to in time; one timer serves all of it."""

    __slots__ = ("_asked", "_loop", "_path", "_timeout_seconds", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, path: Path, *, timeout_seconds: float) -> None:
        self._loop = loop
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._asked: deque[tuple[float, UncancellableFuture[Any]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: UncancellableFuture[Any]) -> None:
        """Fail it in time; answers come in the order of asking, so those that have come are the first."""
        while self._asked and self._asked[0][1].done():
            self._asked.popleft()
        self._asked.append((self._loop.time() + self._timeout_seconds, future))
        if self._timer is None:
            self._timer = self._loop.call_at(self._asked[0][0], self._look)

    def _look(self) -> None:
        self._timer = None
        while self._asked:
            due, future = self._asked[0]
            if not future.done() and due > self._loop.time():
                self._timer = self._loop.call_at(due, self._look)
                return
            self._asked.popleft()
            future.fail(
                IdempotencyPersistenceConnectionError(
                    f"{self._path}: SQLite did not answer within {self._timeout_seconds:g} s, which timeout_seconds "
                    "allows; the operation may have been applied"
                )
            )
