"""The verdict on a call that has ended: what its caller got, when, and what is left at the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aidem import DataRecord, RecordStatus
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
    IdempotencyUsageError,
)
from aidem.persistence import OutcomeKind
from tests.simulation.call import End, Front, StoredError
from tests.simulation.cancellation import Way
from tests.simulation.internals import CLEANUP_SECONDS
from tests.simulation.rules import Rule
from tests.simulation.store import EPOCH

if TYPE_CHECKING:
    from tests.simulation.call import Call
    from tests.simulation.world import World

EPSILON: Final = 0.011
RETRIES_WITHOUT_LEASE_SECONDS: Final = 30.0


class Verdict:
    """On one call."""

    def __init__(self, world: World, call: Call) -> None:
        self.world = world
        self.conditions = world.conditions
        self.call = call
        self.error = call.error
        self.has_result = call.body_end in {End.VALUE, End.STORED}
        is_closed_block = call.is_closed and call.front is Front.GENERATOR  # between its body and its end
        self.is_outcome = (call.body_end is End.VALUE and not is_closed_block) or (
            call.body_end is End.STORED and self.conditions.stores_exceptions
        )

    def give(self) -> None:
        """Look at everything."""
        world, call = self.world, self.call
        world.tell(f"{call} ends: {self._outcome_text() or call.outcome} {call.error!r}")
        world.happened[f"outcome: {call.outcome if call.error is None else type(call.error).__name__}"] += 1
        if call.is_running:
            self._violate(Rule.H2, "has ended, and its body runs")
        self._promptness()
        if call.is_closed or isinstance(call.error, GeneratorExit):
            world.at(world.now + 0.5, self._left_at_store)  # in the background
            return
        self._identity()
        self._outcome()
        self._waiting()
        if isinstance(self.error, IdempotencyError) and self.error is not call.body_error:
            self._truth(self.error)
        self._left_at_store()

    def _violate(self, rule: Rule, text: str) -> None:
        self.world.violate(rule, f"{self.call} {text}")

    # --- The caller ---------------------------------------------------------------------------------------------------

    def _promptness(self) -> None:
        call = self.call
        if call.cancelled_at is None:
            return
        took = call.process.own_seconds() - call.cancelled_at
        allowed = CLEANUP_SECONDS * (1 + 2 * bool(call.nests or call.depth) + call.confirms) + EPSILON
        self.world.happened["cancelled, ended promptly"] += took <= allowed
        if took > allowed:
            self._violate(Rule.H6, f"has ended {took:.3f} s after it was cancelled")

    def _identity(self) -> None:
        """The caller gets the exception of the body itself, unless it is an outcome."""
        call = self.call
        if self.error is call.body_error or isinstance(self.error, BaseExceptionGroup):
            return
        is_replaced = call.body_end in {End.ORDINARY, End.ODD} and call.way is not Way.WAIT_FOR
        if is_replaced or (call.body_end is End.STORED and not self.conditions.stores_exceptions):
            self._violate(Rule.H3, f"has raised {call.body_error!r} in its body, and its caller gets {self.error!r}")

    def _outcome(self) -> None:
        """Everyone gets the outcome that is recorded, and the same."""
        call, world = self.call, self.world
        if call.is_bypassed:
            return
        if call.outcome == "value" and not isinstance(call.value, dict):
            self._violate(Rule.P1, f"got {call.value!r}, which no body has returned")
        text = self._outcome_text()
        if text is None:
            return
        origin = world.calls[int(text.split()[1])]
        if origin.key != call.key or origin.amount != call.amount:
            self._violate(Rule.P1, f"got the outcome of {origin}")
        recorded = [
            (at, record)
            for at, record in self._completions()
            if record.owner == origin.owner or self._is_found(record, origin)
        ]
        if not recorded:
            self._violate(Rule.P1, f"got {text}, which was never recorded")
        elif origin is not call and any(record.outcome is OutcomeKind.UNAVAILABLE for _, record in recorded):
            self._violate(Rule.P1, f"got {text}, which is recorded as unavailable")
        self._agreement(text, recorded)
        world.happened["outcome handed out"] += 1
        if origin is not call:
            world.happened["outcome of another call"] += 1
            world.happened["loser gets the winner's outcome"] += call.body_end is End.VALUE

    def _is_found(self, record: DataRecord, origin: Call) -> bool:
        """Whether a check has found the effect of that call, and its caller has recorded it."""
        recorder = self.world.by_owner.get(record.owner)
        return (
            recorder is not None
            and recorder.has_found_effect
            and record.response_data == f'{{"call": {origin.number}}}'
        )

    def _agreement(self, text: str, recorded: list[tuple[float, DataRecord]]) -> None:
        """Look whether others got the same, or whether it was still to be had."""
        call, world = self.call, self.world
        others = world.judge.returned.setdefault(call.key, [])
        if self.conditions.has_long_window:
            for other, other_text in others:
                if other_text != text:
                    self._violate(Rule.P1, f"got {text}, {other} got {other_text}")
                    break
        else:
            earliest = call.started_at - 1.5 - 2 * self.conditions.skew
            if all((record.expiry_timestamp or 0) - EPOCH < earliest for _, record in recorded):
                self._violate(Rule.P1, f"got {text}, whose window was over")
        others.append((call, text))

    def _outcome_text(self) -> str | None:
        """Return what was handed out as an outcome; None: nothing was."""
        call = self.call
        if isinstance(call.value, dict):
            return f"value {call.value.get('call')}"
        if not isinstance(self.error, StoredError) or not self.conditions.stores_exceptions:
            return None
        if call.body_end is End.STORED and getattr(self.error, "__notes__", None):
            return None  # it could not be stored, as its note says, so it is no outcome but an error
        return f"stored {self.error.args[0]}"

    def _completions(self) -> list[tuple[float, DataRecord]]:
        key = self.world.key_text(self.call)
        return [(at, record) for at, record in self.world.store.completions if record.idempotency_key == key]

    def _waiting(self) -> None:
        """Where nothing goes wrong, nobody waits longer than allowed, nor for what is there already."""
        call, world = self.call, self.world
        if not self.conditions.is_gentle or call.depth:
            return
        until = call.body_began_at if call.bodies else world.now
        if until - call.started_at > call.wait + 1.0:
            self._violate(Rule.H8, f"has waited {until - call.started_at:.3f} s")
        if self._outcome_text() is not None and not call.bodies:
            late = world.now - max([call.started_at, *(at for at, _ in self._completions())])
            if late > 1.6:
                self._violate(Rule.H8, f"got an outcome {late:.3f} s after it was there")

    # --- Errors -------------------------------------------------------------------------------------------------------

    def _truth(self, error: IdempotencyError) -> None:
        """What an error says is so."""
        if isinstance(error, IdempotencyPersistenceLayerError):
            self._failure(error)
        elif isinstance(error, IdempotencyLeaseLostError):
            self._lease_lost(error)
        elif isinstance(error, IdempotencyUsageError):
            self._violate(Rule.H3, f"got {error!r}")
        elif not isinstance(error, IdempotencyResultUnavailableError):
            self._conflict(error)

    def _conflict(self, error: IdempotencyError) -> None:
        call = self.call
        if call.bodies:
            self._violate(Rule.H3, f"got {error!r} after its body has run")
        if isinstance(error, IdempotencyInDoubtError):
            self._in_doubt(error)
        elif isinstance(error, IdempotencyAlreadyInProgressError):
            waited = self.world.now - call.started_at
            if waited < call.wait - EPSILON:
                self._violate(Rule.H8, f"gave up after {waited:.3f} s")
        elif all(other.amount == call.amount for other in self.world.calls if other.key == call.key):
            self._violate(Rule.H3, f"got {error!r} though all payloads are equal")

    def _failure(self, error: IdempotencyPersistenceLayerError) -> None:
        call, message = self.call, str(error)
        if not call.bodies and "was not run" not in message:
            self._violate(Rule.H3, f"has run no body, and the error says {message!r}")
        if self.has_result and "its effect has happened" not in message:
            self._violate(Rule.H3, f"has run its body, and the error says {message!r}")
        if self.conditions.is_gentle and self.conditions.client_timeout >= 0.5:
            self._violate(Rule.H5, f"got {message!r} without any fault")
        if self.has_result and call.cancelled_at is None:
            self._persistence()

    def _persistence(self) -> None:
        """Look how long it tried to record its outcome, or to find that of the winner."""
        call, world = self.call, self.world
        tried = world.now - call.body_ended_at
        lease = self.conditions.lease
        if call.has_looked:
            if call.wait > 5.0 and tried < call.wait - 2.0:
                self._violate(Rule.H13, f"has tried to find the outcome of the winner for {tried:.3f} s only")
            return
        if call.front is not Front.FUNCTION:
            return  # the body of a block goes on after `body`
        if tried < min(self.conditions.lease_or(30) / 2, CLEANUP_SECONDS - 1.3):
            self._violate(Rule.H13, f"has tried to record its outcome for {tried:.3f} s only")
        until = call.body_ended_at + (RETRIES_WITHOUT_LEASE_SECONDS if lease is None else CLEANUP_SECONDS)
        until = max(until, world.judge.held_until(call.owner))
        if world.now > until + EPSILON and call.process.frozen_total == call.frozen_when_body_ended:
            late = world.now - until
            self._violate(Rule.H13, f"has tried to record its outcome for {late:.3f} s after its lease has passed")

    def _lease_lost(self, error: IdempotencyLeaseLostError) -> None:
        call, conditions = self.call, self.conditions
        if not call.bodies:
            self._violate(Rule.H3, f"got {error!r} though its body has not run")
        holds_on = conditions.lease is not None or conditions.has_long_window  # else only until its record expires
        if conditions.is_gentle and conditions.renew and holds_on:
            self._violate(Rule.H5, "has lost its lease without any fault")
        if call.front is not Front.FUNCTION or call.body_end is not End.VALUE or not conditions.has_long_window:
            return
        for at, record in self._completions():
            winner = self.world.by_owner.get(record.owner)
            if at < call.body_ended_at and winner is not None:
                if winner.amount == call.amount:
                    self._violate(Rule.P1, f"got {error!r}, and there is an outcome since {at:.3f}")
                return

    def _in_doubt(self, error: IdempotencyInDoubtError) -> None:
        record = error.record
        end = record.lease_expiry_timestamp
        if not self.conditions.is_at_most_once or record.status is not RecordStatus.INPROGRESS or end is None:
            self._violate(Rule.H3, f"is in doubt about {record}")
        elif end / 1000 >= EPOCH + self.world.now + self.conditions.skew + 0.005 and not self._is_of_asker(record):
            self._violate(Rule.P4, f"is in doubt about a lease that holds: {record}")

    def _is_of_asker(self, record: DataRecord) -> bool:
        """Whether it is the claim of a call that has asked a check, perhaps of another one that shares its verdict.

        It may be that it could not be put back.
        """
        mates = (call for call in self.world.calls if call.process is self.call.process and not call.bodies)
        return any(record.owner in call.owners for call in mates)

    # --- The store ----------------------------------------------------------------------------------------------------

    def _left_at_store(self) -> None:
        """Look at the key, where nothing went wrong meanwhile."""
        if self._is_excused():
            return
        call, conditions = self.call, self.conditions
        found = self.world.store.records.get(self.world.key_text(call))
        status = found.status if found is not None and found.owner in call.owners else None
        if self.is_outcome:
            is_certain = call.front is Front.FUNCTION and call.outcome != "cancelled" and not call.is_closed
            if is_certain and conditions.has_long_window and conditions.renew and status is not RecordStatus.COMPLETED:
                self._violate(Rule.H9, f"has ended and is not recorded: {found}")
        elif found is not None and status is RecordStatus.INPROGRESS:
            self._still_claimed(found)

    def _is_excused(self) -> bool:
        call, conditions, process = self.call, self.conditions, self.call.process
        return (
            call.is_bypassed
            or call.is_crashed
            or process.is_dead
            or call.ended_at is None
            or bool(call.owners & self.world.resolved)
            or (conditions.client_timeout < 0.5 and conditions.speed > 0.1)
            or process.was_faulty(call.started_at - min(conditions.client_timeout, 7.0), self.world.now)
        )

    def _still_claimed(self, found: DataRecord) -> None:
        call, world = self.call, self.world
        is_abandoned = self.conditions.is_at_most_once and bool(call.bodies) and call.body_end is not End.ORDINARY
        if not is_abandoned:
            self._violate(Rule.H9, f"has ended and holds its key: {found}")
        elif call.body_end is not End.STORED:
            end = found.lease_expiry_timestamp
            if end is None or end >= int((EPOCH + world.now + self.conditions.skew) * 1000):
                self._violate(Rule.H9, f"was broken off, and is not in doubt: {found}")
