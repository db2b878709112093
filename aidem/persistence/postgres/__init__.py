"""Records in a table of PostgreSQL: for any number of processes on any number of machines."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar, cast

from aidem._distribution import how_to_install
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem.exceptions import (
    IdempotencyHeldByTransactionError,
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.persistence._by_loop import ByLoop
from aidem.persistence._context import OpenedByAsyncWith
from aidem.persistence._scan import RECORDS_PER_PAGE, selected
from aidem.persistence._transactions import recognised
from aidem.persistence.postgres import _checks, _errors
from aidem.persistence.postgres._pools import GivenPool
from aidem.persistence.postgres._questions import AGAIN, Question
from aidem.persistence.postgres._records import durations, record_of
from aidem.persistence.postgres._statements import Statement, Statements, Verdict
from aidem.persistence.postgres._table import Table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from aidem._rules.record import DataRecord, RecordStatus
    from aidem.persistence import Diagnosis
    from aidem.persistence.postgres._connections import OwnConnections
    from aidem.persistence.postgres._questions import MaybeAgain, Reply

__all__ = ["PostgresPersistenceLayer", "table_ddl"]

logger = logging.getLogger("aidem")

T = TypeVar("T")

MAX_RESULT_CHARACTERS: Final = 64 * 1024 * 1024
PURGE_EVERY_SECONDS: Final = 1.0
PURGED_AT_LEAST: Final = 1000
PURGED_PER_CLAIM: Final = 2

LOCKED_TRIES: Final = 5
"""How often a completion in a transaction is tried, 10 ms apart, while another one holds the record."""

_NO_TABLE: Final = frozenset({"42P01", "42703", "3F000"})
"""Undefined table, undefined column, undefined schema."""

_TRY_AGAIN: Final = "roll back, and try the transaction again in its body"
_REMEDIES: Final = {
    "42501": "the user of the transaction may not; let the owner of the table run GRANT SELECT, UPDATE ON %s TO ..., "
    "and GRANT USAGE on its schema",
    "25006": "the transaction is READ ONLY, or on a replica; begin one that writes, on the primary",
}
"""What helps where the server answers a SQLSTATE in a transaction of the caller's, and to try again does not."""


class _Source(Protocol):
    """Answers questions in one event loop."""

    def ask(self, question: Question[T]) -> Awaitable[T]:
        """Ask a question."""
        ...

    def ask_in_background(self, question: Question[None], failed: Callable[[BaseException], None]) -> None:
        """Ask a question whose answer nobody waits for; `failed` is told why there is none."""
        ...


class _Sources(Protocol):
    """Knows what answers questions in the running event loop."""

    def here(self) -> _Source:
        """Return it."""
        ...

    async def aclose(self) -> None:
        """Finish what was asked so far in this event loop, and close what the layer has opened."""
        ...


