"""The one thread in which a layer speaks to SQLite: what was asked meanwhile becomes one transaction.

No waiting for more to come: one caller alone gets a transaction of its own at once, and while it is being committed
the next batch gathers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aidem._runtime.threads import Lock, SimpleQueue, thread_for
from aidem.persistence.sqlite._file import is_locked, pause
from aidem.persistence.sqlite._records import Records, WouldWriteError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aidem._rules.record import DataRecord
    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.sqlite._file import DatabaseFile

MAX_BATCH: Final = 256
EXIT_SECONDS: Final = 5.0

# Held to ask a thread for something, to start or to end one: nothing is asked of a thread that ends. A thread's own
# `_in_use` may be taken under it, never the other way round.
gate: Final = Lock()
_threads: Final[set[RecordThread]] = set()  # which are running


class Job(NamedTuple):
    """One operation, and the future for its answer.

    Attributes:
        future: A future of the event loop of the caller.
        operation: A function of the records.
        writes: Whether it may write.
        is_of_use_late: Whether it runs although its caller does not wait any more: an outcome must not be lost, and a
            key must be released, but a claim is of no use then.
        on_locked: Makes the answer, from the record found, where an application's transaction has the write lock for
            too long.
        locked_until: When that is too long, in seconds of the monotonic clock.
    """

    future: UncancellableFuture[Any]
    operation: Callable[[Records], Any]
    writes: bool
    is_of_use_late: bool
    on_locked: Callable[[DataRecord | None], Any]
    locked_until: float


class RecordThread:
    """A thread with a connection of its own. It is made, asked and ended under the `gate`.

    Attributes:
        jobs: What is to be done; None: the end.
        ended: Whether nothing may be asked of it any more.
    """

    def __init__(self, file: DatabaseFile, clock: Callable[[], float]) -> None:
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.ended = False
        self._done: UncancellableFuture[None] | None = None
        self._file = file
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._in_use = Lock()
        self._thread = thread_for(self._serve, name=f"aidem {file.path}")
        self._thread.start()
        _threads.add(self)

    def end(self, done: UncancellableFuture[None] | None) -> None:
        """Let it finish what was asked, close the file, then settle `done`."""
        self.ended = True
        self._done = done
        self.jobs.put(None)

    def end_unwatched(self) -> None:
        """End it from a finalizer, which may run at any point and so takes no lock: nobody else can ask any more."""
        if not self.ended:
            self.end(None)

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout_seconds)

    def pause_for_fork(self) -> None:
        """Wait for the running transaction, then close the file.

        SQLite's locks and mutexes do not survive a fork: not in a connection that the child inherits, even if it never
        uses it, nor in one that the child opens itself beside it.
        """
        self._in_use.acquire()
        self._disconnect()

    def resume_after_fork(self) -> None:
        """Go on, in the process that forked."""
        self._in_use.release()

    def _serve(self) -> None:
        while batch := self._next_batch():
            self._handle(batch)
        with self._in_use:
            self._disconnect()
        with gate:
            _threads.discard(self)
        if self._done is not None:
            _deliver_to(self._done.get_loop(), [(self._done, None)])

    def _next_batch(self) -> list[Job]:
        """Wait for something to do, and take everything that is there; nothing is the end."""
        batch: list[Job] = []
        while (job := self.jobs.get()) is not None:
            batch.append(job)
            if self.jobs.empty() or len(batch) == MAX_BATCH:
                return batch
        if batch:
            self.jobs.put(None)  # for the next time
        return batch

    def _handle(self, batch: list[Job]) -> None:
        writes = any(job.writes for job in batch)
        answers = self._answers(batch, lambda cursor: self._file.patiently(lambda: self._begun(cursor, writes=writes)))
        _deliver(batch, answers)

    def _answers(self, batch: list[Job], begin: Callable[[sqlite3.Cursor], Records | None]) -> list[Any]:
        """Answer all in the transaction that `begin` begins; nothing where it could not, as the file was locked."""
        with self._in_use:
            try:
                # Closed at once: after a COMMIT that failed, a cursor keeps the file open, though its connection is
                # closed.
                with contextlib.closing(self._connected().cursor()) as cursor:
                    records = begin(cursor)
                    if records is None:
                        return []
                    answers = [self._answer(job, records) for job in batch]
                    records.finish()
                    self._file.patiently(lambda: cursor.execute("COMMIT"))  # without a log, readers can hold it up
            except Exception as error:  # noqa: BLE001 - whatever it was, it is the answer to each of them
                self._disconnect()  # which also rolls back
                return [self._file.translated(error) for _ in batch]
        return answers

    def _begun(self, cursor: sqlite3.Cursor, *, writes: bool) -> Records:
        if cursor.connection.in_transaction:
            cursor.execute("ROLLBACK")  # BEGIN went well, and then the file was locked
        cursor.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        return Records(cursor, self._file.tables, now=self._clock(), may_write=writes)

    def _answer(self, job: Job, records: Records) -> Any:
        if job.future.done() and not job.is_of_use_late:
            return None
        # No savepoint: an operation writes with a single statement, and SQLite takes back a statement that fails.
        try:
            return job.operation(records)
        except WouldWriteError as refused:
            return refused
        except Exception as error:
            if not records.in_transaction:
                raise  # SQLite has taken back the whole transaction
            return self._file.translated(error)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._file.was_replaced():
            self._disconnect()
        if self._connection is None:
            self._connection = self._file.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ApplicationThread(RecordThread):
    """Does the same in the database of an application, whose transactions can have the write lock for long.

    What can be answered by reading is, replays above all: without the write lock, also while others wait for it.
    """

    def _handle(self, batch: list[Job]) -> None:
        unread, waiting = batch, list[_Waiting]()
        while True:
            unread, waiting = self._read(unread, waiting)
            if waiting:
                waiting = self._write(waiting)
            if not (unread or waiting):
                return
            pause()
            while not self.jobs.empty():
                job = self.jobs.get()
                if job is None:
                    self.jobs.put(None)  # the end, for when nothing waits any more
                    break
                unread.append(job)

    def _read(self, unread: list[Job], waiting: list[_Waiting]) -> tuple[list[Job], list[_Waiting]]:
        """Answer what reading answers; return what cannot be read for now, and what waits for the write lock."""
        if not unread:
            return [], waiting
        answers = self._answers(unread, lambda cursor: self._begun_unless_locked(cursor, writes=False))
        if not answers:
            late = [_Waiting(job, None) for job in unread]
            return [job for job, _ in _without_late(late)], waiting
        answered = list(zip(unread, answers, strict=True))
        done = [(job, answer) for job, answer in answered if not isinstance(answer, WouldWriteError)]
        _deliver([job for job, _ in done], [answer for _, answer in done])
        needing = [_Waiting(job, answer.found) for job, answer in answered if isinstance(answer, WouldWriteError)]
        return [], waiting + needing

    def _write(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Do what has to write; return what goes on waiting for the write lock."""
        jobs = [job for job, _ in waiting]
        answers = self._answers(jobs, lambda cursor: self._begun_unless_locked(cursor, writes=True))
        if not answers:
            return _without_late(waiting)
        _deliver(jobs, answers)
        return []

    def _begun_unless_locked(self, cursor: sqlite3.Cursor, *, writes: bool) -> Records | None:
        try:
            return self._begun(cursor, writes=writes)
        except sqlite3.OperationalError as error:
            if is_locked(error):
                return None
            raise


