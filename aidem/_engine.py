"""The engine: the async shell around `_state` that takes one call from its claim to its outcome.

A front makes a `Call` and awaits `begin`; the call then has claimed its key, found an outcome to replay, or runs
unprotected. After the body it awaits `complete` or `fail`. What a record means is `_state`'s to say; here is what takes
time: following other calls of the loop, waiting for other processes, and what a call does when its claim was lost.
"""

from __future__ import annotations

import asyncio
import logging
from enum import Enum, auto
from typing import TYPE_CHECKING

from aidem import _state
from aidem._cancellation import HeldOff
from aidem._claim import EFFECT_HAPPENED, LONGEST_DELAY_SECONDS, Claim, backoff_seconds
from aidem._flights import Flight
from aidem._state import Blocked, Step
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencyUsageError,
    IdempotencyValidationError,
)
from aidem.hooks import SILENT, EventKind, Reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._flights import Ending
    from aidem._plan import Key, Plan
    from aidem._record import DataRecord, OutcomeKind

logger = logging.getLogger("aidem")


class Phase(Enum):
    """How far a call has come."""

    NEW = auto()
    CLAIMED = auto()
    REPLAYED = auto()
    BYPASSED = auto()
    ENDED = auto()


class Call:
    """One idempotent call.

    Attributes:
        plan: What is the same for every call of the function.
        key: What names the call.
        phase: How far it has come.
        record: The claim as stored, or the record that is replayed or counts; None: it runs unprotected.
        reporter: Tells the hooks.
        supersedes: Whether to take the claim of an earlier attempt from its owner (a durable function's replay).
        is_body_alive: Whether what runs the body still exists; None: the task that awaits `begin` runs it.
    """

    __slots__ = (
        "_claim",
        "_flight",
        "_held_off",
        "_loop_state",
        "is_body_alive",
        "key",
        "phase",
        "plan",
        "record",
        "reporter",
        "supersedes",
    )

    def __init__(self, plan: Plan, key: Key, *, bypassed: bool = False) -> None:
        self.plan = plan
        self.key = key
        self.phase = Phase.BYPASSED if bypassed or not key.text else Phase.NEW
        self.record: DataRecord | None = None
        self.reporter = SILENT
        if plan.config.hooks:
            self.reporter = Reporter(plan.config.hooks, key=key.text, function=plan.function)
        self.supersedes = False
        self.is_body_alive: Callable[[], bool] | None = None
        self._held_off = HeldOff()
        self._claim: Claim | None = None
        self._flight: Flight | None = None

    @property
    def fence(self) -> int:
        """The fence of the record; 0 where there is none."""
        return 0 if self.record is None else self.record.fence

    def held_record(self) -> DataRecord:
        """Return the record, of a call that claimed, found or completed one."""
        if self.record is None:
            raise IdempotencyUsageError("this call has no record", key=self.key.text)
        return self.record

    def is_ours(self, record: DataRecord) -> bool:
        """Whether a record was written under the claim of this call."""
        return self._claim is not None and record.owner == self._claim.record.owner

    # --- Before the body --------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Claim the key or find its outcome; afterwards `phase` is CLAIMED, REPLAYED or BYPASSED.

        Raises:
            IdempotencyValidationError: The key was used with another payload.
            IdempotencyAlreadyInProgressError: Another execution did not end in time.
            IdempotencyInDoubtError: The owner of the claim vanished, and it must not be taken over.
            IdempotencyPersistenceLayerError: The layer failed; nothing was run.
        """
        if self.phase is Phase.BYPASSED:
            self.reporter.report(EventKind.BYPASSED)
            return
        try:
            await self._find()
        except IdempotencyPersistenceLayerError as failure:
            self.reporter.report(EventKind.PERSISTENCE_ERROR, error=failure)
            if not self._may_run_unprotected(failure):
                raise
            logger.warning("%s runs without idempotency: %s", self.plan.function, failure)
            self.phase = Phase.BYPASSED
            self.reporter.report(EventKind.BYPASSED, error=failure)
        except IdempotencyError as conflict:
            self.reporter.report(EventKind.CONFLICT, error=conflict)
            raise

    def _may_run_unprotected(self, failure: IdempotencyPersistenceLayerError) -> bool:
        is_outage = isinstance(failure, IdempotencyPersistenceConnectionError)
        return is_outage and self.plan.config.on_persistence_error == "run"

    async def _find(self) -> None:
        config = self.plan.config
        if config.use_local_cache:
            cached = self.plan.shared.cache.get(self.key.text, now=self.plan.clock())
            if cached is not None:
                self._replay(cached)
                return
        loop = asyncio.get_running_loop()
        self._loop_state = self.plan.shared.of(loop)
        flights = self._loop_state.flights
        deadline = loop.time() + config.wait_timeout_seconds
        polls = 0
        while config.wait_timeout_seconds > 0 and (flight := flights.get(self.key.text)) is not None:
            ending = await self._follow(flight, deadline=deadline)
            if ending is not None:
                self._replay(ending)
                return
            polls = flight.polls
        await self._lead(polls=polls, deadline=deadline)

    async def _follow(self, flight: Flight, *, deadline: float) -> DataRecord | None:
        """Wait while another call of this loop is at the store; return the outcome it found, None if it has none."""
        loop = asyncio.get_running_loop()
        while not flight.is_over:
            if flight.record is not None and _state.differs(flight.record, self.key.payload_hash):
                raise IdempotencyValidationError(record=flight.record)
            if loop.time() >= deadline:
                raise self._in_progress(flight.record, now=self.plan.clock())
            if flight.lease_deadline is not None and loop.time() >= flight.lease_deadline:
                self._forget(flight)  # its claim may be taken over by now
                return None
            await flight.change(deadline=min(deadline, flight.lease_deadline or deadline))
        self._forget(flight)
        if isinstance(flight.ending, IdempotencyPersistenceLayerError):
            failure = flight.ending
            raise type(failure)(str(failure), key=failure.key) from failure
        if flight.ending is not None:
            self.reporter.report(EventKind.WAITED, fence=flight.ending.fence)
        return flight.ending

    async def _lead(self, *, polls: int, deadline: float) -> None:
        """Ask the store until the key is ours, has an outcome, or the time is over."""
        self._flight = flight = Flight(polls=polls)
        # One who does not wait may find another's flight under the key, and leaves it.
        self._loop_state.flights.setdefault(
            self.key.text, flight
        )
        try:
            while self.phase is Phase.NEW:
                await self._ask(flight, deadline=deadline)
        except BaseException as error:
            self._end(error if isinstance(error, IdempotencyPersistenceLayerError) else None)
            raise
        if flight.polls > polls:
            self.reporter.report(EventKind.WAITED, fence=self.fence)

    async def _ask(self, flight: Flight, *, deadline: float) -> None:
        claim = Claim(self.plan, self.key, flight=flight, held_off=self._held_off, reporter=self.reporter)
        answer = await claim.acquire()
        if isinstance(answer, Blocked):
            await self._consider(answer, flight, deadline=deadline)
        else:
            claim.hold(answer, renewals=self._loop_state.renewals, is_body_alive=self.is_body_alive)
            self._claim = claim
            self.record = answer.record
            self.phase = Phase.CLAIMED

    async def _consider(self, answer: Blocked, flight: Flight, *, deadline: float) -> None:
        """Act on the record that blocks us: replay it, raise, or pause before asking again."""
        record, now = answer.record, answer.now
        if now is None:  # judged by the clock of whoever asks, so its writer's may be behind
            now = self.plan.clock() - self.plan.config.max_clock_skew_seconds
        match _state.next_step(record, payload_hash=self.key.payload_hash, now=now):
            case Step.REPLAY:
                self._end(record)
                self._replay(record)
            case Step.MISMATCH:
                raise IdempotencyValidationError(record=record)
            case Step.IN_DOUBT:
                raise IdempotencyInDoubtError(record=record)
            case Step.WAIT:
                flight.publish(record, lease_deadline=None)
                if not await self._supersede(record):
                    await self._pause(record, flight, now=now, deadline=deadline)

    async def _supersede(self, record: DataRecord) -> bool:
        """Take the claim from the attempt that a durable function replays, once, so that one of two replays wins."""
        if not self.supersedes or record.owner is None:
            return False
        self.supersedes = False
        await self._held_off.settle(self.plan.layer.release(record))
        self._held_off.deliver()
        return True

    async def _pause(self, record: DataRecord, flight: Flight, *, now: float, deadline: float) -> None:
        remaining = deadline - asyncio.get_running_loop().time()
        if remaining <= 0:
            raise self._in_progress(record, now=now)
        delay = min(backoff_seconds(flight.polls), remaining)
        end = _state.lease_end(record)
        if end is not None and end / 1000 > now:
            delay = min(delay, end / 1000 - now + 0.001)
        flight.polls += 1
        if self.plan.waits_for_change is None:
            await asyncio.sleep(delay)
        else:
            await self.plan.waits_for_change.wait_for_change(self.key.text, delay)

    def _in_progress(self, record: DataRecord | None, *, now: float) -> IdempotencyAlreadyInProgressError:
        end = None if record is None else _state.lease_end(record)
        # It may end at any moment, so even a long lease is worth a look after a second.
        wait = LONGEST_DELAY_SECONDS if end is None else min(LONGEST_DELAY_SECONDS, max(0.0, end / 1000 - now))
        return IdempotencyAlreadyInProgressError(key=self.key.text, record=record, retry_after_seconds=wait)

    def _replay(self, record: DataRecord) -> None:
        if _state.differs(record, self.key.payload_hash):
            raise IdempotencyValidationError(record=record)
        self.record = record
        self.phase = Phase.REPLAYED
        self._cache(record)
        self.reporter.report(EventKind.REPLAYED, fence=record.fence)

    # --- While the body runs ----------------------------------------------------------------------------------------

    async def ensure_owned(self) -> None:
        """Renew the claim at the store, never by a local guess; an unprotected call has none, and passes.

        Raises:
            IdempotencyLeaseLostError: The claim is not ours any more.
            IdempotencyPersistenceLayerError: The layer failed to answer.
            IdempotencyUsageError: The call replays, or is over.
        """
        if self.phase is Phase.BYPASSED:
            return
        if self._claim is None or self.phase is not Phase.CLAIMED:
            message = "ensure_owned() asks about a running claim; call it in the body of a call that is not replayed"
            raise IdempotencyUsageError(message, key=self.key.text)
        await self._claim.confirm()
        self.record = self._claim.record

    # --- After the body ---------------------------------------------------------------------------------------------

    async def complete(self, text: str, outcome: OutcomeKind | None = None) -> DataRecord:
        """Record the outcome; return the record that counts, which is the winner's if our claim was lost.

        Raises:
            IdempotencyLeaseLostError: The claim was lost, and the winner has no outcome.
            IdempotencyPersistenceLayerError: The outcome could not be recorded while the lease was held.
        """
        claim = self._held_claim()
        claim.stop_renewal()
        try:
            claim.check_process()
            ours = await claim.complete(text, outcome)
            self.record = ours or await self._winner(claim)
        except BaseException as error:
            self._end(error if isinstance(error, IdempotencyPersistenceLayerError) else None)
            self._held_off.deliver()
            raise
        self._end(self.record)
        self._cache(self.record)
        self.reporter.report(EventKind.EXECUTED if ours else EventKind.REPLAYED, fence=self.fence)
        self._held_off.deliver()
        return self.record

    async def _winner(self, claim: Claim) -> DataRecord:
        """Return the outcome of whoever took our claim over, waiting for it as a waiter does."""
        claim.lost()
        key, clock = self.key.text, self.plan.clock
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.plan.config.wait_timeout_seconds
        attempt = 0
        while True:
            self._held_off.deliver()
            record = await claim.settle(lambda: self.plan.layer.get(key), effect=EFFECT_HAPPENED)
            if record is None or _state.is_expired(record, now=clock()):
                raise IdempotencyLeaseLostError(key=key, record=None, reason="it was taken over and given back")
            step = _state.next_step(record, payload_hash=self.key.payload_hash, now=clock())
            if step is Step.REPLAY:
                return record
            remaining = deadline - loop.time()
            if step is not Step.WAIT or remaining <= 0:
                reason = "another call took it over and has no outcome for this payload yet"
                raise IdempotencyLeaseLostError(key=key, record=record, reason=reason)
            await asyncio.sleep(min(backoff_seconds(attempt), remaining))
            attempt += 1

    async def fail(self, error: BaseException) -> None:
        """Give the key back, or store the exception if it is an outcome; raises nothing of its own.

        A failure to do so is logged and noted on the error. A cancellation meanwhile stays requested, not delivered:
        the error of the body wins.
        """
        if self.phase is not Phase.CLAIMED:
            return
        claim = self._held_claim()
        claim.stop_renewal()
        ending: Ending = None
        try:
            if not claim.is_of_this_process():
                return
            if isinstance(error, GeneratorExit):  # nothing may be awaited any more
                claim.give_back_in_background()
            elif (ending := await claim.give_back(error)) is not None:
                self.record = ending
                self._cache(ending)
                self.reporter.report(EventKind.EXECUTED, fence=self.fence)
        except Exception as failure:
            error.add_note(f"aidem could not give back idempotency key {self.key.text!r}: {failure}")
            logger.exception("%s could not give its idempotency key back", self.plan.function)
            self.reporter.report(EventKind.PERSISTENCE_ERROR, fence=self.fence, error=failure)
        finally:
            self._end(ending)

    def _held_claim(self) -> Claim:
        if self._claim is None or self.phase is not Phase.CLAIMED:
            message = "this call holds no claim that could be completed"
            raise IdempotencyUsageError(message, key=self.key.text)
        return self._claim

    def _end(self, ending: Ending) -> None:
        if self.phase is Phase.CLAIMED:
            self.phase = Phase.ENDED
        if self._flight is not None:
            self._forget(self._flight)
            self._flight.end(ending)

    def _forget(self, flight: Flight) -> None:
        flights = self._loop_state.flights
        if flights.get(self.key.text) is flight:
            del flights[self.key.text]

    def _cache(self, record: DataRecord) -> None:
        if self.plan.config.use_local_cache:
            self.plan.shared.cache.put(record, max_items=self.plan.config.local_cache_max_items)