class PostgresPersistenceLayer(OpenedByAsyncWith):
    """Keeps records in a table of PostgreSQL 13 or newer; what its settings must be like is in docs/postgres.md.

    Every operation is one statement on one row, judged by the server's clock. The table is made by `create_table()`,
    or by a migration with the statements that `table_ddl()` returns.

    Args:
        url: `postgresql://user:password@host:5432/database`, as asyncpg understands it. The layer connects by itself,
            on every event loop that uses it.
        pool: An `asyncpg.Pool`, a `psycopg_pool.AsyncConnectionPool`, or a `sqlalchemy.ext.asyncio.AsyncEngine` on
            asyncpg or psycopg, to use in place of a URL. It must be open while the layer is used, is never closed by
            it, and belongs to one event loop.
        table: The name of the table; a schema may go before it, with a dot. It is quoted, so case matters.
        max_connections: How many connections the layer opens at most on each event loop, with a URL. Default: 10.
        prepared_statements: Whether to use prepared statements, with a URL. Default: unless a pooler such as PgBouncer
            stands before the server. Without them an operation takes two round trips in place of one.
        clock: Answers epoch seconds, to judge by instead of the server's clock; for tests.
        timeout_seconds: How long connecting may take, and then how long an operation. Default: 5.

    Raises:
        IdempotencyPersistenceConfigError: The options cannot work.
    """

    # Slots: what is set on a layer by mistake, such as `layer.pool = ...`, is refused.
    __slots__ = (
        "__weakref__",
        "_claims_since_purge",
        "_has_failed_to_purge",
        "_is_checked",
        "_next_purge_at",
        "_own_clock",
        "_sources",
        "_statements",
        "_table",
        "clock",
    )

    clock: Callable[[], float]

    def __init__(
        self,
        url: str = "",
        *,
        pool: Any | None = None,
        table: str = "aidem_records",
        max_connections: int = 10,
        prepared_statements: bool | None = None,
        clock: Callable[[], float] | None = None,
        timeout_seconds: float = 5.0,
    ) -> None:
        if clock is not None:
            self.clock = clock  # the engine asks for it by this name
        self._own_clock = clock
        self._table = Table(table)
        self._statements = Statements(self._table)
        self._is_checked = self._has_failed_to_purge = False
        self._next_purge_at = 0.0
        self._claims_since_purge = 0
        self._sources: _Sources
        if pool is None:
            _check_url(url)
            if max_connections < 1:
                raise IdempotencyPersistenceConfigError(f"max_connections={max_connections}: it must be 1 or more")
            self._sources = _connecting_to(
                url,
                self._table,
                max_connections=max_connections,
                prepared_statements=prepared_statements,
                timeout_seconds=timeout_seconds,
            )
        elif url or prepared_statements is not None:
            raise IdempotencyPersistenceConfigError(
                "a pool is used as it is: pass no url and no prepared_statements beside it"
            )
        else:
            self._sources = GivenPool(pool, self._table, timeout_seconds=timeout_seconds)

    # --- Operations -------------------------------------------------------------------------------------------------

    def acquire(
        self,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - the server's clock is the only one
    ) -> Awaitable[Claimed | Blocked]:
        """Store a claim unless a live record of somebody else is there."""
        source = self._sources.here()

        def read(reply: Reply) -> MaybeAgain[Claimed | Blocked]:
            answer = _claim_answer(record, reply)
            if isinstance(answer, Claimed):
                self._purge_sometimes(source)
            return answer

        return source.ask(Question(self._statements.acquire, self._claim(record, now=now), read))

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - the server's clock is the only one
        force: bool = False,
    ) -> Awaitable[DataRecord | None]:
        """Store a claim in the place of the one found."""

        def read(reply: Reply) -> MaybeAgain[DataRecord | None]:
            judged_at, verdict, stored = _parts(record, reply)
            if verdict == Verdict.TAKEN_OVER:
                return stored
            answer = lifecycle.taken_over(stored, found, record, now=judged_at, force=force)
            if answer is None or answer is stored:
                return answer
            return None if reply.is_held else AGAIN

        claim = self._claim(record, now=now, to_nearest_second=True)
        arguments = (*claim, found.owner, found.fence, force)
        return self._ask(self._statements.take_over, arguments, read)

    def complete(self, record: DataRecord, *, now: float) -> Awaitable[bool]:
        """Store an outcome over the claim of the same owner, or where no record is.

        Raises:
            IdempotencySerializationError: It is too large.
        """
        _check_size(record)

        def read(reply: Reply) -> MaybeAgain[bool]:
            now, verdict, found = _parts(record, reply)
            completion = lifecycle.complete(found, record, now=now)
            if verdict == Verdict.DONE or completion is Completion.ALREADY_STORED:
                return True
            return AGAIN if completion is Completion.STORE else False

        kept, _, _ = durations(record, now=now)
        outcome = None if record.outcome is None else record.outcome.value
        hashed = record.payload_hash or None
        arguments = (*self._judge(record), kept, record.response_data, outcome, hashed, record.fence, record.note)
        return self._ask(self._statements.complete, arguments, read)

    def renew(self, record: DataRecord, *, now: float) -> Awaitable[DataRecord | None]:
        """Set the instants of our claim.

        Raises:
            IdempotencyHeldByTransactionError: An open transaction holds it.
        """

        def read(reply: Reply) -> MaybeAgain[DataRecord | None]:
            _, verdict, found = _parts(record, reply)
            if verdict == Verdict.DONE:
                return found
            if verdict == Verdict.UNCHANGED:
                return None if found is None or lifecycle.is_given_up(found) else found
            return AGAIN if _is_locked(found, record, reply) else None

        kept, in_progress, lease = durations(record, now=now)
        arguments = (*self._judge(record), kept, in_progress, lease, lifecycle.is_given_up(record))
        return self._ask(self._statements.renew, arguments, read)

    def release(self, record: DataRecord) -> Awaitable[bool]:
        """Delete our claim.

        Raises:
            IdempotencyHeldByTransactionError: An open transaction holds it.
        """

        def read(reply: Reply) -> MaybeAgain[bool]:
            _, verdict, found = _parts(record, reply)
            if verdict == Verdict.DONE:
                return True
            return AGAIN if _is_locked(found, record, reply) else False

        return self._ask(self._statements.release, self._judge(record), read)

    def get(self, key: str) -> Awaitable[DataRecord | None]:
        """Return the record of a key as it is stored now."""
        return self._ask(
            self._statements.get, (key,), lambda reply: None if reply.row is None else record_of(key, reply.row)
        )

    def forget(self, key: str) -> Awaitable[None]:
        """Drop any record of the key; waits for a transaction that holds it."""
        return self._ask(self._statements.forget, (key,), lambda _reply: None)

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncGenerator[DataRecord]:
        """Iterate over the records by key."""
        return selected(self._pages(prefix), status=status, limit=limit)

    async def purge(self) -> int:
        """Remove all records that have expired, a page of the table in each statement."""
        purged, last = 0, ""
        while last is not None:
            arguments = (last, self._now(), PURGED_AT_LEAST)
            rows = await self._ask(self._statements.purge_page, arguments, lambda reply: reply.rows)
            [(last, count)] = rows
            purged += count
        return purged

    # --- In a transaction of the caller's ---------------------------------------------------------------------------

    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        """Refuse what is no open transaction of asyncpg, psycopg or SQLAlchemy on one of them."""
        recognised(transaction, database="postgresql", blocking=blocking)

    async def complete_in(self, transaction: object, record: DataRecord, *, now: float) -> bool:
        """Store an outcome over our claim, in a transaction of the caller's.

        Raises:
            IdempotencyHeldByTransactionError: Another open transaction holds it.
        """
        _check_size(record)
        opened = recognised(transaction, database="postgresql")
        kept, _, _ = durations(record, now=now)
        outcome = None if record.outcome is None else record.outcome.value
        key, owner = record.idempotency_key, record.owner
        arguments = (self._now(), key, owner, kept, record.response_data, outcome)
        try:
            for _ in range(LOCKED_TRIES):
                if await opened.execute(self._statements.complete_in, arguments) > 0:
                    return True
                # The server waits, as a blocking connection has no loop; not for the lock, which may never be free.
                if await opened.execute(self._statements.pause_if_seen, (key, owner)) == 0:
                    return False
        except Exception as error:
            state = getattr(getattr(error, "orig", error), "sqlstate", "")  # SQLAlchemy wraps those of its drivers
            if state in _NO_TABLE:
                raise IdempotencyUsageError(
                    f"the transaction is on a database, or with a search_path, that has no table {self._table.quoted} "
                    "of aidem's; begin it on the database that holds the records",
                    key=key,
                ) from error
            remedy = _REMEDIES.get(state, _TRY_AGAIN).replace("%s", self._table.quoted)
            error.add_note(f"aidem: the call is not completed; {remedy}")
            raise
        raise _held(record)

    def is_free(self, record: DataRecord) -> Awaitable[bool]:
        """Whether the claim is ours, and no open transaction holds it."""

        def read(reply: Reply) -> MaybeAgain[bool]:
            _, verdict, found = _parts(record, reply)
            if verdict == Verdict.DONE:
                return True
            return False if reply.is_held or not lifecycle.is_held_by(found, record.owner) else AGAIN

        return self._ask(self._statements.is_free, self._judge(record), read)

    # --- Life -------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and look whether the server can keep the promises; what endangers them is logged, once.

        Raises:
            IdempotencyPersistenceConfigError: The table is missing, or not as it must be; the message tells how to
                make it.
            IdempotencyPersistenceLayerError: The server cannot be reached or used, or is a replica.
        """
        dangers = await self._dangers()
        if not self._is_checked:
            self._is_checked = True
            for danger in dangers:
                logger.warning("PostgreSQL: %s", danger)

    async def diagnose(self) -> Diagnosis:
        """Look at the server, its settings for this user, and the table.

        Raises:
            IdempotencyPersistenceLayerError: As of `open`.
        """
        found = await self._dangers()
        return await self._ask(
            _checks.LOOK, (self._table.quoted,), lambda reply: _checks.diagnosis(reply.row, self._table, found=found)
        )

    async def _dangers(self) -> list[str]:
        return await self._ask(
            _checks.CHECK, (self._table.quoted,), lambda reply: _checks.dangers(reply.row, self._table)
        )

    async def create_table(self) -> None:
        """Create the table and its index; those that exist are left as they are.

        Raises:
            IdempotencyPersistenceLayerError: They cannot be created.
        """
        for number, text in enumerate(self._table.statements()):
            statement = Statement(f"aidem_create_{number}", text)
            try:
                await self._ask(statement, (), lambda _reply: None)
            except IdempotencyPersistenceLayerError as failure:
                if not _errors.is_already_there(failure):
                    raise
                await self._ask(statement, (), lambda _reply: None)  # another has created it at the same moment

    async def aclose(self) -> None:
        """Finish what was asked so far in this event loop, then close its connections, unless a pool was passed in."""
        await self._sources.aclose()

    async def __aenter__(self) -> Self:
        """Open the layer; a table that is missing is logged, so that `create_table` may be called inside."""
        try:
            await self.open()
        except _checks.MissingTableError as missing:
            logger.warning("%s", missing)
        return self

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _judge(self, record: DataRecord) -> tuple[str, int | None, str | None]:
        """Return what every statement on a claim begins with: the key, a clock if it is not the server's, our token."""
        return record.idempotency_key, self._now(), record.owner

    def _now(self) -> int | None:
        return None if self._own_clock is None else lifecycle.milliseconds(self._own_clock())

    def _claim(self, record: DataRecord, *, now: float, to_nearest_second: bool = False) -> tuple[Any, ...]:
        """Return what a statement is given that stores a claim."""
        instants = durations(record, now=now, to_nearest_second=to_nearest_second)
        return (*self._judge(record), *instants, record.payload_hash or None, record.note)

    async def _pages(self, prefix: str) -> AsyncGenerator[list[DataRecord]]:
        last = ""
        while True:
            rows = await self._ask(self._statements.scan, (prefix, last, RECORDS_PER_PAGE), lambda reply: reply.rows)
            keys = [row[-1] for row in rows]
            yield [
                record
                for key, row in zip(keys, rows, strict=True)
                if key.startswith(prefix) and (record := _readable(key, row)) is not None
            ]
            if len(rows) < RECORDS_PER_PAGE or not keys[-1].startswith(prefix):
                return
            last = keys[-1]

    def _ask(
        self, statement: Statement, arguments: tuple[Any, ...], read: Callable[[Reply], MaybeAgain[T]]
    ) -> Awaitable[T]:
        return self._sources.here().ask(Question(statement, arguments, read))

    def _purge_sometimes(self, source: _Source) -> None:
        """Remove what has expired, once a second at most; it is more than was claimed meanwhile."""
        self._claims_since_purge += 1
        if monotonic() < self._next_purge_at:
            return
        at_most = PURGED_AT_LEAST + PURGED_PER_CLAIM * self._claims_since_purge
        self._next_purge_at = monotonic() + PURGE_EVERY_SECONDS
        self._claims_since_purge = 0
        source.ask_in_background(
            Question(self._statements.purge, (at_most, self._now()), lambda _reply: None), self._purge_failed
        )

    def _purge_failed(self, failure: BaseException) -> None:
        # An outage is told by the calls, and a pool that was closed meanwhile needs no purge.
        is_refused = _errors.state_of(failure) and not isinstance(failure, IdempotencyPersistenceConnectionError)
        if is_refused and not self._has_failed_to_purge:
            self._has_failed_to_purge = True
            logger.warning("PostgreSQL: records that have expired could not be removed: %s", failure)


