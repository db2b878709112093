"""Negative controls: stores and engines that break one promise each, and the rules by which the judge notices.

What breaks a store is a store. What breaks the engine replaces one function of it, the smallest change that makes the
fault: the engine has no seams for faults of its own, and the simulation is only worth what it notices.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aidem import DataRecord
from tests.simulation.conditions import Conditions
from tests.simulation.internals import (
    CancellationShield,
    Claim,
    Doubt,
    EngineCall,
    EventKind,
    LocalCache,
    Reporter,
    Resolution,
    SingleFlight,
    WaitBudget,
    ask,
    cancellation,
    lifecycle,
)
from tests.simulation.rules import Rule
from tests.simulation.store import Store, is_given_up

if TYPE_CHECKING:
    import pytest

    from tests.simulation.world import World


Where = Callable[[Conditions], bool]


def always(_conditions: Conditions) -> bool:
    return True


@dataclass(frozen=True)
class Control:
    """One fault.

    Attributes:
        rules: What the judge may say of it; the first violation names one of these.
        where: In which conditions it can show: a run in others is not worth its time.
        break_engine: Makes the fault for the time of a test.
        store: The store that has it.
    """

    name: str
    rules: frozenset[Rule]
    where: Where
    break_engine: Callable[[pytest.MonkeyPatch], None] | None = None
    store: type[Store] = Store

    def seeds(self) -> Iterator[int]:
        """Yield the seeds of runs in which it can show."""
        return (seed for seed in itertools.count() if self.where(Conditions(random.Random(seed))))


CONTROLS: list[Control] = []

Break = Callable[["pytest.MonkeyPatch"], None]


def noticed_by(*rules: Rule, where: Where = always) -> Callable[[Break], Break]:
    """Make a control of a function that breaks the engine."""

    def register(break_engine: Break) -> Break:
        name = break_engine.__name__
        CONTROLS.append(Control(name, frozenset(rules), where, break_engine=break_engine))
        return break_engine

    return register


def store_noticed_by(*rules: Rule, where: Where = always) -> Callable[[type[Store]], type[Store]]:
    """Make a control of a store."""

    def register(store: type[Store]) -> type[Store]:
        CONTROLS.append(Control(store.__name__, frozenset(rules), where, store=store))
        return store

    return register


# --- Stores -----------------------------------------------------------------------------------------------------------


class Broken(Store):
    """Not compared with the memory layer: that would notice at once."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.reference = None


@store_noticed_by(Rule.P1, Rule.P2, Rule.P4)
class ReleasesTheClaimsOfOthers(Broken):
    def release(self, record: DataRecord) -> bool:
        return self.records.pop(record.idempotency_key, None) is not None


@store_noticed_by(Rule.P1)
class CompletesTheClaimsOfOthers(Broken):
    def complete(self, record: DataRecord, *, now: float) -> bool:
        stored = self.records[record.idempotency_key] = self._moved(record, now)
        self.completions.append((self.world.now, stored))
        return True


@store_noticed_by(Rule.P2)
class TakesOverBeforeTheLeaseHasPassed(Broken):
    def _has_lapsed(self, found: DataRecord, judge: float) -> bool:
        return super()._has_lapsed(found, judge + self.world.conditions.lease_or(0.0) / 2)


@store_noticed_by(Rule.H9, where=lambda conditions: conditions.policy == "raise")
class ForgetsThatAClaimIsInDoubt(Broken):
    def _renewed(self, found: DataRecord, moved: DataRecord) -> DataRecord | None:
        return found if is_given_up(moved) else super()._renewed(found, moved)


@store_noticed_by(Rule.H4)
class GivesTheSameFenceAgain(Broken):
    def _next_fence(self, old: DataRecord | None, key: str, now: float) -> int:
        return super()._next_fence(old, key, now) if old is None else old.fence


@store_noticed_by(Rule.P1, Rule.H12)
class HandsOutExpiredRecords(Broken):
    def _find(self, key: str, judge: float) -> DataRecord | None:
        return self.records.get(key)


# --- Leases -----------------------------------------------------------------------------------------------------------


@noticed_by(Rule.H14, Rule.P2)
def a_lease_counts_from_the_answer(patch: pytest.MonkeyPatch) -> None:
    count_from = Claim._count_from
    patch.setattr(Claim, "_count_from", lambda self, asked: count_from(self, self._asking()))


