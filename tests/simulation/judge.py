"""The judge: watches claims, requests and bodies while they happen, and knows which rule is broken."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from aidem import DataRecord, Execution, RecordStatus
from aidem.hooks import ENDINGS, EventKind
from aidem.persistence import Claimed
from tests.simulation.call import End
from tests.simulation.network import CURRENT
from tests.simulation.rules import Rule
from tests.simulation.store import EPOCH, is_given_up, lease_end
from tests.simulation.verdict import Verdict

if TYPE_CHECKING:
    from aidem.hooks import IdempotencyEvent
    from tests.simulation.call import Call
    from tests.simulation.network import Request
    from tests.simulation.world import World

EPSILON: Final = 0.011
ROUNDING: Final = 0.002
"""Stored instants are whole milliseconds."""
SHORTEST_REQUEST_SECONDS: Final = 1.0
"""A renewal is given so long at least, unless the lease passes before."""


class Judge:
    """Everything that happens is told to it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.returned: dict[int, list[tuple[Call, str]]] = {}
        self._held_until: dict[str | None, float] = {}
        self._last_fence: dict[int, int] = {}
        self._open_claims: Counter[tuple[str, int]] = Counter()

    def on_event(self, event: IdempotencyEvent) -> None:
        """Note, as a hook, what aidem says of itself."""
        self.world.happened[f"event: {event.kind}"] += 1
        if event.kind is EventKind.LEASE_LOST and (call := self._call_of(event.key, event.fence)) is not None:
            call.has_lost_lease = True
        self._count_claims(event)

    def _count_claims(self, event: IdempotencyEvent) -> None:
        claim = event.key, event.fence
        if event.kind is EventKind.CLAIMED:
            self._open_claims[claim] += 1
        elif event.kind in ENDINGS:
            self._open_claims[claim] -= 1
            if self._open_claims[claim] < 0:
                self.world.violate(Rule.H15, f"one more {event.kind} than claims with fence {event.fence}")
        if (event.body_seconds is None) is (event.kind in ENDINGS):
            self.world.violate(Rule.H15, f"{event.kind} comes with {event.body_seconds} seconds of a body")

    def claims_have_ended(self) -> None:
        """Judge, when all is over, that every claim has had its ending."""
        for (key, fence), count in self._open_claims.items():
            call = self._call_of(key, fence)
            if count and not (call is not None and (call.is_crashed or call.process.is_dead)):
                self.world.violate(Rule.H15, f"the claim of {call} with fence {fence} has no ending")

    def _call_of(self, key: str, fence: int) -> Call | None:
        return self.world.by_owner.get(self.world.store.owners.get((key, fence)))

    def call_ends(self, call: Call) -> None:
        """Judge what a caller got."""
        Verdict(self.world, call).give()

    def held_until(self, owner: str | None) -> float:
        """Return until when the owner of a claim may take its lease for held, by all that it was answered."""
        return self._held_until.get(owner, 0.0)

    # --- Bodies -------------------------------------------------------------------------------------------------------

    def body_begins(self, call: Call, execution: Execution) -> None:
        world = self.world
        world.tell(f"{call}: body begins, fence {execution.fence}")
        world.happened["body"] += 1
        call.bodies += 1
        call.is_running = True
        call.body_began_at = world.now
        if call.bodies > 1:
            world.violate(Rule.H1, f"{call} has run its body twice")
        if execution.record is None:
            call.is_bypassed = True
            if not world.conditions.fail_open:
                world.violate(Rule.P2, f"{call} runs unprotected")
            return
        call.owner, call.fence = execution.record.owner, execution.fence
        self._holds(call, "the body begins")
        self._fence_grows(call)
        self._nobody_ran_before(call)

    def confirmed(self, call: Call) -> None:
        """Judge that `ensure_owned` has passed."""
        if not call.is_bypassed:
            self.world.happened["ensured that it is owned"] += 1
            self._holds(call, "ensure_owned() passes")

    def _holds(self, call: Call, what: str) -> None:
        """Look whether the store holds the claim for the call at this very moment."""
        world = self.world
        if call.owner in world.resolved or world.conditions.lease is None:
            return  # a claim without a lease ends when it expires, also while its process is paused
        found = world.store.records.get(world.key_text(call))
        if found is None or found.owner != call.owner or found.status is not RecordStatus.INPROGRESS:
            world.violate(Rule.P2, f"{what} in {call}, and the store has {found}")
            return
        end = lease_end(found)
        now = world.store.clock() if world.conditions.own_clock else call.process.epoch()
        if end is not None and end + ROUNDING < now:
            world.violate(Rule.P2, f"{what} in {call} {now - end:.3f} s after its lease has passed")

    def _fence_grows(self, call: Call) -> None:
        last, conditions = self._last_fence.get(call.key, 0), self.world.conditions
        # A claim without a lease may expire, and be claimed by others, before a process that is paused goes on.
        if conditions.own_clock and conditions.lease is not None and call.fence <= last:
            self.world.violate(Rule.H4, f"the fence of {call} is {call.fence} after {last}")
        self._last_fence[call.key] = max(last, call.fence)

    def _nobody_ran_before(self, call: Call) -> None:
        world, conditions = self.world, self.world.conditions
        for other in world.calls:
            if other is call or other.key != call.key or not other.bodies or other.is_bypassed:
                continue
            if other.is_running and not other.is_crashed:
                world.happened["overlap"] += 1
            if conditions.policy == "run_again" or not conditions.has_long_window or other.owner in world.resolved:
                continue
            if other.body_end is not End.ORDINARY and not other.is_fenced_off:
                world.violate(Rule.P4, f"the body of {call} begins after {other}, which is {other.body_end}")

    # --- Claims -------------------------------------------------------------------------------------------------------

    def took_over(self, found: DataRecord, stored: DataRecord, *, is_check: bool = False) -> None:
        world, conditions = self.world, self.world.conditions
        world.happened["take-over to check" if is_check else "take-over"] += 1
        owner = world.by_owner.get(found.owner)
        if conditions.is_at_most_once and not (is_check and conditions.policy == "check"):
            world.violate(Rule.P4, f"the claim of {owner} was taken over")
        is_held = self.held_until(found.owner) > world.now + ROUNDING and not is_given_up(found)
        if is_held and found.owner not in world.resolved:
            world.violate(Rule.P2, f"the claim of {owner} was taken over while its lease was held")
        if (
            is_given_up(found)
            or owner is None
            or owner.is_crashed
            or owner.process.is_dead
            or owner.ended_at is not None
        ):
            return
        if owner.owner != found.owner or not conditions.renew:  # nobody's, or of an attempt whose body has not begun
            return
        lapsed_at = (lease_end(found) or 0) - EPOCH
        since = lapsed_at - conditions.lease_or(30) - conditions.skew - 0.2
        if not owner.process.was_faulty(since, world.now):
            taker = world.by_owner.get(stored.owner)
            world.violate(Rule.P2, f"{taker} takes over from {owner}, which lives, renews and reaches the store")

    def asked(self, request: Request) -> None:
        """Judge whether this may be asked at this moment."""
        world, call, record = self.world, request.call, request.record
        world.happened[f"asked: {request.operation}"] += 1
        if call is None or record is None or request.process.is_disposed or record.owner in world.resolved:
            return
        match request.operation:
            case "renew":
                self._renewal_asked(request, call, record)
            case "complete" if call.body_end not in {End.VALUE, End.STORED} and not call.has_found_effect:
                world.violate(Rule.H2, f"{call} is completed, and its body is {call.body_end}")
            case "release" if call.is_running and call.owner == record.owner and not call.is_closed:
                world.violate(Rule.H2, f"{call} is released while its body runs")

    def _renewal_asked(self, request: Request, call: Call, record: DataRecord) -> None:
        world, process = self.world, request.process
        if (current := CURRENT.get()) not in {call, None}:
            world.violate(Rule.H2, f"a renewal of {call} in the context of {current}")
        if is_given_up(record):
            return
        if call.ended_at is not None:
            world.violate(Rule.H2, f"{call} has ended, and is renewed")
        due, call.renewal_due_at = call.renewal_due_at, None
        if request.is_confirmation or not call.is_running:
            return
        call.renewal_asked_at = world.now
        if due is not None and world.now > due + EPSILON and process.frozen_total == call.frozen_when_answered:
            world.violate(
                Rule.H14, f"{call} is renewed {world.now - due:.3f} s later than a third after it was asked for"
            )

    def answered(self, request: Request, answer: Any) -> None:
        """Note what a process knows from now on; an answer of None tells it nothing."""
        call = request.call
        if call is None:
            return
        if request.operation == "renew" and not request.is_confirmation:
            call.renewal_asked_at = None
        lease = self.world.conditions.lease
        if lease is None or not isinstance(answer, Claimed | DataRecord):
            return
        until = request.asked_at + lease
        owner = (answer.record if isinstance(answer, Claimed) else answer).owner
        self._held_until[owner] = max(until, self._held_until.get(owner, until))
        if request.is_confirmation or not self.world.conditions.renew:
            return
        if request.process.frozen_total != request.frozen_when_asked or request.process.is_frozen():
            return  # it may be given up before the answer is seen
        call.renewal_due_at = max(request.asked_at + lease / 3, self.world.now)
        call.frozen_when_answered = request.process.frozen_total
        self.world.at(until + EPSILON, lambda: self._lease_passed(call, owner, until, lease))

    def _lease_passed(self, call: Call, owner: str | None, until: float, lease: float) -> None:
        """Look whether an owner whose renewal is under way when its lease passes has told so."""
        if call.owner != owner or self._held_until[owner] != until or call.has_lost_lease:
            return
        if call.renewal_asked_at is None or not call.is_running:
            return
        if not call.process.is_runnable() or call.process.frozen_total != call.frozen_when_answered:
            return
        if until - max(lease / 3, SHORTEST_REQUEST_SECONDS) + EPSILON < call.renewal_asked_at < until:
            self.world.violate(Rule.H14, f"{call} has not told that its lease has passed at {until:.4f}")
