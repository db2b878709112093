"""What the operations of a layer do within a transaction: read the record, ask the rules, write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.exceptions import IdempotencyInvalidStatusError
from aidem.persistence._stored import text

if TYPE_CHECKING:
    import sqlite3

# A rowid table: new records go to its end, and only the index on `id` is written at random places.
SCHEMA: Final = (
    """
    CREATE TABLE records (
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
    "CREATE INDEX records_by_expiration ON records (expiration)",
    "CREATE TABLE last_fence (value INTEGER NOT NULL)",
    "INSERT INTO last_fence VALUES (0)",
)

PURGED_PER_CLAIM: Final = 2

_SELECT: Final = """
    SELECT expiration, in_progress_expiration, status, data, validation, owner, fence, lease_expiration, outcome
    FROM records WHERE id = ?
"""
_UPSERT: Final = """
    INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET
        expiration = excluded.expiration,
        in_progress_expiration = excluded.in_progress_expiration,
        status = excluded.status,
        data = excluded.data,
        validation = excluded.validation,
        owner = excluded.owner,
        fence = excluded.fence,
        lease_expiration = excluded.lease_expiration,
        outcome = excluded.outcome
"""
_DELETE: Final = "DELETE FROM records WHERE id = ?"
_PURGE: Final = """
    DELETE FROM records WHERE rowid IN (SELECT rowid FROM records WHERE expiration < ? ORDER BY expiration LIMIT ?)
"""
_SELECT_LAST_FENCE: Final = "SELECT value FROM last_fence"
_UPDATE_LAST_FENCE: Final = "UPDATE last_fence SET value = ?"


class Records:
    """The records as one transaction sees them, all at one instant by the layer's clock.

    The file remembers the highest fence it has given out, so that fences grow over release, purge and a clock that
    goes back.
    """

    def __init__(self, cursor: sqlite3.Cursor, *, now: float) -> None:
        self._cursor = cursor
        self._now = now
        self._claims = 0
        (self._stored_fence,) = cursor.execute(_SELECT_LAST_FENCE).fetchone()
        self._last_fence: int = self._stored_fence

    @property
    def in_transaction(self) -> bool:
        """Whether the transaction still stands."""
        return self._cursor.connection.in_transaction

    def acquire(self, proposed: DataRecord, *, now: float) -> Claimed | Blocked:
        """Store a claim unless a live record of somebody else is there; `now` is the caller's."""
        found = self.get(proposed.idempotency_key)
        answer = lifecycle.acquire(found, proposed, now=self._now, proposed_at=now, last_fence=self._last_fence)
        if isinstance(answer, Claimed) and answer.record is not found:
            self._store(answer.record)
            self._claims += 1
        return answer

    def complete(self, record: DataRecord, *, now: float) -> bool:
        """Store an outcome; `now` is the caller's."""
        completion = lifecycle.complete(self.get(record.idempotency_key), record, now=self._now)
        if completion is Completion.STORE:
            self._store(lifecycle.shifted(record, seconds=self._now - now))
        return completion is not Completion.REFUSED

    def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:
        """Set the instants of a claim; `now` is the caller's."""
        record = lifecycle.shifted(record, seconds=self._now - now)
        renewed = lifecycle.renewed(self.get(record.idempotency_key), record)
        if renewed is not None:
            self._store(renewed)
        return renewed

    def release(self, record: DataRecord) -> bool:
        """Delete a claim."""
        ours = lifecycle.is_held_by(self.get(record.idempotency_key), record.owner)
        if ours:
            self.forget(record.idempotency_key)
        return ours

    def get(self, key: str) -> DataRecord | None:
        """Return the record of a key."""
        row = self._cursor.execute(_SELECT, (key,)).fetchone()
        return None if row is None else _record(key, *row)

    def forget(self, key: str) -> None:
        """Drop the record of a key."""
        self._cursor.execute(_DELETE, (key,))

    def finish(self) -> None:
        """Write what is owed once per transaction: the highest fence, and the removal of a few expired records.

        Claims remove more than they add, so the file stops growing; no caller waits for more than that.
        """
        if self._last_fence > self._stored_fence:
            self._cursor.execute(_UPDATE_LAST_FENCE, (self._last_fence,))
        if self._claims:
            self._cursor.execute(_PURGE, (int(self._now), PURGED_PER_CLAIM * self._claims))

    def _store(self, record: DataRecord) -> None:
        self._cursor.execute(_UPSERT, _row(record))
        self._last_fence = max(self._last_fence, record.fence)


def _row(record: DataRecord) -> tuple[str | int | None, ...]:
    return (
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
    )


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
