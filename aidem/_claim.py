"""A claim of ours: asked for, held and renewed, and then completed, released or left in doubt."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final, TypeVar

from aidem import _state
from aidem._cancellation import CLEANUP_SECONDS, HeldOff, Settled, in_background
from aidem._operations import EFFECT_HAPPENED, FAILED, NOTHING_RUN, RUNNING, ask, ask_persistently, started
from aidem._record import OutcomeKind
from aidem._renewal import Renewal
from aidem._state import Blocked, Claimed
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._flights import Flight
    from aidem._plan import Key, Plan
    from aidem._record import DataRecord
    from aidem._shared import LoopState
    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")

T = TypeVar("T")

RENEWALS_PER_LEASE: Final = 3
RETRIES_WITHOUT_LEASE_SECONDS: Final = 30.0
SHORTEST_REQUEST_SECONDS: Final = 1.0
GIVING_BACK_SECONDS: Final = 1.0
"""How long a failed call tries to give its key back before its caller gets the exception."""


class _Process:
    """Stands for this process: a fork gets another one."""


_process = _Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - asking for the pid would be a system call or two for every call
    _process = _Process()


getattr(os, "register_at_fork", dict)(after_in_child=_forked)  # where there is no fork, nothing is to be done


class Claim:
    """One claim of one call, made anew for every attempt to acquire the key.

    Attributes:
        record: The claim as proposed, then as stored.
        lease_deadline: When it lapses, in seconds of the loop's clock; None: not before it expires.
    """

    __slots__ = (
        "__weakref__",
        "_asked_at",
        "_flight",
        "_has_body_ended",
        "_is_lost",
        "_lease",
        "_loop_state",
        "_plan",
        "_process",
        "_renewal",
        "_renews",
        "_reporter",
        "lease_deadline",
        "record",
    )

    _has_body_ended: Callable[[], bool]

    def __init__(self, plan: Plan, key: Key, *, flight: Flight, loop_state: LoopState, reporter: Reporter) -> None:
        self._plan = plan
        self._flight = flight
        self._loop_state = loop_state
        self._reporter = reporter
        self._renewal: Renewal | None = None
        self._is_lost = False
        self._process = _process
        self._asked_at = loop_state.time()  # before the request goes out: the lease counts from here
        self._lease, self._renews = plan.lease()
        seconds = self._lease.lease_seconds
        self.lease_deadline = None if seconds is None else self._asked_at + seconds
        # The token comes from the kernel, for every claim anew: snapshots and forks share no generator.
        self.record = _state.claim(
            key.text, owner=os.urandom(16).hex(), payload_hash=key.payload_hash, lease=self._lease, now=plan.clock()
        )

    # --- Asked for --------------------------------------------------------------------------------------------------

    async def acquire(self) -> Claimed | Blocked | None:
        """Ask for the key; whatever interrupts it leaves no claim behind, as far as the layer answers.

        Returns:
            The answer; None: the claim was lost again before the answer came.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        held_off = HeldOff()
        try:
            operation = started(self._acquisition)
            if isinstance(operation, Settled):
                answer: Claimed | Blocked = operation.answer
                if self._holds(answer):
                    return answer
            with held_off:
                return await self._acquired(operation, held_off)
        except (IdempotencyError, asyncio.CancelledError):  # raised when the key was given back
            raise
        except BaseException:  # a signal handler raised, or the coroutine is closed: nothing may be awaited any more
            in_background(self._release, after=held_off.operation)
            raise

    async def _acquired(self, operation: Awaitable[Claimed | Blocked], held_off: HeldOff) -> Claimed | Blocked | None:
        try:
            answer = await ask(lambda: operation, held_off=held_off, key=self._key, effect=NOTHING_RUN)
            holds = self._holds(answer)
            if held_off.is_pending and isinstance(answer, Claimed):
                await self._release_unused(held_off)
            elif not holds and not await self._renew_late(held_off):
                return None
        except IdempotencyError:
            await self._release_unused(held_off)  # it may have been applied, and only the reply lost
            raise
        return answer

    def _holds(self, answer: Claimed | Blocked) -> bool:
        """Take note of the answer; False: it came after the lease that it gives."""
        if isinstance(answer, Blocked):
            return True
        self.record = answer.record
        return not self.has_lapsed()

    async def _renew_late(self, held_off: HeldOff) -> bool:
        """Renew a claim whose answer came after its lease, before anything runs; False: it is not ours any more."""
        asked_at = self._loop_state.time()
        record = await ask(self._renewed_record, held_off=held_off, key=self._key, effect=NOTHING_RUN)
        if record is None:
            return False
        self._take(record, asked_at=asked_at)
        if self.has_lapsed():
            message = f"the persistence layer answers later than a lease lasts; {NOTHING_RUN}"
            raise IdempotencyPersistenceConnectionError(message, key=self._key)
        if held_off.is_pending:
            await self._release_unused(held_off)
        return True

    async def _release_unused(self, held_off: HeldOff) -> None:
        """Release a claim that nothing ran under, or that is not even there; the caller waits for its error."""
        is_urgent = not held_off.is_pending
        if is_urgent:
            held_off.bound(GIVING_BACK_SECONDS)
        try:
            if is_urgent and self._lease.may_be_taken_over:
                await ask(self._release, held_off=held_off, key=self._key, effect=NOTHING_RUN)
            else:  # or it would be in doubt though nothing ran
                await self._ask_persistently(self._release, held_off=held_off, effect=NOTHING_RUN)
        except IdempotencyError as failure:
            logger.warning("a claim could not be released, it lapses with its lease: %s", failure)

    # --- Held -------------------------------------------------------------------------------------------------------

    def hold(self, *, taken_over: bool, has_body_ended: Callable[[], bool] | None) -> None:
        """Hold the claim that was acquired, and see to its renewal."""
        self._publish()
        if self._renews:
            if has_body_ended is None:
                task = asyncio.current_task()
                has_body_ended = bool if task is None else task.done
            self._has_body_ended = has_body_ended
            self._loop_state.renewals.watch(self, at=self.next_renewal_at())
        if taken_over:
            self._reporter.report(EventKind.TAKEN_OVER, fence=self.record.fence)

    def begin_renewal(self) -> None:
        """Renew from now on: the body lasts long enough to need it."""
        self._renewal = Renewal(self, has_body_ended=self._has_body_ended)

    def has_lapsed(self) -> bool:
        """Whether its lease has passed, by our own clock."""
        return self.lease_deadline is not None and self._loop_state.time() >= self.lease_deadline

    def is_of_this_process(self) -> bool:
        """Whether it was made here, and not by the process that this one is a fork of."""
        return self._process is _process

    def check_process(self) -> None:
        """Raise `IdempotencyLeaseLostError` in a fork of the process that made the claim."""
        if not self.is_of_this_process():
            reason = "this process is a fork of the one that owns it"
            raise IdempotencyLeaseLostError(key=self._key, record=self.record, reason=reason)

    def next_renewal_at(self) -> float:
        """Return when to renew, in seconds of the loop's clock; sooner while the layer fails to answer."""
        return self._asked_at + self._interval()

    def _interval(self) -> float:
        return (self._lease.lease_seconds or 0.0) / RENEWALS_PER_LEASE

    async def renew(self, held_off: HeldOff) -> bool:
        """Renew once, and take note of the answer; False: it is not ours any more, or the body has ended meanwhile."""
        asked_at = self._loop_state.time()
        held_off.deadline = asked_at + max(self._interval(), SHORTEST_REQUEST_SECONDS)
        if self.lease_deadline is not None and not self.has_lapsed():
            held_off.deadline = min(held_off.deadline, self.lease_deadline)
        try:
            record = await ask(self._renewed_record, held_off=held_off, key=self._key, effect=RUNNING)
        except IdempotencyPersistenceLayerError as failure:
            self._renewal_failed(failure)
            return self._renewal is not None
        if self._renewal is None:
            return False
        if record is None:
            self.note_loss()
            return False
        self._take(record, asked_at=asked_at)
        self._publish()
        return True

    async def confirm(self) -> bool:
        """Renew at the store; False: it is not ours any more.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        self.check_process()
        for _ in range(2):
            asked_at = self._loop_state.time()
            with HeldOff() as held_off:
                record = await ask(self._renewed_record, held_off=held_off, key=self._key, effect=RUNNING)
            if record is None:
                self.note_loss()
                return False
            self._take(record, asked_at=asked_at)
            self._publish()
            if not self.has_lapsed():  # the answer may come after the lease has passed
                return True
        message = f"the persistence layer answers later than the lease lasts; {RUNNING}"
        raise IdempotencyPersistenceConnectionError(message, key=self._key)

    def _take(self, record: DataRecord, *, asked_at: float) -> None:
        self.record = record
        self._is_lost = False
        self._asked_at = asked_at
        if self._lease.lease_seconds is not None:
            self.lease_deadline = asked_at + self._lease.lease_seconds

    def _publish(self) -> None:
        self._flight.publish(self.record, lease_deadline=self.lease_deadline)

    def _renewal_failed(self, failure: IdempotencyPersistenceLayerError) -> None:
        if self._renewal is None:
            return
        logger.warning("the lease of %s could not be renewed: %s", self._plan.function, failure)
        self._reporter.report(EventKind.PERSISTENCE_ERROR, fence=self.record.fence, error=failure)
        interval = self._interval()  # the next try comes after a third of it, also after a long pause
        self._asked_at = self._loop_state.time() - interval + interval / RENEWALS_PER_LEASE
        if self.has_lapsed():
            self.note_loss()

    def note_loss(self) -> None:
        """Take note, once, that the claim may belong to somebody else by now; the body is left to finish."""
        if not self._is_lost:
            self._is_lost = True
            logger.warning("%s has lost its lease; another execution may run", self._plan.function)
            self._reporter.report(EventKind.LEASE_LOST, fence=self.record.fence)
            self._flight.end(None)

    # --- Ended ------------------------------------------------------------------------------------------------------

    def stop_renewal(self) -> asyncio.Task[None] | None:
        """Renew no more, as the body has ended; return the task that settles a renewal under way, if there is one."""
        self._loop_state.renewals.forget(self)
        renewal, self._renewal = self._renewal, None
        return None if renewal is None else renewal.stop()

    def completion_deadline(self) -> float:
        """Return how long to try to complete it, in seconds of the loop's clock: while the lease is held."""
        now = self._loop_state.time()
        if self.lease_deadline is None:
            return now + RETRIES_WITHOUT_LEASE_SECONDS
        return max(self.lease_deadline, now + CLEANUP_SECONDS)  # once at least, though we come late

    async def complete(self, text: str, outcome: OutcomeKind | None, *, held_off: HeldOff) -> DataRecord | None:
        """Store the outcome, trying again while the lease is held; return the record, None if it is not ours any more.

        Raises:
            IdempotencyPersistenceLayerError: It could not be stored.
        """
        plan, now = self._plan, self._plan.clock()
        record = _state.completed(
            self.record,
            response_data=text,
            outcome=outcome,
            expires_after_seconds=plan.config.expires_after_seconds,
            now=now,
        )
        try:
            is_stored = await self._ask_persistently(
                lambda: plan.layer.complete(record, now=now), held_off=held_off, effect=EFFECT_HAPPENED
            )
        except IdempotencySerializationError as error:
            if outcome is OutcomeKind.UNAVAILABLE:
                message = f"the layer finds even a mark too large; {EFFECT_HAPPENED}"
                raise IdempotencyPersistenceLayerError(message, key=self._key) from error
            logger.error("the result of %s cannot be stored: %s", plan.function, error)  # noqa: TRY400 - no trace: it may show the result
            return await self.complete(UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE, held_off=held_off)
        return record if is_stored else None

    async def undo(self, *, is_failure: bool, held_off: HeldOff, renewing: asyncio.Task[None] | None) -> None:
        """Give the key back, or leave it in doubt where the body may have had its effect and must not run again."""
        if is_failure or self._lease.may_be_taken_over:
            is_ours = await self._released(held_off)
            if is_ours:
                self._reporter.report(EventKind.RELEASED, fence=self.record.fence)
        else:
            if renewing is not None:  # or it would overwrite what follows
                await held_off.settle(asyncio.wait([renewing], timeout=CLEANUP_SECONDS))
            is_ours = await self._ask_persistently(self._abandon, held_off=held_off, effect=FAILED) is not None
        if not is_ours:
            self.note_loss()

    async def _released(self, held_off: HeldOff) -> bool:
        """Release it; False: it is not ours any more."""
        tries = 0

        def release() -> Awaitable[bool]:
            nonlocal tries
            tries += 1
            return self._release()

        is_ours = await self._ask_persistently(release, held_off=held_off, effect=FAILED)
        # After a failed try, a claim that is gone within its lease is one that this try has released.
        return is_ours or (tries > 1 and not self.has_lapsed())

    def undo_in_background(self, renewing: asyncio.Task[None] | None) -> None:
        """Undo the claim of a body that is being closed, without waiting."""
        undo = self._release if self._lease.may_be_taken_over else self._abandon
        if renewing is None:
            in_background(undo)
        else:
            renewing.add_done_callback(lambda _task: in_background(undo))

    # --- What is asked of the layer ---------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return self.record.idempotency_key

    def _ask_persistently(self, start: Callable[[], Awaitable[T]], *, held_off: HeldOff, effect: str) -> Awaitable[T]:
        return ask_persistently(start, held_off=held_off, key=self._key, effect=effect, reporter=self._reporter)

    def _acquisition(self) -> Awaitable[Claimed | Blocked]:
        plan = self._plan
        skew = plan.config.max_clock_skew_seconds
        return plan.layer.acquire(self.record, now=plan.clock(), max_clock_skew_seconds=skew)

    def _renewed_record(self) -> Awaitable[DataRecord | None]:
        now = self._plan.clock()
        return self._plan.layer.renew(_state.renewal(self.record, lease=self._lease, now=now), now=now)

    def _abandon(self) -> Awaitable[DataRecord | None]:
        now = self._plan.clock()
        return self._plan.layer.renew(_state.abandoned(self.record, now=now), now=now)

    def _release(self) -> Awaitable[bool]:
        return self._plan.layer.release(self.record)
