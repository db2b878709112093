"""What operators do with keys: find them, and resolve, release or forget them; `python -m aidem` is made of it.

A claim is only resolved or released by taking it over first, so that nobody can race its owner or another operator.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aidem._http.response import RESPONSES, StoredResponse, text_of
from aidem._rules import lifecycle
from aidem._rules.canonical_json import encode
from aidem._rules.lifecycle import RecordState
from aidem._rules.record import OutcomeKind, RecordStatus
from aidem._runtime.clock import wall_clock
from aidem.exceptions import IdempotencyError, IdempotencySerializationError, IdempotencyUsageError
from aidem.persistence import SupportsPurge, SupportsScan, SupportsTakeOver
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer

__all__ = ["Found", "OperationRefusedError", "RecordState", "find", "forget", "look", "purge", "release", "resolve"]

HELD_SECONDS: Final = 5
"""How long an operator holds a claim; one who dies half-way leaves what was there before."""


class OperationRefusedError(IdempotencyError):
    """The record is not one that this may be done with; nothing was changed."""


class Found(NamedTuple):
    """A record, and its state at the moment of the look, by the layer's clock or else by this machine's.

    Attributes:
        record: As it is stored.
        state: What it means.
    """

    record: DataRecord
    state: RecordState


async def find(
    layer: PersistenceLayer, *, prefix: str = "", state: RecordState | None = None, limit: int | None = None
) -> AsyncGenerator[Found]:
    """Iterate over records, each once.

    Args:
        layer: Where they are.
        prefix: What their keys begin with.
        state: Only records in this state. Default: all.
        limit: How many at most. Default: all.

    Raises:
        IdempotencyUsageError: The layer cannot list its records.
    """
    if not isinstance(layer, SupportsScan):
        raise IdempotencyUsageError(f"{type(layer).__name__} cannot list its records: it has no scan()")
    status = None
    if state is not None and state is not RecordState.EXPIRED:
        status = RecordStatus.COMPLETED if state is RecordState.COMPLETED else RecordStatus.INPROGRESS
    left = limit
    async for record in layer.scan(prefix=prefix, status=status):
        if left == 0:
            return
        found = _seen(layer, record)
        if state in {None, found.state}:
            yield found
            left = None if left is None else left - 1


async def look(layer: PersistenceLayer, key: str) -> Found | None:
    """Return the record of a key; None: there is none."""
    record = await layer.get(key)
    return None if record is None else _seen(layer, record)


async def resolve(
    layer: PersistenceLayer,
    key: str,
    *,
    result: Any = None,
    unavailable: bool = False,
    kept_seconds: float = 3600,
    force: bool = False,
    max_clock_skew_seconds: float = 0.0,
) -> DataRecord:
    """Record that the effect of a claim has happened, so that later callers get its outcome; return the record.

    Args:
        layer: Where the record is.
        key: The idempotency key of a claim whose lease has passed: in doubt, or lapsed.
        result: What the function would have returned, as JSON values; of an HTTP request an
            `aidem.asgi.StoredResponse`. Default: None.
        unavailable: Whether the result is not known: later callers then get `IdempotencyResultUnavailableError`.
        kept_seconds: How long the outcome is kept. Default: an hour.
        force: Whether to take over a claim that may be running. Its function then goes on, and its effect may come in
            addition; its result is lost.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge.

    Raises:
        OperationRefusedError: There is no such claim, it is running, or it has an outcome.
        IdempotencySerializationError: The result is no JSON, or no response that can be sent.
        IdempotencyUsageError: The layer cannot take claims over.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    text = UNAVAILABLE_TEXT if unavailable else _text(result)
    taken = await _taken_over(layer, key, force=force, max_clock_skew_seconds=max_clock_skew_seconds)
    now = _now(layer)
    outcome = lifecycle.completed(
        taken,
        response_data=text,
        outcome=OutcomeKind.UNAVAILABLE if unavailable else None,
        expires_after_seconds=kept_seconds,
        now=now,
    )
    if not await layer.complete(outcome, now=now):
        raise _lost(key)
    return outcome