@noticed_by(Rule.H14, Rule.H13, Rule.P2)
def the_end_of_a_lease_counts_from_the_answer(patch: pytest.MonkeyPatch) -> None:
    count_from = Claim._count_from

    def count(self: Claim, asked: tuple[float, float]) -> None:
        count_from(self, self._asking())
        self._asked_at, _ = asked

    patch.setattr(Claim, "_count_from", count)


@noticed_by(Rule.P2)
def time_in_suspension_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    def has_lapsed(self: Claim, *, in_seconds: float = 0.0) -> bool:
        return self.lease_deadline is not None and self._loop_state.time() + in_seconds >= self.lease_deadline

    patch.setattr(Claim, "has_lapsed", has_lapsed)


@noticed_by(Rule.P2)
def a_body_begins_though_the_answer_came_after_the_lease(patch: pytest.MonkeyPatch) -> None:
    holds = Claim._holds
    patch.setattr(Claim, "_holds", lambda self, answer: holds(self, answer) or True)


@noticed_by(Rule.H14, Rule.P2)
def a_lease_is_renewed_when_it_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "_interval", lambda self: self._lease.lease_seconds or 0.0)


@noticed_by(Rule.H2, Rule.H7)
def a_claim_is_renewed_after_its_body(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "stop_renewal", lambda self: None)


@noticed_by(Rule.P2)
def ensure_owned_guesses(patch: pytest.MonkeyPatch) -> None:
    async def confirm(self: Claim, shield: CancellationShield, *, effect: str) -> bool:
        return True

    patch.setattr(Claim, "confirm", confirm)


# --- Checks -----------------------------------------------------------------------------------------------------------


def checks(conditions: Conditions) -> bool:
    return conditions.policy == "check"


@noticed_by(Rule.P2, Rule.P4, where=checks)
def a_body_runs_after_its_check_without_confirmation(patch: pytest.MonkeyPatch) -> None:
    async def confirm(self: Doubt, shield: CancellationShield) -> Resolution:
        self._is_open = False
        return Resolution.RUN

    patch.setattr(Doubt, "_confirm", confirm)


@noticed_by(Rule.H9, where=checks)
def a_claim_whose_check_does_not_know_is_not_put_back(patch: pytest.MonkeyPatch) -> None:
    async def put_back(self: Doubt, shield: CancellationShield) -> DataRecord:
        self._claim.stop_renewal()
        self._is_open = False
        return self._claim.record

    patch.setattr(Doubt, "_put_back", put_back)


@store_noticed_by(Rule.P2, Rule.P4, where=checks)
class TakesOverToCheckWhileTheLeaseIsHeld(Broken):
    def take_over(
        self, found: DataRecord, record: DataRecord, *, now: float, skew: float, force: bool
    ) -> DataRecord | None:
        stored = self.records.get(record.idempotency_key)
        answer = super().take_over(found if stored is None else stored, record, now=now, skew=skew, force=True)
        if answer is not None and stored is not None and not force and answer.owner != stored.owner:
            self.world.judge.took_over(stored, answer, is_check=True)
        return answer


@noticed_by(Rule.H14)
def a_lost_lease_is_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "note_loss", lambda self: self._flight.end(None))


@noticed_by(Rule.P2, where=lambda conditions: conditions.max_clock_skew > 0.0)
def clocks_are_taken_for_equal(patch: pytest.MonkeyPatch) -> None:
    def acquisition(self: Claim) -> Awaitable[Any]:
        return self._plan.layer.acquire(self.record, now=self._plan.clock())

    patch.setattr(Claim, "_acquisition", acquisition)


# --- Cancellation and failures ----------------------------------------------------------------------------------------


@noticed_by(Rule.H3, Rule.H9)
def an_operation_is_cancelled_with_its_caller(patch: pytest.MonkeyPatch) -> None:
    async def give_in(_future: asyncio.Future[Any]) -> None:
        raise asyncio.CancelledError

    patch.setattr(cancellation, "_outlast", give_in)


@noticed_by(Rule.H9)
def a_claim_whose_caller_was_cancelled_is_not_released(patch: pytest.MonkeyPatch) -> None:
    async def release_unused(self: Claim, shield: CancellationShield) -> None: ...

    patch.setattr(Claim, "_release_unused", release_unused)


@noticed_by(Rule.H9)
def a_claim_of_a_closed_body_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "release_in_background", lambda self: None)


