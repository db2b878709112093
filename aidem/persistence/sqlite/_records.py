"""What the operations of a layer do within a transaction: read the record, ask the rules, write."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.exceptions import IdempotencyInvalidStatusError
from aidem.persistence._stored import text

if TYPE_CHECKING:
    import sqlite3

PURGED_PER_CLAIM: Final = 2


class Tables:
    """The tables that hold records, and the statements on them.

    Attributes:
        prefix: What their names begin with.
        schema_steps: The statements that make each version of the schema from the one before; a file of an older
            version gets those that it lacks. A rowid table: new records go to its end, and only the index on `id` is
            written at random places.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        records, last_fence = f"{prefix}records", f"{prefix}last_fence"
        tables = (
            f"""
            CREATE TABLE {records} (
                id TEXT NOT NULL UNIQUE,
                expiration INTEGER,
                in_progress_expiration INTEGER,
                status TEXT NOT NULL,
                data TEXT,
                validation TEXT,
                owner TEXT,
                fence INTEGER NOT NULL,
                lease_expiration INTEGER,
                outcome TEXT
            )
            """,
            f"CREATE INDEX {records}_by_expiration ON {records} (expiration)",
            f"CREATE TABLE {last_fence} (value INTEGER NOT NULL)",
            f"INSERT INTO {last_fence} VALUES (0)",  # noqa: S608 - the prefix is ours, here and below
        )
        self.schema_steps = (tables, (f"ALTER TABLE {records} ADD COLUMN note TEXT",))
        values = "expiration, in_progress_expiration, status, data, validation, owner, fence, lease_expiration"
        self.select = f"""
            SELECT {values}, outcome, note FROM {records} WHERE id = ?
        """  # noqa: S608
        self.page = f"""
            SELECT id, {values}, outcome, note FROM {records} WHERE id >= ? AND id > ? ORDER BY id LIMIT ?
        """  # noqa: S608
        self.upsert = f"""
            INSERT INTO {records} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET
                expiration = excluded.expiration,
                in_progress_expiration = excluded.in_progress_expiration,
                status = excluded.status,
                data = excluded.data,
                validation = excluded.validation,
                owner = excluded.owner,
                fence = excluded.fence,
                lease_expiration = excluded.lease_expiration,
                outcome = excluded.outcome,
                note = excluded.note
        """  # noqa: S608
        self._complete_ours = f"""
            UPDATE {records} SET
                expiration = ?, in_progress_expiration = NULL, status = 'COMPLETED', data = ?,
                lease_expiration = NULL, outcome = ?
            WHERE id = ? AND owner = ? AND status = 'INPROGRESS'
        """  # noqa: S608
        self.delete = f"DELETE FROM {records} WHERE id = ?"  # noqa: S608
        self.purge = f"""
            DELETE FROM {records}
            WHERE rowid IN (SELECT rowid FROM {records} WHERE expiration < ? ORDER BY expiration LIMIT ?)
        """  # noqa: S608
        self.select_last_fence = f"SELECT value FROM {last_fence}"  # noqa: S608
        self.update_last_fence = f"UPDATE {last_fence} SET value = ?"  # noqa: S608

    def completion(self, record: DataRecord) -> tuple[str, tuple[str | int | None, ...]]:
        """Return the statement that stores an outcome over our claim, and nowhere else."""
        outcome = None if record.outcome is None else record.outcome.value
        values = (record.expiry_timestamp, record.response_data, outcome, record.idempotency_key, record.owner)
        return self._complete_ours, values


class WouldWriteError(Exception):
    """An operation has to write, which it must not without the write lock.

    Attributes:
        found: The record that it has found; None: none.
    """

    def __init__(self, found: DataRecord | None) -> None:
        super().__init__()
        self.found = found