class _Waiting(NamedTuple):
    """An operation that waits for the write lock, and the record that it has found."""

    job: Job
    found: DataRecord | None


def _without_late(waiting: list[_Waiting]) -> list[_Waiting]:
    """Answer what has waited for too long; return the others."""
    now = time.monotonic()
    late = [one for one in waiting if one.job.locked_until <= now]
    if not late:
        return waiting
    _deliver([job for job, _ in late], [job.on_locked(found) for job, found in late])
    return [one for one in waiting if one.job.locked_until > now]


def _deliver(batch: list[Job], answers: list[Any]) -> None:
    """Hand each loop its answers, all at once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[UncancellableFuture[Any], Any]]] = {}
    for job, answer in zip(batch, answers, strict=True):
        by_loop.setdefault(job.future.get_loop(), []).append((job.future, answer))
    for loop, settled in by_loop.items():
        _deliver_to(loop, settled)


def _deliver_to(loop: asyncio.AbstractEventLoop, settled: list[tuple[UncancellableFuture[Any], Any]]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_settle, settled)


def _settle(settled: list[tuple[UncancellableFuture[Any], Any]]) -> None:
    for future, answer in settled:
        if isinstance(answer, Exception):
            future.fail(answer)
        else:
            future.settle(answer)


def _before_fork() -> None:
    gate.acquire()
    for thread in _threads:
        thread.pause_for_fork()


def _after_fork() -> None:
    for thread in _threads:
        thread.resume_after_fork()
    gate.release()


def _after_fork_in_child() -> None:
    for thread in _threads:
        thread.ended = True  # the child has none of its parent's threads; its layers start their own
    _threads.clear()
    gate.release()


def _finish_at_exit() -> None:
    """Write what is still queued: an interpreter that exits does not wait for daemon threads."""
    with gate:
        threads = list(_threads)
        for thread in threads:
            thread.end_unwatched()
    for thread in threads:
        thread.join(EXIT_SECONDS)


atexit.register(_finish_at_exit)
# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