@noticed_by(Rule.P4, where=lambda conditions: conditions.policy == "raise")
def a_cancelled_body_gives_its_key_back_under_raise(patch: pytest.MonkeyPatch) -> None:
    release = Claim.release

    async def always(self: Claim, *, is_failure: bool, **options: Any) -> None:
        await release(self, is_failure=True, **options)

    patch.setattr(Claim, "release", always)


@noticed_by(Rule.H12, where=lambda conditions: conditions.policy == "raise")
def nothing_is_ever_in_doubt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lifecycle, "is_in_doubt", lambda record, *, now: False)


@noticed_by(Rule.H13)
def a_completion_is_tried_once(patch: pytest.MonkeyPatch) -> None:
    def once(self: Claim, start: Callable[[], Awaitable[Any]], *, shield: CancellationShield, effect: str) -> Any:
        return ask(start, shield=shield, key=self._key, effect=effect)

    patch.setattr(Claim, "_ask_persistently", once)


@noticed_by(Rule.H6, Rule.P2)
def a_cancellation_is_swallowed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CancellationShield, "__exit__", lambda self, *_: None)


@noticed_by(Rule.H6)
def a_cancellation_during_the_clean_up_is_swallowed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CancellationShield, "request_again", lambda self: None)


@noticed_by(Rule.H3, Rule.H6)
def a_failed_release_replaces_the_error_of_the_body(patch: pytest.MonkeyPatch) -> None:
    def note(self: EngineCall, error: BaseException, failure: Exception) -> None:
        raise failure

    patch.setattr(EngineCall, "note_failure", note)


# --- Outcomes ---------------------------------------------------------------------------------------------------------


@noticed_by(Rule.P1)
def a_loser_returns_its_own_result(patch: pytest.MonkeyPatch) -> None:
    complete = Claim.complete

    async def always(self: Claim, text: str, outcome: Any, **options: Any) -> DataRecord:
        return await complete(self, text, outcome, **options) or self.record

    patch.setattr(Claim, "complete", always)


@noticed_by(Rule.P1)
def an_outcome_is_handed_out_before_the_payload_is_compared(patch: pytest.MonkeyPatch) -> None:
    differs = lifecycle.differs

    def differs_while_running(record: DataRecord, payload_hash: str) -> bool:
        return record.response_data is None and differs(record, payload_hash)

    patch.setattr(lifecycle, "differs", differs_while_running)


@noticed_by(Rule.P1)
def a_claim_is_cached(patch: pytest.MonkeyPatch) -> None:
    publish = Claim._publish

    def publish_and_cache(self: Claim) -> None:
        publish(self)
        self._plan.shared.cache._records[self._key] = self.record

    patch.setattr(Claim, "_publish", publish_and_cache)


@noticed_by(Rule.P1, where=lambda conditions: not conditions.has_long_window)
def expired_outcomes_are_cached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalCache, "get", lambda self, key, *, now: self._records.get(key))


# --- Waiting ----------------------------------------------------------------------------------------------------------


@noticed_by(Rule.H8)
def waiters_look_only_when_their_time_is_over(patch: pytest.MonkeyPatch) -> None:
    async def pause(self: WaitBudget, record: DataRecord, *, polls: int, now: float) -> None:
        if self.remaining_seconds() <= 0:
            raise self.in_progress(record, now=now)
        await self._until_change(self.remaining_seconds(), shortest=self.remaining_seconds())

    patch.setattr(WaitBudget, "pause", pause)


@noticed_by(Rule.H8)
def followers_do_not_learn_of_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SingleFlight, "_hand_over", lambda self, line, ending: None)


@noticed_by(Rule.H7, Rule.H8)
def flights_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SingleFlight, "end", lambda self, ending: None)


@noticed_by(Rule.H15)
def what_is_neither_completed_nor_released_has_no_ending(patch: pytest.MonkeyPatch) -> None:
    report_end = Reporter.report_end

    def report(self: Reporter, kind: EventKind | None = None, **facts: Any) -> None:
        if kind is None:
            self._claim = None
        else:
            report_end(self, kind, **facts)

    patch.setattr(Reporter, "report_end", report)


@noticed_by(Rule.H15)
def a_claim_can_end_twice(patch: pytest.MonkeyPatch) -> None:
    report_end = Reporter.report_end

    def report(self: Reporter, kind: EventKind | None = None, **facts: Any) -> None:
        claim = self._claim
        report_end(self, kind, **facts)
        if kind is not None:
            self._claim = claim

    patch.setattr(Reporter, "report_end", report)