def table_ddl(table: str = "aidem_records") -> str:
    """Return the statements that create the table and its index, for a migration tool.

    Args:
        table: What the layer gets as `table`.

    Raises:
        IdempotencyPersistenceConfigError: It names no table.
    """
    return Table(table).ddl()


def _check_size(record: DataRecord) -> None:
    """Refuse a result that is too large."""
    data = record.response_data
    if data is not None and len(data) > MAX_RESULT_CHARACTERS:
        raise IdempotencySerializationError(
            f"a result of {len(data)} characters is more than the {MAX_RESULT_CHARACTERS} that aidem keeps in "
            "PostgreSQL",
            key=record.idempotency_key,
        )


def _check_url(url: Any) -> None:
    if not isinstance(url, str):
        raise IdempotencyPersistenceConfigError(
            "url must be text, such as postgresql://user:password@host:5432/database; a pool is passed as pool="
        )
    scheme, separator, _ = url.partition("://")
    if scheme not in {"postgresql", "postgres"} or not separator:
        # A URL may hold a password: only what stands before the colon is shown.
        raise IdempotencyPersistenceConfigError(
            f"PostgresPersistenceLayer needs a URL, postgresql://user:password@host:5432/database, or a pool; "
            f"this URL has the scheme {scheme if separator else ''!r}"
        )


