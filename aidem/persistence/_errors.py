"""Errors that several layers raise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem.exceptions import IdempotencyInvalidStatusError

if TYPE_CHECKING:
    from aidem.exceptions import IdempotencyPersistenceLayerError


def unknown_state(key: str, *, status: object, outcome: object) -> IdempotencyInvalidStatusError:
    """Return the error for a record with a status or an outcome that aidem does not know."""
    return IdempotencyInvalidStatusError(
        f"the record of idempotency key {key!r} has status {status!r} and outcome {outcome!r}, which this aidem does "
        "not know; upgrade aidem, or drop the record with forget(key)",
        key=key,
    )


def copy_of(error: IdempotencyPersistenceLayerError) -> IdempotencyPersistenceLayerError:
    """Return a copy of an error for one of many callers: each may add notes to its own."""
    copy = type(error)(str(error))
    copy.may_be_applied = error.may_be_applied
    copy.__cause__ = error.__cause__
    return copy
