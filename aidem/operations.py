"""What operators do with keys: find them, and resolve, release or forget them; `python -m aidem` is made of it.

A claim is only resolved or released by taking it over first, so that nobody can race its owner or another operator.
"""

from __future__ import annotations

import datetime
import json
import secrets
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aidem._checks import check_options
from aidem._http.request import OF_A_REQUEST
from aidem._http.response import RESPONSES, StoredResponse, text_of
from aidem._rules import lifecycle
from aidem._rules.canonical_json import encode
from aidem._rules.lifecycle import Claimed, LeaseTerms, RecordState
from aidem._rules.record import OutcomeKind, RecordStatus
from aidem._runtime.clock import wall_clock
from aidem.exceptions import IdempotencyError, IdempotencySerializationError, IdempotencyUsageError
from aidem.persistence import Diagnosis, SupportsDiagnosis, SupportsPurge, SupportsScan, SupportsTakeOver
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer

__all__ = [
    "Diagnosis",
    "Found",
    "OperationRefusedError",
    "RecordState",
    "diagnose",
    "find",
    "forget",
    "look",
    "purge",
    "release",
    "resolve",
]

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
    layer: PersistenceLayer,
    *,
    prefix: str = "",
    state: RecordState | None = None,
    limit: int | None = None,
    seen: Callable[[DataRecord], object] | None = None,
) -> AsyncGenerator[Found]:
    """Iterate over records, each once.

    Args:
        layer: Where they are.
        prefix: What their keys begin with.
        state: Only records in this state. Default: all.
        limit: How many at most. Default: all.
        seen: Called with every record that is read, also with those in another state, to show progress.

    Raises:
        IdempotencyUsageError: The layer cannot list its records, or the limit is negative.
    """
    check_options(limit=limit)
    if not isinstance(layer, SupportsScan):
        raise IdempotencyUsageError(f"{type(layer).__name__} cannot list its records: it has no scan()")
    status = None
    if state not in {None, RecordState.EXPIRED} and seen is None:
        status = RecordStatus.COMPLETED if state is RecordState.COMPLETED else RecordStatus.INPROGRESS
    left = inf if limit is None else limit
    if not left:
        return
    async for record in layer.scan(prefix=prefix, status=status):
        if seen is not None:
            seen(record)
        found = _seen(layer, record)
        if state in {None, found.state}:
            yield found
            left -= 1
            if not left:  # the next one may be many pages away
                return


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
        result: What the function would have returned, as JSON values. A claim of an HTTP request takes an
            `aidem.asgi.StoredResponse`, and nothing else does. Default: None.
        unavailable: Whether the result is not known: later callers then get `IdempotencyResultUnavailableError`.
        kept_seconds: How long the outcome is kept. Default: 3600, an hour.
        force: Whether to take over a claim that may be running. Its function then goes on, and its effect may come in
            addition; its result is lost. Default: False.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge. Default: 0.

    Raises:
        OperationRefusedError: There is no such claim, it is running, it has an outcome, or it is of an HTTP request and
            the result is not a response, or the other way round.
        IdempotencySerializationError: The result is no JSON, or no response that can be sent.
        IdempotencyUsageError: The layer cannot take claims over, or an option has a value that cannot work.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    check_options(kept_seconds=kept_seconds, max_clock_skew_seconds=max_clock_skew_seconds)
    try:
        if unavailable:
            text = UNAVAILABLE_TEXT
        elif isinstance(result, StoredResponse):
            text = text_of(result)
            RESPONSES.from_dict(json.loads(text))
        else:
            text = encode(result)
    except ValueError as error:
        raise IdempotencySerializationError(f"this result cannot be stored: {error}", key=key) from error
    taken = await _taken_over(
        layer,
        key,
        by_response=None if unavailable else isinstance(result, StoredResponse),
        force=force,
        max_clock_skew_seconds=max_clock_skew_seconds,
    )
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
        force: Whether to release a claim that may be running: the next call then runs beside it. Default: False.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge. Default: 0.

    Raises:
        OperationRefusedError: There is no such claim, it is running, or it has an outcome.
        IdempotencyUsageError: The layer cannot take claims over, or an option has a value that cannot work.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    check_options(max_clock_skew_seconds=max_clock_skew_seconds)
    taken = await _taken_over(layer, key, force=force, max_clock_skew_seconds=max_clock_skew_seconds)
    if not await layer.release(taken):
        raise _lost(key)


async def forget(
    layer: PersistenceLayer, key: str, *, force: bool = False, max_clock_skew_seconds: float = 0.0
) -> None:
    """Drop the record of a key, an outcome too, so that the next call runs. Local caches are not reached.

    A lapsed claim, one in doubt and an expired record are dropped under a claim of our own, so that no new claim is, if
    the layer can take claims over. An outcome, and with `force` a running claim, is looked at and then deleted: if the
    outcome expires or is dropped by somebody else between the two, and a call claims the key, that claim is dropped.

    Args:
        layer: Where the record is.
        key: The idempotency key.
        force: Whether to drop a claim that may be running: the next call then runs beside it. Default: False.
        max_clock_skew_seconds: Added to the lease, where clients' clocks judge. Default: 0.

    Raises:
        OperationRefusedError: There is no record, or its claim is running.
        IdempotencyUsageError: An option has a value that cannot work.
        IdempotencyPersistenceLayerError: The layer failed.
    """
    check_options(max_clock_skew_seconds=max_clock_skew_seconds)
    found = await look(layer, key)
    if found is None:
        raise _missing(key)
    if found.state is RecordState.RUNNING and not force:
        raise _refused(found)
    if found.state in {RecordState.LAPSED, RecordState.IN_DOUBT} and isinstance(layer, SupportsTakeOver):
        await release(layer, key, force=force, max_clock_skew_seconds=max_clock_skew_seconds)
    elif found.state is RecordState.EXPIRED:
        await _drop_expired(layer, key)
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