def _connecting_to(url: str, table: Table, **options: Any) -> ByLoop[OwnConnections]:
    try:
        from aidem.persistence.postgres._connections import OwnConnections
    except ImportError as error:
        raise ImportError(f"PostgresPersistenceLayer needs asyncpg for a URL: {how_to_install('postgres')}") from error
    return ByLoop(lambda: OwnConnections(url, table, **options))


# --- What the rows say ----------------------------------------------------------------------------------------------


def _parts(record: DataRecord, reply: Reply) -> tuple[float, int, DataRecord | None]:
    """Return the time, what has become of the operation, and the record in the table."""
    now, verdict, *_ = row = cast("Sequence[Any]", reply.row)
    return now / 1000, verdict, record_of(record.idempotency_key, row)


def _claim_answer(record: DataRecord, reply: Reply) -> MaybeAgain[Claimed | Blocked]:
    now, verdict, found = _parts(record, reply)
    if found is None:
        return AGAIN  # another claims the key at this moment
    if verdict != Verdict.REFUSED:
        return Claimed(found, taken_over=verdict == Verdict.TAKEN_OVER)
    answer = lifecycle.acquire(found, record, now=now)
    if isinstance(answer, Blocked) or answer.record is found:
        return answer
    # It is to be had, and cannot be locked.
    held = lifecycle.acquire_held(found) if reply.is_held else None
    return AGAIN if held is None else held._replace(now=now)


def _readable(key: str, row: Sequence[Any]) -> DataRecord | None:
    """Return a record that was found; None: there is none, or none that can be read."""
    try:
        return record_of(key, row)
    except IdempotencyInvalidStatusError:
        return None


def _is_locked(found: DataRecord | None, record: DataRecord, reply: Reply) -> bool:
    """Whether a claim that could not be changed is ours all the same: then it could not be locked.

    Raises:
        IdempotencyHeldByTransactionError: It will not be free soon.
    """
    if not lifecycle.is_held_by(found, record.owner):
        return False
    if reply.is_held:
        raise _held(found or record)
    return True


def _held(record: DataRecord) -> IdempotencyHeldByTransactionError:
    message = f"an open transaction holds the record of idempotency key {record.idempotency_key!r}"
    return IdempotencyHeldByTransactionError(message, record=record)
