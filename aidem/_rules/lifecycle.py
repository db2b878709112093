"""The algorithm: what a record means at an instant, and what an operation or a call does about it.

Everything here is pure: the instant (`now`, epoch seconds), the token of a claim and the record found are arguments.
The engine asks the second half, layers that can run Python under their own atomic step ask the first; layers whose
server decides (a condition expression, a script) mirror it, and the conformance suite proves that they agree.

                 acquire                  complete (ours and INPROGRESS, or no record)
    (no record) ─────────► INPROGRESS ──────────────────────────────────────────────► COMPLETED
         ▲                  │  ▲   │                                                      │
         │ release (ours    │  └───┘ acquire, once the lease has passed                   │
         │ and INPROGRESS)  │  └───┘ renew (ours and INPROGRESS)      expiry passed: as if absent
         └──────────────────┘◄────────────────────────────────────────────────────────────┘

The rules, each in one place:

- *expired*: `expiry < now`, `now` floored to seconds. An expired record counts as absent, whether or not the store
  has purged it already.
- *lapsed*: INPROGRESS and `in_progress_expiry < now`, in milliseconds. A lapsed claim may be taken over.
- *in doubt*: INPROGRESS, never to be taken over, and `lease_expiry < now`: its owner vanished.
- *given up*: INPROGRESS, never to be taken over, and `lease_expiry == 0`: its owner left it in doubt. That is final: a
  renewal that arrives late must not make it look held again.
- *ours*: the stored owner is our token and the status is INPROGRESS. Only then may we renew or release; we may
  complete also where no record is left. A record without an owner is never ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from math import ceil, inf
from typing import Final, NamedTuple

from aidem._rules.record import COMPLETED, INPROGRESS, DataRecord, OutcomeKind, RecordStatus

GIVEN_UP: Final = 0
"""The lease expiry of a claim that its owner left in doubt; no lease that merely passed ends then."""

HALF_A_SECOND: Final = 500
"""A taken-over claim expires at the nearest second by the layer's clock: the next one would be later at each check that
puts a claim back, and so doubt would never expire."""

# --- What layers answer ---------------------------------------------------------------------------------------------


class Claimed(NamedTuple):
    """The key is ours.

    Attributes:
        record: The claim as stored: with its fence, and with instants by the store's clock where it has one.
        taken_over: Whether a lapsed claim was there; layers whose store does not say leave it False.
    """

    record: DataRecord
    taken_over: bool = False


class Blocked(NamedTuple):
    """A live record of another owner is there.

    Attributes:
        record: The record found.
        now: Epoch seconds by the clock that judged it; None: by the caller's.
    """

    record: DataRecord
    now: float | None = None


class Commitment(Enum):
    """What has become of an outcome that was written in a transaction of the body's."""

    COMMITTED = auto()
    OPEN = auto()  # the transaction may yet be committed
    ROLLED_BACK = auto()
    LOST = auto()  # the claim is not ours any more


class Completion(Enum):
    """The answer to a completion."""

    STORE = auto()
    ALREADY_STORED = auto()
    REFUSED = auto()


_STORE: Final = Completion.STORE

# --- What a record means at an instant ------------------------------------------------------------------------------


def is_expired(record: DataRecord, *, now: float) -> bool:
    """Whether the record counts as absent."""
    return record.expiry_timestamp is not None and record.expiry_timestamp < int(now)


