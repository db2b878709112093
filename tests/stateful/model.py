"""The judge of the stateful tests: aidem's promises in plain words, checked against everything that is seen.

It shares no rule with `aidem._rules.lifecycle`: what a record means is written down here once more, as plainly as can
be.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aidem import DataRecord, RecordStatus
from aidem._rules.record import OutcomeKind
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceLayerError,
    IdempotencyValidationError,
)
from aidem.persistence import Blocked, Claimed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aidem import IdempotencyConfig


class DeclinedError(Exception):
    """The body failed, and says so: the key is given back."""


class RefusedError(Exception):
    """The body failed, and that is its outcome."""


# --- What is seen -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """One operation as the store did it, with the record right before and right after."""

    operation: str
    key: str
    owner: str | None
    answer: Any
    before: DataRecord | None
    after: DataRecord | None


@dataclass(eq=False, kw_only=True)
class Run:
    """One body that was started."""

    number: int
    call: CallSeen
    owner: str
    gate: asyncio.Future[str]
    ending: str = "running"  # then: returned, refused, declined, cancelled, killed


@dataclass(eq=False, kw_only=True)
class CallSeen:
    """One call, from outside."""

    key: str
    amount: int
    config: IdempotencyConfig
    started_at: float
    is_cancelled: bool = False
    faults: int = 0
    owners: set[str | None] = field(default_factory=set)
    runs: list[Run] = field(default_factory=list)

    @property
    def is_at_most_once(self) -> bool:
        return self.config.on_abandoned == "raise"


@dataclass(frozen=True)
class Outcome:
    """What was recorded: the number of the run, whether it refused, and until when it counts."""

    number: int
    is_refusal: bool
    until: int

    @classmethod
    def of(cls, record: DataRecord) -> Outcome:
        assert record.response_data is not None
        number = int(re.findall(r"\d+", record.response_data)[-1])
        return cls(number, record.outcome is OutcomeKind.EXCEPTION, record.expiry_timestamp or 0)


# --- What a record means ----------------------------------------------------------------------------------------------


def counts(record: DataRecord | None, now: float) -> bool:
    return record is not None and record.expiry_timestamp is not None and record.expiry_timestamp >= int(now)


def is_outcome(record: DataRecord | None, now: float) -> bool:
    return counts(record, now) and record is not None and record.status is RecordStatus.COMPLETED


def is_held(record: DataRecord | None, now: float) -> bool:
    """Whether nobody else may start: the lease lasts, or it must never be taken over."""
    if record is None or not counts(record, now) or is_outcome(record, now):
        return False
    end = record.in_progress_expiry_timestamp
    return end is None or end >= int(now * 1000)


def is_in_doubt(record: DataRecord | None, now: float) -> bool:
    if record is None or not is_held(record, now) or record.in_progress_expiry_timestamp is not None:
        return False
    return record.lease_expiry_timestamp is not None and record.lease_expiry_timestamp < int(now * 1000)


def is_claim_of(record: DataRecord | None, owner: str | None) -> bool:
    return record is not None and record.status is RecordStatus.INPROGRESS and record.owner == owner


# --- The promises -----------------------------------------------------------------------------------------------------


class Judge:
    """Keeps what the store has said, and a list of every promise that was broken.

    It raises nothing itself: it is called within operations, where the engine would take an error for the store's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.broken: list[str] = []
        self.records: dict[str, DataRecord | None] = {}
        self.runs: list[Run] = []
        self._fences: defaultdict[str, int] = defaultdict(int)
        self._outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
        self._windows: dict[str | None, int] = {}  # until when what an owner stored counts

    def _check(self, promise: str, *, kept: bool, about: object = "") -> None:
        if not kept:
            self.broken.append(f"{promise}: {about}")

    # --- Operations of the store ---

    def saw(self, write: Write) -> None:
        """Judge one operation."""
        self.records[write.key] = write.after
        if write.after is not None and write.after.expiry_timestamp is not None:
            self._windows[write.after.owner] = write.after.expiry_timestamp
        {
            "acquire": self._saw_acquire,
            "complete": self._saw_complete,
            "renew": self._saw_renew,
            "release": self._saw_release,
            "get": self._saw_get,
        }[write.operation](write)

    def _saw_acquire(self, write: Write) -> None:
        now, before = self.clock(), write.before
        if isinstance(write.answer, Blocked):
            self._unchanged(write)
            is_live = is_held(before, now) or is_outcome(before, now)
            self._check("a free key can be claimed", kept=is_live, about=write)
            return
        assert isinstance(write.answer, Claimed)
        if is_claim_of(before, write.owner):
            self._unchanged(write)
            return
        key, fence = write.key, write.answer.record.fence
        self._check("a lease that is held is not given to another", kept=not is_held(before, now), about=write)
        self._check("a key with an outcome is not claimed", kept=not is_outcome(before, now), about=write)
        self._check("fences grow", kept=fence > self._fences[key], about=write)
        self._check("a claim is stored", kept=is_claim_of(write.after, write.owner), about=write)
        self._fences[key] = fence

    def _saw_complete(self, write: Write) -> None:
        now, before = self.clock(), write.before
        may = not counts(before, now) or is_claim_of(before, write.owner)
        was_done = is_outcome(before, now) and before is not None and before.owner == write.owner
        if not write.answer or was_done:
            self._unchanged(write)
            self._check("an owner may complete", kept=was_done or not may, about=write)
            return
        self._check("a late owner does not complete", kept=may, about=write)
        self._check("an outcome is stored", kept=is_outcome(write.after, now), about=write)
        if write.after is not None:
            self._outcomes[write.key].append(Outcome.of(write.after))

    def _saw_renew(self, write: Write) -> None:
        if is_claim_of(write.before, write.owner):
            self._check("a renewed claim stays", kept=is_claim_of(write.after, write.owner), about=write)
        else:
            self._check("a late owner does not renew", kept=write.answer is None, about=write)
            self._unchanged(write)

    def _saw_release(self, write: Write) -> None:
        if is_claim_of(write.before, write.owner):
            self._check("a released claim is gone", kept=write.after is None, about=write)
        else:
            self._check("a late owner does not release", kept=not write.answer, about=write)
            self._unchanged(write)

    def _saw_get(self, write: Write) -> None:
        self._unchanged(write)

    def _unchanged(self, write: Write) -> None:
        self._check("whoever does not own a record leaves it alone", kept=write.before == write.after, about=write)

    # --- Bodies ---

    def body_starts(self, run: Run) -> None:
        """Judge the start of a body."""
        now, record = self.clock(), self.records.get(run.call.key)
        is_ours = record is not None and record.owner == run.owner
        self._check("P2: no body starts while another holds the lease", kept=is_ours or not is_held(record, now))
        self._check("P1: no body starts after the outcome is recorded", kept=is_ours or not is_outcome(record, now))
        for other in self.runs:
            if other.call.key == run.call.key and other.call.is_at_most_once and other.ending != "declined":
                is_past = self._windows[other.owner] < int(now)
                self._check("P4: no body starts while the fate of another is unknown", kept=is_past, about=other)
        self.runs.append(run)
        run.call.runs.append(run)

    def confirmed(self, run: Run) -> None:
        """Judge an `ensure_owned()` that passed."""
        record = self.records.get(run.call.key)
        is_ours = is_claim_of(record, run.owner) and is_held(record, self.clock())
        self._check("ensure_owned() passes only for the owner", kept=is_ours, about=record)

    # --- Calls ---

    def answered(self, call: CallSeen, answer: int | BaseException, *, faults: int) -> None:
        """Judge how a call ended; `faults` are those of its process so far."""
        if isinstance(answer, int | RefusedError):
            is_refusal = isinstance(answer, RefusedError)
            number = answer.args[0] if isinstance(answer, RefusedError) else answer
            live = [(o.number, o.is_refusal) for o in self._outcomes[call.key] if o.until >= int(call.started_at)]
            is_own = is_refusal and any(run.number == number for run in call.runs)  # the body's exception always wins
            kept = is_own or (number, is_refusal) in live
            self._check(
                "P1: who gets an outcome gets the recorded one",
                kept=kept,
                about=(answer, live, self._outcomes[call.key], call),
            )
        else:
            kept = self._may_raise(call, answer, faults=faults)
            self._check("an error says what happened", kept=kept, about=(repr(answer), call))
        if not call.faults:
            self._left_nothing(call)

    def _may_raise(self, call: CallSeen, error: BaseException, *, faults: int) -> bool:
        waited = self.clock() - call.started_at >= call.config.wait_timeout_seconds - 0.001
        found: DataRecord | None = getattr(error, "record", None)
        match error:
            case DeclinedError():
                kept = any(run.ending == "declined" for run in call.runs)
            case IdempotencyAlreadyInProgressError():
                kept = waited and not call.runs
            case IdempotencyInDoubtError():
                kept = found is not None and found.in_progress_expiry_timestamp is None and not call.runs
            case IdempotencyLeaseLostError():
                kept = bool(call.runs)
            case IdempotencyValidationError():
                kept = found is not None and found.payload_hash != "" and not call.runs
            case IdempotencyPersistenceLayerError():
                kept = faults > 0
            case _:
                kept = call.is_cancelled
        return kept

    def _left_nothing(self, call: CallSeen) -> None:
        """Without a fault of the store nobody has to wait for the lease of a call that is over."""
        record = self.records.get(call.key)
        now = self.clock()
        if record is None or record.owner not in call.owners or not counts(record, now) or is_outcome(record, now):
            return
        fate_unknown = any(run.owner == record.owner and run.ending != "declined" for run in call.runs)
        kept = call.is_at_most_once and fate_unknown and is_in_doubt(record, now)
        self._check("a call that is over gives its key back, or says that it is in doubt", kept=kept, about=record)