async def release(
    layer: PersistenceLayer, key: str, *, force: bool = False, max_clock_skew_seconds: float = 0.0
) -> None:
    """Record that the effect of a claim has not happened and will not, so that the next call runs.

    Args:
        layer: Where the record is.
        key: The idempotency key of a claim whose lease has passed: in doubt, or lapsed.
        force: Whether to release a claim that may be running: the next call then runs beside it.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge.

    Raises:
        OperationRefusedError: There is no such claim, it is running, or it has an outcome.
        IdempotencyUsageError: The layer cannot take claims over.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    taken = await _taken_over(layer, key, force=force, max_clock_skew_seconds=max_clock_skew_seconds)
    if not await layer.release(taken):
        raise _lost(key)


async def forget(
    layer: PersistenceLayer, key: str, *, force: bool = False, max_clock_skew_seconds: float = 0.0
) -> None:
    """Drop the record of a key, an outcome too, so that the next call runs. Local caches are not reached.

    Args:
        layer: Where the record is.
        key: The idempotency key.
        force: Whether to drop a claim that may be running: the next call then runs beside it.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge.

    Raises:
        OperationRefusedError: There is no record, or its claim is running.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    found = await look(layer, key)
    if found is None:
        raise OperationRefusedError(f"there is no record of {key}", key=key)
    if found.state is RecordState.RUNNING and not force:
        raise _refused(found)
    if found.state in {RecordState.LAPSED, RecordState.IN_DOUBT} and isinstance(layer, SupportsTakeOver):
        # Which cannot drop a claim that somebody has made meanwhile.
        await release(layer, key, force=force, max_clock_skew_seconds=max_clock_skew_seconds)
    else:
        await layer.forget(key)


async def purge(layer: PersistenceLayer) -> int:
    """Remove all records that have expired; return how many.

    Raises:
        IdempotencyUsageError: The store of this layer does that by itself.
    """
    if not isinstance(layer, SupportsPurge):
        raise IdempotencyUsageError(f"the store of {type(layer).__name__} removes expired records by itself")
    return await layer.purge()


def _text(result: Any) -> str:
    try:
        if not isinstance(result, StoredResponse):
            return encode(result)
        text = text_of(result)
        RESPONSES.from_dict(json.loads(text))
    except ValueError as error:
        raise IdempotencySerializationError(f"this result cannot be stored: {error}") from error
    return text


def _now(layer: PersistenceLayer) -> float:
    now: float = getattr(layer, "clock", wall_clock)()
    return now


def _seen(layer: PersistenceLayer, record: DataRecord) -> Found:
    return Found(record, lifecycle.state_of(record, now=_now(layer)))


async def _taken_over(layer: PersistenceLayer, key: str, *, force: bool, max_clock_skew_seconds: float) -> DataRecord:
    if not isinstance(layer, SupportsTakeOver):
        raise IdempotencyUsageError(f"{type(layer).__name__} cannot take claims over: it has no take_over()")
    found = await layer.get(key)
    if found is None:
        raise OperationRefusedError(f"there is no record of {key}", key=key)
    now = _now(layer)
    held = lifecycle.held_by_operator(found, owner=secrets.token_hex(16), held_seconds=HELD_SECONDS, now=now)
    taken = await layer.take_over(found, held, now=now, max_clock_skew_seconds=max_clock_skew_seconds, force=force)
    if taken is None:
        raise _refused(await look(layer, key), key=key)
    return taken


def _refused(found: Found | None, *, key: str = "") -> OperationRefusedError:
    if found is None:
        return OperationRefusedError(f"the record of {key} is gone: somebody else was quicker", key=key)
    record, state = found
    reasons = {
        RecordState.RUNNING: "is running; wait until its lease has passed",
        RecordState.COMPLETED: "has an outcome; drop it with forget if its function shall run again",
        RecordState.EXPIRED: "has expired: its function runs at the next call",
    }
    otherwise = "was changed by somebody else, its lease has hardly passed, or an open transaction holds it; look again"
    reason = reasons.get(state, otherwise)
    return OperationRefusedError(f"{record.idempotency_key} {reason}", record=record)


def _lost(key: str) -> OperationRefusedError:
    return OperationRefusedError(f"the claim of {key} was taken over by somebody else meanwhile; look again", key=key)