def is_lapsed(record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> bool:
    """Whether the record is a claim that another caller may take over."""
    end = record.in_progress_expiry_timestamp
    return record.status is INPROGRESS and end is not None and end < milliseconds(now - max_clock_skew_seconds)


def is_held_by(record: DataRecord | None, owner: str | None) -> bool:
    """Whether the record is a claim of that owner, so that the owner may renew, release or complete it."""
    return record is not None and owner is not None and record.owner == owner and record.status is INPROGRESS


def status_of(record: DataRecord, *, now: float) -> RecordStatus:
    """Return the status at an instant, `EXPIRED` included."""
    return RecordStatus.EXPIRED if is_expired(record, now=now) else record.status


class RecordState(StrEnum):
    """What a record means to operators at an instant."""

    RUNNING = "running"
    LAPSED = "lapsed"
    IN_DOUBT = "in doubt"
    COMPLETED = "completed"
    EXPIRED = "expired"


def state_of(record: DataRecord, *, now: float) -> RecordState:
    """Return the state of a record: a lapsed claim runs at the next call, one in doubt has to be resolved."""
    if is_expired(record, now=now):
        return RecordState.EXPIRED
    if record.status is COMPLETED:
        return RecordState.COMPLETED
    if is_lapsed(record, now=now):
        return RecordState.LAPSED
    return RecordState.IN_DOUBT if is_in_doubt(record, now=now) else RecordState.RUNNING


def lease_end(record: DataRecord) -> int | None:
    """Return when the claim lapses or becomes in doubt, in epoch milliseconds; None: it holds until it expires."""
    if record.in_progress_expiry_timestamp is not None:
        return record.in_progress_expiry_timestamp
    return record.lease_expiry_timestamp


def blocks_for_seconds(record: DataRecord, *, now: float) -> float | None:
    """Return for how many seconds a claim yet keeps others from acquiring its key; None: for ever."""
    ends: list[float] = []
    if record.in_progress_expiry_timestamp is not None:
        ends.append(record.in_progress_expiry_timestamp / 1000)
    if record.expiry_timestamp is not None:
        ends.append(record.expiry_timestamp + 1.0)  # it counts as absent from the next second on
    return min(ends) - now if ends else None


def is_given_up(record: DataRecord) -> bool:
    """Whether the record is a claim that its owner left in doubt at once."""
    return lease_end(record) == GIVEN_UP


def held_until(record: DataRecord) -> float:
    """Return until when the claim holds, in epoch milliseconds: the end of its lease, or without one its expiry."""
    end = lease_end(record)
    if end is not None:
        return end
    # It counts as absent from the next second on.
    return inf if record.expiry_timestamp is None else (record.expiry_timestamp + 1) * 1000


# --- The operations of a layer, given the record found --------------------------------------------------------------


def acquire(
    found: DataRecord | None,
    proposed: DataRecord,
    *,
    now: float,
    proposed_at: float | None = None,
    max_clock_skew_seconds: float = 0.0,
    last_fence: int = 0,
) -> Claimed | Blocked:
    """Decide a claim.

    Args:
        found: The record in the store.
        proposed: The claim to store; its fence is set here.
        now: Epoch seconds.
        proposed_at: Epoch seconds by the caller's clock, from which the instants of `proposed` count; None: `now`.
        max_clock_skew_seconds: Added to a foreign lease before it may be taken over.
        last_fence: The highest fence the store has given out, if it knows; the new one is higher.
    """
    if proposed_at is not None:
        proposed = shifted(proposed, seconds=now - proposed_at)
    if found is None or is_expired(found, now=now):
        return Claimed(_fenced(proposed, found, now=now, last_fence=last_fence))
    if is_held_by(found, proposed.owner):
        return Claimed(found)  # our own write, whose reply was lost
    if is_lapsed(found, now=now, max_clock_skew_seconds=max_clock_skew_seconds):
        return Claimed(_fenced(proposed, found, now=now, last_fence=last_fence), taken_over=True)
    return Blocked(found, now)


def acquire_held(found: DataRecord | None) -> Blocked | None:
    """Decide a request for a claim while a transaction holds the record; None: no claim is there to wait for.

    A claim counts as running then, lapsed or expired: the transaction may yet complete it.
    """
    is_claim = found is not None and found.status is INPROGRESS
    return Blocked(found) if found is not None and is_claim else None


def commitment(found: DataRecord | None, owner: str | None, *, is_free: bool) -> Commitment:
    """Decide what has become of an outcome of the owner's, by the record that the layer sees afterwards.

    Args:
        found: The record; None: there is none.
        owner: Who has written the outcome.
        is_free: Whether no open transaction holds the record.
    """
    if is_held_by(found, owner):
        return Commitment.ROLLED_BACK if is_free else Commitment.OPEN
    is_ours = found is not None and found.owner == owner
    return Commitment.COMMITTED if is_ours else Commitment.LOST


def complete(found: DataRecord | None, record: DataRecord, *, now: float) -> Completion:
    """Decide a completion: it must not change a foreign record, nor another outcome of ours."""
    if found is None or is_held_by(found, record.owner) or is_expired(found, now=now):
        return _STORE
    ours = record.owner, COMPLETED, record.response_data, record.outcome
    if record.owner is not None and (found.owner, found.status, found.response_data, found.outcome) == ours:
        return Completion.ALREADY_STORED  # our own write, whose reply was lost
    return Completion.REFUSED


def renewed(found: DataRecord | None, record: DataRecord) -> DataRecord | None:
    """Return what is stored after a renewal to the instants of `record`; None: the claim is not ours any more.

    Renewals may arrive late, twice and out of order. One that would move the claim back changes nothing, as does one
    of a claim that was given up meanwhile: nobody may be told that it is held.
    """
    if found is None or not is_held_by(found, record.owner):
        return None
    if not is_given_up(record):
        if is_given_up(found):
            return None
        if held_until(record) < held_until(found):
            return found
    return found.replace(
        expiry_timestamp=record.expiry_timestamp,
        in_progress_expiry_timestamp=record.in_progress_expiry_timestamp,
        lease_expiry_timestamp=record.lease_expiry_timestamp,
    )


def taken_over(
    stored: DataRecord | None,
    found: DataRecord,
    proposed: DataRecord,
    *,
    now: float,
    proposed_at: float | None = None,
    max_clock_skew_seconds: float = 0.0,
    force: bool = False,
    last_fence: int = 0,
) -> DataRecord | None:
    """Return what is stored after the claim `found` was taken over to resolve it; None: nothing changes.

    Unlike `acquire` this takes over one claim and no other, and also one that must not be taken over to run again: so
    a request that arrives late, when that claim is gone, takes nothing.

    Args:
        stored: The record in the store.
        found: The claim that is to be taken over, as it was read before; its owner and its fence name it.
        proposed: The claim to store in its place; its fence is set here.
        now: Epoch seconds.
        proposed_at: See `acquire`.
        max_clock_skew_seconds: Added to the lease.
        force: Whether to take over a claim whose lease has not passed.
        last_fence: See `acquire`.
    """
    if stored is None or stored.status is not INPROGRESS or is_expired(stored, now=now):
        return None
    if is_held_by(stored, proposed.owner):
        return stored  # our own write, whose reply was lost
    if (stored.owner, stored.fence) != (found.owner, found.fence):
        return None
    end = lease_end(stored)
    has_passed = end is not None and end < milliseconds(now - max_clock_skew_seconds)
    if not (has_passed or force):
        return None
    if proposed_at is not None:
        proposed = shifted(proposed, seconds=now - proposed_at, to_nearest_second=True)
    return _fenced(proposed, stored, now=now, last_fence=last_fence)


def _fenced(proposed: DataRecord, found: DataRecord | None, *, now: float, last_fence: int) -> DataRecord:
    fence = milliseconds(now)
    if found is not None:
        fence = (found.fence or fence) + 1
    return DataRecord.__new__(
        DataRecord,
        idempotency_key=proposed.idempotency_key,
        status=proposed.status,
        expiry_timestamp=proposed.expiry_timestamp,
        in_progress_expiry_timestamp=proposed.in_progress_expiry_timestamp,
        lease_expiry_timestamp=proposed.lease_expiry_timestamp,
        payload_hash=proposed.payload_hash,
        sort_key=proposed.sort_key,
        owner=proposed.owner,
        fence=max(fence, last_fence + 1),
        note=proposed.note,
    )


# --- The records a call proposes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """How long a claim of a call holds.

    Attributes:
        expires_after_seconds: How long the claim is kept at least: as long as an outcome, or as long as doubt.
        lease_seconds: How long it holds without being renewed; None: until it expires.
        may_be_taken_over: Whether a lapsed claim goes to the next caller (at least once) or is in doubt.
        max_clock_skew_seconds: Time that other callers add to its lease before they take it over.
    """

    expires_after_seconds: float
    lease_seconds: float | None
    may_be_taken_over: bool
    max_clock_skew_seconds: float = 0.0

    def instants(self, *, now: float) -> tuple[int, int | None, int | None]:
        """Return expiry (seconds), in-progress expiry and lease expiry (milliseconds) of a claim made or renewed now.

        The record never expires before the lease and the clock skew have passed.
        """
        expiry = int(now + self.expires_after_seconds)
        if self.lease_seconds is None:
            return expiry, None, None
        end = int((now + self.lease_seconds) * 1000)
        held_until = int((now + self.lease_seconds + self.max_clock_skew_seconds) * 1000)
        expiry = max(expiry, -(-held_until // 1000))
        return (expiry, end, None) if self.may_be_taken_over else (expiry, None, end)


def claim(
    key: str, *, owner: str, payload_hash: str, lease: LeaseTerms, now: float, note: str | None = None
) -> DataRecord:
    """Return the claim to propose to a layer."""
    expiry, in_progress_expiry, lease_expiry = lease.instants(now=now)
    return DataRecord.__new__(
        DataRecord,
        idempotency_key=key,
        status=INPROGRESS,
        expiry_timestamp=expiry,
        in_progress_expiry_timestamp=in_progress_expiry,
        lease_expiry_timestamp=lease_expiry,
        payload_hash=payload_hash,
        owner=owner,
        note=note,
    )


def renewal(claimed: DataRecord, *, lease: LeaseTerms, now: float) -> DataRecord:
    """Return a claim with its instants counted from now."""
    expiry, in_progress_expiry, lease_expiry = lease.instants(now=now)
    return claimed.replace(
        expiry_timestamp=expiry,
        in_progress_expiry_timestamp=in_progress_expiry,
        lease_expiry_timestamp=lease_expiry,
    )


def abandoned(claimed: DataRecord) -> DataRecord:
    """Return a claim that is given up: in doubt at once."""
    return claimed.replace(lease_expiry_timestamp=GIVEN_UP)


def held_by_operator(found: DataRecord, *, owner: str, held_seconds: float, now: float) -> DataRecord:
    """Return the claim with which an operator takes over the one found: of its kind, for a short time."""
    end = milliseconds(now + held_seconds)
    in_progress, lease = found.in_progress_expiry_timestamp, found.lease_expiry_timestamp
    expiry = found.expiry_timestamp
    return found.replace(
        owner=owner,
        expiry_timestamp=None if expiry is None else max(expiry, ceil(now + held_seconds)),
        in_progress_expiry_timestamp=None if in_progress is None else end,
        lease_expiry_timestamp=end if in_progress is None and lease is not None else None,
    )


def completed(
    claimed: DataRecord,
    *,
    response_data: str,
    outcome: OutcomeKind | None,
    expires_after_seconds: float,
    now: float,
) -> DataRecord:
    """Return the completed record of a claim; the window counts from now."""
    return DataRecord.__new__(
        DataRecord,
        idempotency_key=claimed.idempotency_key,
        status=COMPLETED,
        expiry_timestamp=int(now + expires_after_seconds),
        response_data=response_data,
        outcome=outcome,
        payload_hash=claimed.payload_hash,
        sort_key=claimed.sort_key,
        owner=claimed.owner,
        fence=claimed.fence,
        note=claimed.note,
    )


def shifted(record: DataRecord, *, seconds: float, to_nearest_second: bool = False) -> DataRecord:
    """Return the record with its instants moved from the caller's clock to the layer's.

    A queue or a busy file may have held the operation up; the durations that the caller asked for count from the
    moment it is done. The expiry moves by whole seconds, rounded up or to the nearest.
    """
    delta = int(seconds * 1000)
    if delta == 0:
        return record
    in_progress_expiry, lease_expiry = (
        instant + delta if instant else instant  # none, or `GIVEN_UP`
        for instant in (record.in_progress_expiry_timestamp, record.lease_expiry_timestamp)
    )
    expiry, rounding = record.expiry_timestamp, HALF_A_SECOND if to_nearest_second else 999
    return record.replace(
        expiry_timestamp=None if expiry is None else expiry + (delta + rounding) // 1000,
        in_progress_expiry_timestamp=in_progress_expiry,
        lease_expiry_timestamp=lease_expiry,
    )


def milliseconds(seconds: float) -> int:
    """Return epoch milliseconds, floored."""
    return int(seconds * 1000)


# --- What a call does about the record that blocks it ---------------------------------------------------------------


class NextStep(Enum):
    """The step of a call that found a live record."""

    REPLAY = auto()
    WAIT = auto()
    IN_DOUBT = auto()
    MISMATCH = auto()


_REPLAY: Final = NextStep.REPLAY


def next_step(record: DataRecord, *, payload_hash: str, now: float) -> NextStep:
    """Decide what a call does about a live record: the hash first, also while it is INPROGRESS."""
    if differs(record, payload_hash):
        return NextStep.MISMATCH
    if record.status is COMPLETED:
        return _REPLAY
    if is_in_doubt(record, now=now):
        return NextStep.IN_DOUBT
    return NextStep.WAIT


def differs(record: DataRecord, payload_hash: str) -> bool:
    """Whether the record was made for another payload; a side that has no hash is not compared."""
    return bool(record.payload_hash and payload_hash) and record.payload_hash != payload_hash


def is_in_doubt(record: DataRecord, *, now: float) -> bool:
    """Whether the record is a claim whose owner vanished and that must not be taken over."""
    return (
        record.status is INPROGRESS
        and record.in_progress_expiry_timestamp is None
        and record.lease_expiry_timestamp is not None
        and record.lease_expiry_timestamp < milliseconds(now)
    )