class Records:
    """The records as one transaction sees them, all at one instant by the layer's clock.

    The file remembers the highest fence it has given out, so that fences grow over release, purge and a clock that
    goes back.
    """

    def __init__(self, cursor: sqlite3.Cursor, tables: Tables, *, now: float, may_write: bool = True) -> None:
        """See the records.

        Args:
            cursor: Of a connection in a transaction.
            tables: Where they are.
            now: By the layer's clock.
            may_write: Whether the transaction has the write lock. Without, an operation that would write raises
                `WouldWriteError`.
        """
        self._cursor = cursor
        self._tables = tables
        self._now = now
        self._may_write = may_write
        self._claims = 0
        (self._stored_fence,) = cursor.execute(tables.select_last_fence).fetchone()
        self._last_fence: int = self._stored_fence

    @property
    def cursor(self) -> sqlite3.Cursor:
        """What they are read with."""
        return self._cursor

    @property
    def in_transaction(self) -> bool:
        """Whether the transaction still stands."""
        return self._cursor.connection.in_transaction

    def acquire(self, proposed: DataRecord, *, now: float) -> Claimed | Blocked:
        """Store a claim unless a live record of another owner is there; `now` is the caller's."""
        found = self.get(proposed.idempotency_key)
        answer = lifecycle.acquire(found, proposed, now=self._now, proposed_at=now, last_fence=self._last_fence)
        if isinstance(answer, Claimed) and answer.record is not found:
            self._store(answer.record, found)
            self._claims += 1
        return answer

    def take_over(self, found: DataRecord, proposed: DataRecord, *, now: float, force: bool) -> DataRecord | None:
        """Store a claim in the place of the one found; `now` is the caller's."""
        stored = self.get(proposed.idempotency_key)
        answer = lifecycle.taken_over(
            stored, found, proposed, now=self._now, proposed_at=now, force=force, last_fence=self._last_fence
        )
        if answer is not None and answer is not stored:
            self._store(answer, stored)
        return answer

    def complete(self, record: DataRecord, *, now: float) -> bool:
        """Store an outcome; `now` is the caller's."""
        found = self.get(record.idempotency_key)
        completion = lifecycle.complete(found, record, now=self._now)
        if completion is Completion.STORE:
            self._store(lifecycle.shifted(record, seconds=self._now - now), found)
        return completion is not Completion.REFUSED

    def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:
        """Set the instants of a claim; `now` is the caller's."""
        record = lifecycle.shifted(record, seconds=self._now - now)
        found = self.get(record.idempotency_key)
        renewed = lifecycle.renewed(found, record)
        if renewed is not None:
            self._store(renewed, found)
        return renewed

    def release(self, record: DataRecord) -> bool:
        """Delete a claim."""
        ours = lifecycle.is_held_by(self.get(record.idempotency_key), record.owner)
        if ours:
            self.forget(record.idempotency_key)
        return ours

    def is_free(self, record: DataRecord) -> bool:
        """Whether it is our claim, and no other transaction writes."""
        found = self.get(record.idempotency_key)
        ours = lifecycle.is_held_by(found, record.owner)
        if ours:
            self._lock_is_needed(found)
        return ours

    def get(self, key: str) -> DataRecord | None:
        """Return the record of a key."""
        row = self._cursor.execute(self._tables.select, (key,)).fetchone()
        return None if row is None else _record(key, *row)

    def forget(self, key: str) -> None:
        """Drop the record of a key."""
        self._lock_is_needed(None)
        self._cursor.execute(self._tables.delete, (key,))

    def page(self, prefix: str, *, after: str, limit: int) -> tuple[list[DataRecord], str | None]:
        """Return the next records by key that can be read, and the last key looked at; None: there are no more."""
        rows = self._cursor.execute(self._tables.page, (prefix, after, limit)).fetchall()
        rows_with_prefix = [row for row in rows if row[0].startswith(prefix)]
        records = list[DataRecord]()
        for row in rows_with_prefix:
            with contextlib.suppress(IdempotencyInvalidStatusError):
                records.append(_record(*row))
        return records, rows[-1][0] if len(rows_with_prefix) == limit else None

    def purge(self, limit: int) -> int:
        """Remove some records that have expired; return how many."""
        self._lock_is_needed(None)
        return self._cursor.execute(self._tables.purge, (int(self._now), limit)).rowcount

    def finish(self) -> None:
        """Write what is owed once per transaction: the highest fence, and the removal of a few expired records.

        Claims remove more than they add, so the file stops growing; no caller waits for more than that.
        """
        if self._last_fence > self._stored_fence:
            self._cursor.execute(self._tables.update_last_fence, (self._last_fence,))
        if self._claims:
            self._cursor.execute(self._tables.purge, (int(self._now), PURGED_PER_CLAIM * self._claims))

    def _lock_is_needed(self, found: DataRecord | None) -> None:
        if not self._may_write:
            raise WouldWriteError(found)

    def _store(self, record: DataRecord, found: DataRecord | None) -> None:
        self._lock_is_needed(found)
        row = (
            record.idempotency_key,
            record.expiry_timestamp,
            record.in_progress_expiry_timestamp,
            record.status.value,  # SQLite takes a plain str without asking how to adapt it
            record.response_data,
            record.payload_hash or None,
            record.owner,
            record.fence,
            record.lease_expiry_timestamp,
            None if record.outcome is None else record.outcome.value,
            record.note,
        )
        self._cursor.execute(self._tables.upsert, row)
        self._last_fence = max(self._last_fence, record.fence)


def _record(  # noqa: PLR0917 - the columns, in their order
    key: str,
    expiration: object,
    in_progress_expiration: object,
    status: object,
    data: object,
    validation: object,
    owner: object,
    fence: object,
    lease_expiration: object,
    outcome: object,
    note: object,
) -> DataRecord:
    try:
        return DataRecord(
            idempotency_key=key,
            status=RecordStatus(text(status) or ""),
            expiry_timestamp=_whole(expiration),
            in_progress_expiry_timestamp=_whole(in_progress_expiration),
            lease_expiry_timestamp=_whole(lease_expiration),
            response_data=text(data),
            outcome=None if outcome is None else OutcomeKind(text(outcome) or ""),
            payload_hash=text(validation) or "",
            owner=text(owner),
            fence=_whole(fence) or 0,
            note=text(note),
        )
    except ValueError as error:
        raise IdempotencyInvalidStatusError(
            f"the record of idempotency key {key!r} has status {text(status)!r} and outcome {text(outcome)!r}, or "
            "instants that are no numbers, which this aidem cannot read; upgrade aidem, or drop the record with "
            "forget(key)",
            key=key,
        ) from error


def _whole(value: object) -> int | None:
    """Return a number: SQLite keeps whatever was written, also in a column of integers."""
    if value is None or isinstance(value, int):
        return value
    raise ValueError
