"""The engine: the async shell around `lifecycle` that takes one call from its claim to its outcome.

A front makes a `Call` and awaits `begin`; the call then has claimed its key, found an outcome to replay, or is
bypassed. After the body it awaits `complete` or `fail`. `STEPS` says which of these a call in each phase takes. What a
record means is `lifecycle`'s to say.

A body may instead write the outcome itself, in a transaction of its own on the database that holds the records. Then
what is left to do after the body is to look whether that was committed: `confirm_commit`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from enum import Enum, IntEnum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from aidem._engine.claim import RELEASE_SECONDS, Claim, ask
from aidem._engine.doubt import Doubt, Resolution
from aidem._engine.failures import NOTHING_RUN, RUNNING
from aidem._engine.shared import SingleFlight
from aidem._engine.waiting import WaitBudget, winner
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Commitment, NextStep
from aidem._rules.record import COMPLETED, OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, Immediate
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyHeldByTransactionError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
    IdempotencyValidationError,
)
from aidem.hooks import SILENT, EventKind, Reporter
from aidem.persistence import SupportsCompletionInTransaction, SupportsCompletionItem
from aidem.serialization import UNAVAILABLE_TEXT, exception_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._engine.plan import CallKey, Plan
    from aidem._engine.shared import Ending, PerLoop
    from aidem._rules.abandoned import AbandonedExecution, Check
    from aidem._rules.record import DataRecord

logger = logging.getLogger("aidem")


class Phase(IntEnum):
    """How far a call has come; the number is that of its column in `STEPS`."""

    NEW = 0
    CLAIMED = 1
    COMPLETING = 2
    REPLAYED = 3
    BYPASSED = 4
    ENDED = 5


class Answer(Enum):
    """What a call answers when it is asked for a step."""

    TAKEN = "taken"
    IGNORED = "does nothing"
    REFUSED = "refused"


_TAKEN, _IGNORED, _REFUSED = Answer
_NEW, _CLAIMED, _COMPLETING, _REPLAYED, _BYPASSED, _ENDED = Phase  # to look a member up costs as much as a call
_REPLAY: Final = NextStep.REPLAY

# fmt: off
STEPS: Final = {
    #                   NEW       CLAIMED   COMPLETING  REPLAYED  BYPASSED  ENDED
    "begin":           (_TAKEN,   _REFUSED, _REFUSED,   _REFUSED, _TAKEN,   _REFUSED),
    "ensure_owned":    (_REFUSED, _TAKEN,   _REFUSED,   _REFUSED, _IGNORED, _REFUSED),
    "complete_in":     (_REFUSED, _TAKEN,   _TAKEN,     _REFUSED, _IGNORED, _REFUSED),
    "completion_item": (_REFUSED, _TAKEN,   _TAKEN,     _REFUSED, _IGNORED, _REFUSED),
    "complete":        (_REFUSED, _TAKEN,   _REFUSED,   _REFUSED, _REFUSED, _REFUSED),
    "confirm_commit":  (_REFUSED, _REFUSED, _TAKEN,     _REFUSED, _REFUSED, _REFUSED),
    "fail":            (_IGNORED, _TAKEN,   _TAKEN,     _IGNORED, _IGNORED, _IGNORED),
    "held_record":     (_REFUSED, _TAKEN,   _TAKEN,     _TAKEN,   _REFUSED, _TAKEN),
}
# fmt: on
"""Which steps a call takes, by its phase."""

_REFUSALS: Final = {
    "begin": "this call has begun before",
    "ensure_owned": (
        "ensure_owned() asks about a running claim; call it in the body of a call that is no replay, before complete()"
    ),
    "complete_in": "complete() is for the body of a call that runs and is no replay; look at execution.replayed first",
    "completion_item": (
        "completion_item() is for the body of a call that runs and is no replay; look at execution.replayed first"
    ),
    "complete": "this call holds no claim that could be completed",
    "confirm_commit": "this call was not completed in a transaction",
    "held_record": "this call has no record",
}


_REFUSALS_IN_TRANSACTION: Final = {
    Commitment.OPEN: (
        "complete() was called before, in a transaction that is still open; call it once, as the last statement before "
        "the commit"
    ),
    Commitment.COMMITTED: "this call was completed before, and that was committed; leave the body",
    Commitment.ROLLED_BACK: (
        "the transaction does not see the claim of this call: it is on another database than the persistence layer, or "
        "its search_path finds another table, or it was begun before the claim was made; begin it in the body, on the "
        "database that holds the records"
    ),
}
_HELD_BY_ANOTHER: Final = (
    "another transaction holds the record of this call, such as one that has selected it FOR UPDATE; nothing was "
    "written. End that one, then call complete() again"
)
_NOT_COMMITTED: Final = {
    Commitment.OPEN: (
        "complete() was called in a transaction that is not committed but still open; commit it before the body ends, "
        "and the outer one if it is inside another. The key stays claimed until its lease ends, for the transaction "
        "may yet be committed"
    ),
    Commitment.ROLLED_BACK: (
        "complete() was called in a transaction that was not committed but rolled back, or its savepoint was, or a "
        "request with completion_item() was not applied; complete it in another one, or end the body with an exception"
    ),
}


class WhoseOutcome(Enum):
    """Whose outcome counts when the body has ended; the record of the call has it."""

    OURS = auto()
    WINNERS = auto()  # our claim was lost, and the call that took it over has an outcome


_OURS, _WINNERS = WhoseOutcome


class Call:
    """One idempotent call.

    Attributes:
        plan: Layer, settings and names, the same for every call of the function.
        key: What names the call.
        phase: How far it has come.
        record: The claim as stored, or the record of the outcome; None: there is none yet, or it is bypassed.
        reporter: Tells the hooks.
        has_body_begun: Whether its body may have run; until then no exit leaves the key in doubt.
        is_durable_replay: Whether it repeats an attempt of a durable function, whose claim it may release.
    """

    __slots__ = (
        "_claim",
        "_flight",
        "_loop_state",
        "_wait_budget",
        "has_body_begun",
        "is_durable_replay",
        "key",
        "phase",
        "plan",
        "record",
        "reporter",
    )

    is_blocking = False  # whether an ordinary function runs it

    _claim: Claim  # from CLAIMED on
    _flight: SingleFlight
    _loop_state: PerLoop

    def __init__(self, plan: Plan, key: CallKey, *, bypassed: bool = False) -> None:
        self.plan = plan
        self.key = key
        self.phase = _BYPASSED if bypassed or not key.text else _NEW
        self.record: DataRecord | None = None
        self.reporter = SILENT
        if plan.config.hooks:
            self.reporter = Reporter(plan.config.hooks, key=key.text, function=plan.function)
        self.has_body_begun = False
        self.is_durable_replay = False
        self._wait_budget: WaitBudget | None = None

    def watch_body(self) -> Callable[[], bool]:
        """Return a function that tells whether the task that runs the body has ended: the one that awaits `begin`."""
        task = asyncio.current_task()
        return bool if task is None else task.done

    @property
    def holds_claim(self) -> bool:
        """Whether it has claimed its key and not ended."""
        return self.phase is _CLAIMED or self.phase is _COMPLETING

    @property
    def fence(self) -> int:
        """The fence of the record; 0 where there is none."""
        return 0 if self.record is None else self.record.fence

    def held_record(self) -> DataRecord:
        """Return the record, of a call that claimed, found or completed one."""
        self.takes("held_record")
        record: Any = self.record
        held: DataRecord = record  # every phase that takes this step has one
        return held

    def takes(self, step: str) -> bool:
        """Whether the call takes a step in its phase; False: it does nothing.

        Raises:
            IdempotencyUsageError: It refuses the step.
        """
        answer = STEPS[step][self.phase]
        if answer is _REFUSED:
            raise IdempotencyUsageError(_REFUSALS[step], key=self.key.text)
        return answer is _TAKEN

    def report(self, kind: EventKind, error: BaseException | None = None) -> None:
        """Tell the hooks."""
        if self.reporter is not SILENT:
            self.reporter.report(kind, fence=self.fence, error=error)

    # --- Before the body --------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Claim the key or find its outcome; afterwards `phase` is CLAIMED, REPLAYED or BYPASSED.

        Raises:
            IdempotencyValidationError: The key was used with another payload.
            IdempotencyAlreadyInProgressError: Another execution did not end in time.
            IdempotencyInDoubtError: The owner of the claim vanished, and it must not be taken over, or a check has
                not found out whether its effect happened.
            IdempotencyPersistenceLayerError: The layer failed; nothing was run.
            IdempotencyUsageError: No asyncio event loop runs the call, or it has begun before.
        """
        self.takes("begin")
        if self.phase is _BYPASSED:
            self.report(EventKind.BYPASSED)
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            message = "aidem needs asyncio, but no asyncio event loop runs this call; trio and others are not supported"
            raise IdempotencyUsageError(message) from None
        self._loop_state = self.plan.shared.of(loop)
        try:
            await self._find()
        except IdempotencyPersistenceLayerError as failure:
            self.report(EventKind.PERSISTENCE_ERROR, failure)
            is_outage = isinstance(failure, IdempotencyPersistenceConnectionError)
            if not (is_outage and self.plan.config.on_persistence_error == "run"):
                raise
            logger.warning("%s runs without idempotency: %s", self.plan.function, failure)
            self.phase = _BYPASSED
            self.record = None
            self.report(EventKind.BYPASSED, failure)
        except IdempotencyError as conflict:
            self.report(EventKind.CONFLICT, conflict)
            raise
        if self._wait_budget is not None and self._wait_budget.has_waited:
            self.report(EventKind.WAITED)
        if self.reporter is not SILENT and self.phase is _CLAIMED:
            runs_again = self.plan.config.on_abandoned == "run_again"
            unless_ended = EventKind.ABANDONED if runs_again else EventKind.IN_DOUBT
            self.reporter.report_claim(fence=self.fence, unless_ended=unless_ended, loop=loop)

    async def _find(self) -> None:
        config = self.plan.config
        if config.use_local_cache:
            cached = self.plan.shared.cache.get(self.key.text, now=self.plan.clock())
            if cached is not None:
                self.replay(cached)
                return
        flights = self._loop_state.flights
        self._flight = SingleFlight(flights, self.key)
        stands_in_line = config.wait_timeout_seconds > 0 and not self.is_durable_replay
        try:
            while self.phase is _NEW:  # until the key is ours, has an outcome, or the time is over
                leader = flights.setdefault(self.key.text, self._flight)
                if stands_in_line and leader is not self._flight:
                    await self._follow(leader, self._flight)
                else:  # it leads, or asks beside the leader
                    await self._ask(self._flight)
        except BaseException as error:
            if self.phase is _NEW:  # else the claim is held, and `fail` releases it
                ending: Ending = None
                if isinstance(error, IdempotencyPersistenceLayerError) or (
                    isinstance(error, IdempotencyInDoubtError) and self.plan.check is not None
                ):
                    ending = error
                self._end(ending)
            raise

    async def _follow(self, leader: SingleFlight, flight: SingleFlight) -> None:
        """Wait while another call of this loop is at the store: for an outcome, or until it is our turn."""
        record = await self._waiting().follow(leader, flight)
        if record is None or lifecycle.is_expired(record, now=self.plan.clock()):
            return
        if record.status is COMPLETED or lifecycle.differs(record, self.key.payload_hash):
            self.replay(record)
        elif self.plan.check is None:  # it is in doubt
            raise IdempotencyInDoubtError(record=record)

    async def _ask(self, flight: SingleFlight) -> None:
        claim = Claim(self.plan, self.key, flight, self._loop_state, self.reporter)
        try:
            acquisition = claim.acquire()
            answer = acquisition.answer if isinstance(acquisition, Immediate) else await acquisition
        except IdempotencyPersistenceConnectionError:
            if flight.record is None or self._waiting().remaining_seconds() <= 0:
                raise
            await self._pause(flight.record, flight, now=self.plan.clock())  # one poll in vain, of several
            return
        if isinstance(answer, Blocked):
            await self._consider(answer, flight)
        elif answer is not None:
            self._claim = claim
            self.record = claim.record
            self.phase = _CLAIMED
            claim.hold(taken_over=answer.taken_over, has_body_ended=self.watch_body())

    async def _consider(self, answer: Blocked, flight: SingleFlight) -> None:
        """Act on the record that blocks the call: replay it, raise, or pause before the store is asked again."""
        record, now = answer.record, answer.now
        if now is None:  # it was judged by this caller's clock, and the clock of its writer may be behind
            now = self.plan.clock() - self.plan.config.max_clock_skew_seconds
        step = lifecycle.next_step(record, payload_hash=self.key.payload_hash, now=now)
        if step is _REPLAY:
            self._end(record)
            self.replay(record)
            return
        if step is NextStep.IN_DOUBT and await self._is_held(record):
            step = NextStep.WAIT  # a transaction may yet complete it
        match step:
            case NextStep.MISMATCH:
                flight.publish(record, blocks_until=None)  # it refuses the others in line with such a payload, too
                raise IdempotencyValidationError(record=record)
            case _ if self.is_durable_replay:
                await self._release_earlier_attempt(record, now=now)
            case NextStep.IN_DOUBT if self.plan.check is None:
                self._end(record)  # callers in line that have a check ask it
                raise IdempotencyInDoubtError(record=record)
            case NextStep.IN_DOUBT:
                ahead = 0.0 if answer.now is None else answer.now - self.plan.clock()
                await self._check(record, flight, ahead_seconds=ahead)
            case _:  # Step.WAIT
                holds = lifecycle.blocks_for_seconds(record, now=now)
                flight.publish(record, blocks_until=None if holds is None else self._loop_state.time() + holds)
                await self._pause(record, flight, now=now)

    async def _check(self, found: DataRecord, flight: SingleFlight, *, ahead_seconds: float) -> None:
        """Ask the check about a claim in doubt, and act on its verdict."""
        claim = Claim(self.plan, self.key, flight, self._loop_state, self.reporter)
        doubt = Doubt(self.plan, self.key, claim, found, self.reporter, ahead_seconds=ahead_seconds)
        resolution = await doubt.resolve(self.ask_check, has_body_ended=self.watch_body())
        match resolution:
            case Resolution.RUN:
                self._claim = claim
                self.record = claim.record
                self.phase = _CLAIMED
            case Resolution.REPLAY:
                self._end(claim.record)
                self.replay(claim.record)
            case Resolution.REFUSED if flight.polls:  # once more: so it counts as running
                await self._pause(None, flight, now=self.plan.clock())
            case Resolution.REFUSED:  # the store tells at once what has become of it
                flight.polls += 1
            case _:  # LOST: the flight is over, so the next one in line leads, and this one joins the line again
                self._flight = SingleFlight(self._loop_state.flights, self.key)

    async def ask_check(self, abandoned: AbandonedExecution) -> Any:
        """Ask the check what has become of an execution; return whatever it answers."""
        answer = cast("Check", self.plan.check)(abandoned)
        return await answer if inspect.isawaitable(answer) else answer

    async def _is_held(self, record: DataRecord) -> bool:
        """Whether an open transaction holds a claim, or it has changed since."""
        layer = self.plan.layer
        if record.owner is None or not isinstance(layer, SupportsCompletionInTransaction):
            return False
        with CancellationShield() as shield:
            is_free = partial(layer.is_free, record)
            return not await ask(is_free, shield=shield, key=self.key.text, effect=NOTHING_RUN)

    async def _release_earlier_attempt(self, record: DataRecord, *, now: float) -> None:
        """Release the claim of the attempt that a durable function replays, once, so that one of two replays wins."""
        self.is_durable_replay = False
        if record.owner is None:
            raise self._waiting().in_progress(record, now=now)  # its owner is unknown
        release = self.plan.layer.release
        with CancellationShield() as shield:
            await ask(lambda: release(record), shield=shield, key=self.key.text, effect=NOTHING_RUN)

    async def _pause(self, record: DataRecord | None, flight: SingleFlight, *, now: float) -> None:
        await self._waiting().pause(record, polls=flight.polls, now=now)
        flight.polls += 1

    def _waiting(self) -> WaitBudget:
        if self._wait_budget is None:
            self._wait_budget = WaitBudget(self.plan, self.key)
        return self._wait_budget

    def replay(self, record: DataRecord) -> None:
        """Take the outcome in a record as that of the call.

        Raises:
            IdempotencyValidationError: It was recorded for another payload.
        """
        if lifecycle.differs(record, self.key.payload_hash):
            raise IdempotencyValidationError(record=record)
        self.record = record
        self.phase = _REPLAYED
        if self.plan.config.use_local_cache:
            self._cache(record)
        if self.reporter is not SILENT:
            self.report(EventKind.REPLAYED)

    # --- While the body runs ----------------------------------------------------------------------------------------

    async def ensure_owned(self) -> None:
        """Renew the claim at the store, never by a local guess; a bypassed call has none, and passes.

        Raises:
            IdempotencyLeaseLostError: The claim is not ours any more.
            IdempotencyPersistenceLayerError: The layer failed to answer.
            IdempotencyUsageError: The call replays, or is over.
        """
        if not self.takes("ensure_owned"):
            return
        with CancellationShield() as shield:
            is_ours = await self._claim.confirm(shield, effect=RUNNING)
        if not is_ours:
            reason = "another call owns it, or it was released by hand"
            raise IdempotencyLeaseLostError(key=self.key.text, record=None, reason=reason)
        self.record = self._claim.record

    def holds_lease(self, *, for_seconds: float) -> bool:
        """Whether, by this process's clock, no other call can take over for so long; also after the call has ended."""
        was_claimed = self.holds_claim or self.phase is _ENDED
        return was_claimed and not self._claim.has_lapsed(in_seconds=for_seconds)

    async def complete_in(self, transaction: object, text: str) -> None:
        """Write the outcome in a transaction of the body's; a bypassed call writes nothing.

        Raises:
            IdempotencyUsageError: The layer cannot, it is no open transaction on its database, or another one was used
                before and was not rolled back.
            IdempotencyLeaseLostError: The claim is not ours any more, so the transaction must be rolled back.
            IdempotencySerializationError: The outcome does not fit.
            Exception: What the driver raises.
        """
        if not self.takes("complete_in"):
            return
        layer = self.plan.layer
        if not isinstance(layer, SupportsCompletionInTransaction):
            raise self._unable(
                layer, "PostgresPersistenceLayer, or SQLitePersistenceLayer with in_application_database=True,"
            )
        layer.check_transaction(transaction, blocking=self.is_blocking)
        earlier = self.phase
        await self._begin_completion()
        now = self.plan.clock()
        try:
            is_stored = await layer.complete_in(transaction, self._claim.completed(text, None, now=now), now=now)
        except IdempotencyHeldByTransactionError as held:
            self._undo_completion(earlier)
            is_earlier_open = earlier is Phase.COMPLETING
            message = _REFUSALS_IN_TRANSACTION[Commitment.OPEN] if is_earlier_open else _HELD_BY_ANOTHER
            raise IdempotencyUsageError(message, key=self.key.text) from held
        except IdempotencyError:
            self._undo_completion(earlier)  # the layer has refused it
            raise
        finally:
            await self._resume_renewal()
        if not is_stored:
            await self._explain_refusal(earlier)

    async def completion_item(self, text: str) -> dict[str, Any] | None:
        """Return the write that stores the outcome, for a request of the body's; None: the call is bypassed.

        Raises:
            IdempotencyUsageError: The layer has no such writes.
            IdempotencyLeaseLostError: This process is a fork of the one that made the claim.
            IdempotencySerializationError: The outcome does not fit.
        """
        if not self.takes("completion_item"):
            return None
        layer = self.plan.layer
        if not isinstance(layer, SupportsCompletionItem):
            raise self._unable(layer, "DynamoDBPersistenceLayer")
        now = self.plan.clock()
        item = layer.completion_item(self._claim.completed(text, None, now=now), now=now)
        await self._begin_completion()
        return item  # no renewal from here on: the store would refuse one of two writes to a record that meet

    def _unable(self, layer: object, others: str) -> IdempotencyUsageError:
        return IdempotencyUsageError(
            f"{type(layer).__name__} cannot complete a call together with your own writes; {others} can",
            key=self.key.text,
        )

    async def _begin_completion(self) -> None:
        """Let nothing of ours meet the body's transaction, or its request."""
        self._claim.check_process()
        await self._claim.pause_renewal()
        self.takes("complete_in")  # or the body has ended meanwhile
        self.phase = _COMPLETING
        self._claim.is_in_transaction = True

    def _undo_completion(self, earlier: Phase) -> None:
        if self.phase is _COMPLETING:  # or the body has ended meanwhile
            self.phase = earlier
        self._claim.is_in_transaction = earlier is _COMPLETING

    async def _resume_renewal(self) -> None:
        self._claim.resume_renewal()

    async def _explain_refusal(self, earlier: Phase) -> None:
        """Raise why the transaction sees no claim of ours; `earlier` is the phase before it was asked."""
        owner = self._claim.record.owner
        with CancellationShield() as shield:
            find = partial(self.plan.layer.get, self.key.text)
            found = await ask(find, shield=shield, key=self.key.text, effect=RUNNING)
        commitment = lifecycle.commitment(found, owner, is_free=earlier is _CLAIMED)
        if commitment is Commitment.LOST:
            raise self._lease_lost(found)
        self._undo_completion(earlier)
        raise IdempotencyUsageError(_REFUSALS_IN_TRANSACTION[commitment], key=self.key.text)

    def _lease_lost(self, found: DataRecord | None) -> IdempotencyLeaseLostError:
        reason = "another call took it over, or it was released by hand; roll the transaction back"
        return IdempotencyLeaseLostError(key=self.key.text, record=found, reason=reason)

    # --- After the body ---------------------------------------------------------------------------------------------

    async def confirm_commit(self) -> None:
        """Look whether the transaction that completes the call was committed; if so, its outcome is in `record`.

        Raises:
            IdempotencyUsageError: It is still open, or was rolled back.
            IdempotencyLeaseLostError: The claim is not ours any more, so it cannot have been committed.
            IdempotencyPersistenceLayerError: The layer failed to answer, so that is not known.
        """
        self.takes("confirm_commit")
        self.reporter.end_body()
        try:
            with self._claim.completion_shield() as shield:
                commitment, found = await self._look(shield)
                if commitment is Commitment.ROLLED_BACK:
                    await self._claim.release(is_failure=False, shield=shield)
        except BaseException as error:
            self._end(None, error)
            raise
        self._end(None)
        if commitment is Commitment.LOST:
            raise self._lease_lost(found)
        if commitment is not Commitment.COMMITTED:
            raise IdempotencyUsageError(_NOT_COMMITTED[commitment], key=self.key.text)

    async def _look(self, shield: CancellationShield) -> tuple[Commitment, DataRecord | None]:
        """Look what has become of the outcome in the transaction, and count it if it was committed."""
        claim = self._claim
        commitment, found = await claim.commitment(shield)
        claim.is_in_transaction = commitment is Commitment.OPEN
        if commitment is Commitment.LOST:
            claim.note_loss()
            self.report(EventKind.ABANDONED)
        elif commitment is Commitment.COMMITTED and found is not None:
            self._count(found, EventKind.EXECUTED)
        return commitment, found

    async def complete(self, text: str, outcome: OutcomeKind | None = None) -> WhoseOutcome:
        """Record the outcome; afterwards `record` has the outcome that counts.

        Raises:
            IdempotencyLeaseLostError: The claim was lost, and the winner has no outcome.
            IdempotencyPersistenceLayerError: The outcome could not be recorded while the lease was held.
        """
        self.takes("complete")
        claim = self._claim
        if self.reporter is not SILENT:
            self.reporter.end_body()
        try:
            with claim.completion_shield() as shield:
                ours = await claim.complete(text, outcome, shield=shield)
                if ours is not None:
                    self._count(ours, EventKind.EXECUTED)
            if ours is None:
                claim.note_loss()
                self.report(EventKind.ABANDONED)
                self._count(await winner(self.plan, self.key), EventKind.REPLAYED)
        except BaseException as error:
            self._end(None, error)
            raise
        return _WINNERS if ours is None else _OURS

    async def fail(self, error: BaseException) -> WhoseOutcome:
        """Release the claim, or store the exception if it is an outcome.

        If that fails, it is logged and noted on the error. A cancellation meanwhile is requested again instead of
        being delivered: the error of the body goes first.

        Returns:
            OURS: the error is to be raised. WINNERS: it would have been the outcome, but another counts.

        Raises:
            IdempotencyLeaseLostError: The same, but the winner has no outcome.
        """
        if not self.takes("fail"):
            return _OURS
        claim = self._claim
        self.reporter.end_body(error)
        try:
            claim.stop_renewal()
            if not claim.is_of_this_process():
                return _OURS
            if isinstance(error, GeneratorExit):  # nothing may be awaited any more
                claim.release_in_background()
                self.phase = _ENDED  # and the claim reports its ending
                return _OURS
            is_outcome = self.phase is _CLAIMED and type(error) in self.plan.config.stored_exceptions
            if is_outcome and isinstance(error, Exception):
                return await self._complete_with(error)
            await self._release(error, claim)
            return _OURS
        finally:
            self._end(None)

    async def _complete_with(self, error: Exception) -> WhoseOutcome:
        """Store an exception of the body as its outcome."""
        try:
            text, outcome = exception_text(error), OutcomeKind.EXCEPTION
        except IdempotencySerializationError as exc:
            logger.error("an exception of %s cannot be stored: %s", self.plan.function, exc)  # noqa: TRY400 - no trace: it may show data
            text, outcome = UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE
        try:
            return await self.complete(text, outcome)
        except IdempotencyPersistenceLayerError as failure:
            self.note_failure(error, failure)
            return _OURS

    async def _release(self, error: BaseException, claim: Claim) -> None:
        shield = CancellationShield()
        shield.bound(CLEANUP_SECONDS if isinstance(error, asyncio.CancelledError) else RELEASE_SECONDS)
        try:
            commitment = Commitment.ROLLED_BACK
            if self.phase is _COMPLETING:
                commitment, _ = await self._look(shield)
            if commitment is Commitment.ROLLED_BACK:
                is_failure = isinstance(error, Exception) or not self.has_body_begun
                await claim.release(is_failure=is_failure, shield=shield)
        except IdempotencyPersistenceLayerError as failure:
            self.note_failure(error, failure)
        finally:
            shield.request_again()

    def note_failure(self, error: BaseException, failure: IdempotencyError) -> None:
        """Note on the error of the body, and in the log, that its claim could not be released."""
        error.add_note(f"aidem could not release the claim of idempotency key {self.key.text!r}: {failure}")
        logger.error("the claim of %s could not be released: %s", self.plan.function, failure)
        self.report(EventKind.PERSISTENCE_ERROR, failure)

    def _count(self, record: DataRecord, kind: EventKind) -> None:
        """Take the record as the outcome of the call."""
        self.record = record
        self.phase = _ENDED
        self._flight.end(record)
        if self.plan.config.use_local_cache:
            self._cache(record)
        if self.reporter is not SILENT:
            self.report(kind)

    def _end(self, ending: Ending, error: BaseException | None = None) -> None:
        holds_claim = self.holds_claim
        if holds_claim:
            self.phase = _ENDED
        self._flight.end(ending)
        if holds_claim:
            self.reporter.report_end(error=error)

    def _cache(self, record: DataRecord) -> None:
        self.plan.shared.cache.put(record, max_items=self.plan.config.local_cache_max_items)
