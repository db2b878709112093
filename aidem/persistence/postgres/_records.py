"""A record as a row, and what the statements are given of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aidem._rules import lifecycle
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.persistence._errors import unknown_state
from aidem.persistence.postgres._statements import RELEASED

if TYPE_CHECKING:
    from collections.abc import Sequence


def record_of(key: str, row: Sequence[Any]) -> DataRecord | None:
    """Return the record in a row, after the time and the verdict; None where there is none, or it was released.

    Raises:
        IdempotencyInvalidStatusError: It has a status or an outcome that aidem does not know.
    """
    expiration, in_progress_expiration, lease_expiration, status, data, validation, owner, fence, outcome, note = row[
        2:12
    ]
    if status is None or status == RELEASED:
        return None
    try:
        return DataRecord(
            idempotency_key=key,
            status=RecordStatus(status),
            expiry_timestamp=expiration,
            in_progress_expiry_timestamp=in_progress_expiration,
            lease_expiry_timestamp=lease_expiration,
            response_data=data,
            outcome=None if outcome is None else OutcomeKind(outcome),
            payload_hash=validation or "",
            owner=owner,
            fence=fence,
            note=note,
        )
    except ValueError as error:
        raise unknown_state(key, status=status, outcome=outcome) from error


def durations(
    record: DataRecord, *, now: float, to_nearest_second: bool = False
) -> tuple[int | None, int | None, int | None]:
    """Return how many milliseconds after `now` its expiry, its in-progress expiry and its lease expiry come.

    The store rounds its expiry up to a second, or with `to_nearest_second` to the nearest one.
    """
    start = lifecycle.milliseconds(now)
    expiry, in_progress, lease = (
        record.expiry_timestamp,
        record.in_progress_expiry_timestamp,
        record.lease_expiry_timestamp,
    )
    return (
        None if expiry is None else expiry * 1000 - start - lifecycle.HALF_A_SECOND * to_nearest_second,
        None if in_progress is None else in_progress - start,
        None if lease is None else lease - start,
    )