async def diagnose(layer: PersistenceLayer) -> Diagnosis:
    """Connect, and return what the store is and which of its settings endanger records; nothing is changed.

    Raises:
        IdempotencyPersistenceLayerError: The store cannot be reached or used.
    """
    if isinstance(layer, SupportsDiagnosis):
        return await layer.diagnose()
    await layer.open()
    return Diagnosis({}, ())


def is_of_request(record: DataRecord) -> bool:
    """Whether an HTTP layer made the record, so that its outcome is a response."""
    return record.payload_hash.startswith(OF_A_REQUEST)


def instant(seconds: float) -> str:
    """Return epoch seconds as text in UTC, and as they are where the calendar ends."""
    try:
        return datetime.datetime.fromtimestamp(int(seconds), tz=datetime.UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return str(int(seconds))


_KINDS: Final = {
    True: ("an HTTP request", "its response: --status, --header and --body, or an aidem.asgi.StoredResponse"),
    False: ("a function or a block, not of an HTTP request", "--result, what it would have returned, as JSON values"),
}


def _now(layer: PersistenceLayer) -> float:
    now: float = getattr(layer, "clock", wall_clock)()
    return now


def _seen(layer: PersistenceLayer, record: DataRecord) -> Found:
    return Found(record, lifecycle.state_of(record, now=_now(layer)))


async def _taken_over(
    layer: PersistenceLayer,
    key: str,
    *,
    by_response: bool | None = None,
    force: bool,
    max_clock_skew_seconds: float,
) -> DataRecord:
    """Take the claim of a key over; return it.

    Args:
        layer: Where the record is.
        key: The idempotency key.
        by_response: Whether it is then resolved with a response, or with the result of a function. Default: neither.
        force: Whether its lease does not count.
        max_clock_skew_seconds: Added to the lease.
    """
    if not isinstance(layer, SupportsTakeOver):
        raise IdempotencyUsageError(f"{type(layer).__name__} cannot take claims over: it has no take_over()")
    found = await layer.get(key)
    if found is None:
        raise _missing(key)
    if by_response is not None and by_response is not is_of_request(found):
        what, takes = _KINDS[is_of_request(found)]
        raise OperationRefusedError(f"{key} is the key of {what}; resolve it with {takes}", record=found)
    now = _now(layer)
    held = lifecycle.held_by_operator(found, owner=secrets.token_hex(16), held_seconds=HELD_SECONDS, now=now)
    taken = await layer.take_over(found, held, now=now, max_clock_skew_seconds=max_clock_skew_seconds, force=force)
    if taken is not None:
        return taken
    seen = await look(layer, key)
    if seen is None:
        raise OperationRefusedError(f"the record of {key} is gone: somebody else was quicker", key=key)
    raise _refused(seen, force=force)


async def _drop_expired(layer: PersistenceLayer, key: str) -> None:
    """Drop a record that has expired, and not the claim of a call that comes meanwhile: by a claim of our own."""
    now = _now(layer)
    lease = LeaseTerms(expires_after_seconds=HELD_SECONDS, lease_seconds=HELD_SECONDS, may_be_taken_over=True)
    claim = lifecycle.claim(key, owner=secrets.token_hex(16), payload_hash="", lease=lease, now=now)
    answer = await layer.acquire(claim, now=now)
    if isinstance(answer, Claimed):
        await layer.release(answer.record)
    elif answer.record.status is RecordStatus.COMPLETED:  # by the store's clock it has not expired yet
        await layer.forget(key)
    else:
        raise _refused(_seen(layer, answer.record))


def _refused(found: Found, *, force: bool = False) -> OperationRefusedError:
    record, state = found
    if state is RecordState.RUNNING and not force:
        end = lifecycle.held_until(record)
        until = "for ever" if end == inf else f"until {instant(end / 1000)}"
        noted = "" if record.note is None else f" (note: {record.note})"
        reason = (
            f"is running{noted}: its lease holds {until}, or longer if its owner renews it; wait until the lease has "
            "passed, or force it, and then its effect may come twice"
        )
    else:
        otherwise = "was changed by somebody else, has hardly lapsed, or an open transaction holds it; look again"
        reason = _REASONS.get(state, otherwise)
    return OperationRefusedError(f"{record.idempotency_key} {reason}", record=record)


_REASONS: Final = {
    RecordState.RUNNING: "is held by an open transaction; try again when that has ended",
    RecordState.COMPLETED: "has an outcome; drop it with forget if its function shall run again",
    RecordState.EXPIRED: "has expired: its function runs at the next call",
}


def _missing(key: str) -> OperationRefusedError:
    return OperationRefusedError(f"there is no record of {key}", key=key)


def _lost(key: str) -> OperationRefusedError:
    return OperationRefusedError(f"the claim of {key} was taken over by somebody else meanwhile; look again", key=key)
