"""A claim of ours: acquired, renewed while the body runs, and then completed, released or left in doubt.

Its operations at the layer end although the call is cancelled, and are tried again while the lease is held.

A claim is renewed at a third of its lease, while its body runs and not a moment longer. A short call pays for an entry
in a dict: one timer serves all claims of an event loop, and only a body that lasts long enough gets a task that renews.
Nothing renews a claim whose body is not running: that task holds the claim weakly, and ends when the call is over or
gone, its task or thread is dead, or the process is a fork of the one that made it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
import weakref
from contextvars import Context, copy_context
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

from aidem._engine.failures import (
    COMMIT_UNKNOWN,
    EFFECT_HAPPENED,
    FAILED,
    FOUND_HAPPENED,
    NOTHING_RUN,
    RUNNING,
    failure_of,
    told,
)
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Commitment
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, Immediate, in_background
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyHeldByTransactionError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.hooks import EventKind
from aidem.persistence import SupportsCompletionInTransaction
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._engine.plan import CallKey, Plan
    from aidem._engine.shared import PerLoop, SingleFlight
    from aidem._rules.record import DataRecord
    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.hooks import Reporter
    from aidem.persistence import SupportsTakeOver

logger = logging.getLogger("aidem")

T = TypeVar("T")

RENEWALS_PER_LEASE: Final = 3
RETRIES_WITHOUT_LEASE_SECONDS: Final = 30.0
SHORTEST_REQUEST_SECONDS: Final = 1.0

FIRST_RETRY_DELAY_SECONDS: Final = 0.1
LONGEST_RETRY_DELAY_SECONDS: Final = 2.0

RELEASE_SECONDS: Final = 1.0
"""How long a failed call tries to release its claim before its caller gets the exception."""

_SINCE_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
"""A clock that goes on while the machine is suspended: on Linux CLOCK_BOOTTIME, on macOS CLOCK_MONOTONIC."""

seconds_since_boot: Callable[[], float] = partial(
    methodcaller("monotonic") if _SINCE_BOOT is None else methodcaller("clock_gettime", _SINCE_BOOT), time
)
"""Returns seconds that count time in suspension, too, as `time.monotonic` does on Windows. Event loops may use a clock
that does not."""


class _Process:
    """Stands for this process: a fork gets another one."""


_process = _Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - asking for the pid would be a system call or two for every call
    _process = _Process()


getattr(os, "register_at_fork", dict)(after_in_child=_forked)  # where there is no fork, nothing is to be done


class Claim:
    """One claim of one call, with a token of its own, made anew for every attempt to acquire the key.

    Attributes:
        is_in_transaction: Whether its outcome was written in a transaction of the body's, so that it may end at any
            moment without our doing.
        record: The claim as proposed, then as stored.
        lease_deadline: When it lapses, in seconds of the loop's clock, which may stand still while the machine is
            suspended; None: not before it expires.
    """

    # Of a claim that is held; one that never is, as that of a replay, pays nothing for these.
    is_in_transaction = False
    _is_lost = False
    _failed_renewals = 0  # in a row
    _renewal: Renewal | None = None
    _has_body_ended: Callable[[], bool]

    def __init__(self, plan: Plan, key: CallKey, flight: SingleFlight, loop_state: PerLoop, reporter: Reporter) -> None:
        self._plan = plan
        self._flight = flight
        self._loop_state = loop_state
        self._reporter = reporter
        self._process = _process
        self._lease, self._renews = plan.lease()
        self.lease_deadline: float | None = None
        self._count_from(self._asking())
        # The token comes from the kernel, for every claim anew: snapshots and forks share no generator.
        self.record = lifecycle.claim(
            key.text,
            owner=os.urandom(16).hex(),
            payload_hash=key.payload_hash,
            note=key.note,
            lease=self._lease,
            now=plan.clock(),
        )

    def has_lapsed(self, *, in_seconds: float = 0.0) -> bool:
        """Whether its lease has passed, or will have passed so many seconds from now, by our own clock."""
        if self.lease_deadline is None:
            return False
        now, since_boot = self._loop_state.time(), seconds_since_boot()
        return now + in_seconds >= self.lease_deadline or since_boot + in_seconds >= self._lapses_after_boot

    def is_of_this_process(self) -> bool:
        """Whether it was made here, and not by the process that this one is a fork of."""
        return self._process is _process

    def check_process(self) -> None:
        """Raise `IdempotencyLeaseLostError` in a fork of the process that made the claim."""
        if self._process is not _process:
            reason = "this process is a fork of the one that owns it"
            raise IdempotencyLeaseLostError(key=self._key, record=self.record, reason=reason)

    def _asking(self) -> tuple[float, float]:
        """Return the instant before a request goes out, on the loop's clock and since boot: a lease counts from it."""
        return self._loop_state.time(), seconds_since_boot()

    def _take(self, record: DataRecord, asked: tuple[float, float]) -> None:
        self.record = record
        self._count_from(asked)

    def _count_from(self, asked: tuple[float, float]) -> None:
        self._asked_at, since_boot = asked
        seconds = self._lease.lease_seconds
        if seconds is not None:
            self.lease_deadline = self._asked_at + seconds
            self._lapses_after_boot = since_boot + seconds

    # --- Acquired ---------------------------------------------------------------------------------------------------

    def acquire(self) -> Awaitable[Claimed | Blocked | None]:
        """Acquire the key; an interrupted acquisition leaves no claim behind if the layer answers.

        Returns:
            The answer; None: the claim was lost again before the answer came.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        try:
            operation = _started(self._acquisition)
            if isinstance(operation, Immediate) and self._holds(operation.answer):
                return operation
        except BaseException:  # a signal handler raised
            in_background(partial(self._release_unless_refused, None))
            raise
        return self._acquired(operation)

    async def _acquired(self, operation: Awaitable[Claimed | Blocked]) -> Claimed | Blocked | None:
        shield = CancellationShield()
        try:
            with shield:
                return await self._granted(operation, shield)
        except (IdempotencyError, asyncio.CancelledError):  # raised when the claim was released
            raise
        except BaseException:  # a signal handler raised, or the coroutine is closed: nothing may be awaited any more
            in_background(partial(self._release_unless_refused, shield.operation), after=shield.operation)
            raise

    async def _granted(
        self, operation: Awaitable[Claimed | Blocked], shield: CancellationShield
    ) -> Claimed | Blocked | None:
        try:
            answer = await _answered(operation, shield, self._key, NOTHING_RUN, None)
            holds = self._holds(answer)
            if shield.is_pending and isinstance(answer, Claimed):
                await self._release_unused(shield)
            elif not holds and not await self._renew_late(shield):
                return None
        except IdempotencyError as failure:
            if may_be_claimed(failure):
                await self._release_unused(shield)
            raise
        return answer

    def _holds(self, answer: Claimed | Blocked) -> bool:
        """Take the record in the answer; False: the answer came after the end of the lease that it grants."""
        if isinstance(answer, Blocked):
            return True
        self.record = answer.record
        return not self.has_lapsed()

    async def _renew_late(self, shield: CancellationShield) -> bool:
        """Renew a claim whose answer came after its lease, before anything runs; False: it is not ours any more."""
        asked = self._asking()
        record = await ask(self._renewed_record, shield=shield, key=self._key, effect=NOTHING_RUN)
        if record is None:
            return False
        self._take(record, asked)
        if self.has_lapsed():
            message = f"the persistence layer answers later than a lease lasts; {NOTHING_RUN}"
            raise IdempotencyPersistenceConnectionError(message, key=self._key)
        if shield.is_pending:
            await self._release_unused(shield)
        return True

    async def _release_unless_refused(self, acquisition: UncancellableFuture[Any] | None) -> None:
        failure = acquisition.exception() if acquisition is not None and acquisition.done() else None
        if failure is None or may_be_claimed(failure):
            await self._persist(self._release_once, effect=NOTHING_RUN)

    async def _release_unused(self, shield: CancellationShield) -> None:
        """Release a claim under which nothing ran, if it is there at all; the caller waits for its error."""
        is_urgent = not shield.is_pending
        if is_urgent:
            shield.bound(RELEASE_SECONDS)
        try:
            if is_urgent and self._lease.may_be_taken_over:
                await ask(self._release_once, shield=shield, key=self._key, effect=NOTHING_RUN)
            else:  # or it would be in doubt though nothing ran
                await self._ask_persistently(self._release_once, shield=shield, effect=NOTHING_RUN)
        except IdempotencyError as failure:
            function = self._plan.function
            logger.warning("a claim of %s could not be released, it lapses with its lease: %s", function, failure)

    # --- Taken over to be checked -----------------------------------------------------------------------------------

    async def take_over(self, found: DataRecord, *, shield: CancellationShield) -> bool:
        """Take the place of a claim in doubt, with its payload hash and its note; False: it is not there any more.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed.
        """
        plan, skew = self._plan, self._plan.config.max_clock_skew_seconds
        layer = cast("SupportsTakeOver", plan.layer)
        proposed = self.record = self.record.replace(payload_hash=found.payload_hash, note=found.note)
        taken = await ask(
            lambda: layer.take_over(found, proposed, now=plan.clock(), max_clock_skew_seconds=skew),
            shield=shield,
            key=self._key,
            effect=NOTHING_RUN,
        )
        if taken is not None:
            self.record = taken
        return taken is not None

    async def put_back(
        self, in_doubt: DataRecord, *, ahead_seconds: float, shield: CancellationShield
    ) -> DataRecord | None:
        """Put a claim in doubt in the place of ours; return it as stored, or None: ours is gone.

        Args:
            in_doubt: That claim, with its instants by the clock that judges.
            ahead_seconds: How far that clock is ahead of ours.
            shield: Bounds it.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed.
        """
        plan, ours = self._plan, self.record
        layer = cast("SupportsTakeOver", plan.layer)
        if not ours.fence:  # the reply to the take-over was lost
            find = partial(plan.layer.get, self._key)
            found = await self._ask_persistently(find, shield=shield, effect=NOTHING_RUN)
            if found is None or not lifecycle.is_held_by(found, ours.owner):
                return None
            ours = found
        return await self._ask_persistently(
            lambda: layer.take_over(ours, in_doubt, now=plan.clock() + ahead_seconds, force=True),
            shield=shield,
            effect=NOTHING_RUN,
        )

    # --- Held -------------------------------------------------------------------------------------------------------

    def hold(self, *, taken_over: bool, has_body_ended: Callable[[], bool]) -> None:
        """Hold the claim that was acquired, and see to its renewal.

        Args:
            taken_over: Whether it was acquired from an owner whose lease had passed.
            has_body_ended: Tells whether the task or thread that runs the body is gone.
        """
        self._publish()
        if self._renews:
            self._has_body_ended = has_body_ended
            self._loop_state.renewals.watch(self, at=self.next_renewal_at(), context=copy_context())
        if taken_over:
            self._reporter.report(EventKind.TAKEN_OVER, fence=self.record.fence)

    def begin_renewal(self) -> None:
        """Renew from now on: the body lasts long enough to need it."""
        self._renewal = Renewal(self, has_body_ended=self._has_body_ended)

    def next_renewal_at(self) -> float:
        """Return when to renew, in seconds of the loop's clock; sooner while the layer fails to answer."""
        return self._asked_at + self._interval()

    def _interval(self) -> float:
        return (self._lease.lease_seconds or 0.0) / RENEWALS_PER_LEASE

    async def renew(self, shield: CancellationShield) -> bool:
        """Renew once; False: the claim is lost, or the body has ended meanwhile."""
        asked = self._asking()
        shield.deadline = asked[0] + max(self._interval(), SHORTEST_REQUEST_SECONDS)
        if self.lease_deadline is not None and not self.has_lapsed():
            shield.deadline = min(shield.deadline, self.lease_deadline)
        try:
            record = await ask(self._renewed_record, shield=shield, key=self._key, effect=RUNNING)
        except IdempotencyHeldByTransactionError:  # so nobody can take it over
            self._renew_soon()
            return self._renewal is not None
        except IdempotencyPersistenceLayerError as failure:
            self._renewal_failed(failure)
            return self._renewal is not None
        if self._renewal is None:
            return False
        if record is None:
            self.note_loss()
            return False
        if self._failed_renewals:
            logger.warning("the lease of %s was renewed at try %d", self._plan.function, self._failed_renewals + 1)
            self._failed_renewals = 0
        self._take(record, asked)
        self._publish()
        return True

    async def confirm(self, shield: CancellationShield, *, effect: str) -> bool:
        """Renew at the store; False: it is not ours any more. `effect` tells an error the state of the function.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        self.check_process()
        for _ in range(2):
            asked = self._asking()
            record = await ask(self._renewed_record, shield=shield, key=self._key, effect=effect)
            if record is None:
                self.note_loss()
                return False
            self._take(record, asked)
            self._publish()
            if not self.has_lapsed():  # the answer may come after the lease has passed
                return True
        message = f"the persistence layer answers later than the lease lasts; {effect}"
        raise IdempotencyPersistenceConnectionError(message, key=self._key)

    def _publish(self) -> None:
        self._is_lost = False
        until = self.lease_deadline
        if until is None:  # it holds until its record has expired, which is from the next second on
            until = self._asked_at + self._lease.expires_after_seconds + 1.0
        self._flight.publish(self.record, blocks_until=until, is_claim=True)

    def _renewal_failed(self, failure: IdempotencyPersistenceLayerError) -> None:
        if self._renewal is None:
            return
        self._failed_renewals += 1
        if self._failed_renewals == 1:  # one line for an outage, and one when it is over
            logger.warning("the lease of %s could not be renewed, trying again: %s", self._plan.function, failure)
        self._reporter.report(EventKind.PERSISTENCE_ERROR, fence=self.record.fence, error=failure)
        self._renew_soon()
        if self.has_lapsed():
            self.note_loss()

    def _renew_soon(self) -> None:
        interval = self._interval()  # the next try comes after a third of it, also after a long pause
        self._asked_at = self._loop_state.time() - interval + interval / RENEWALS_PER_LEASE

    def note_loss(self) -> None:
        """Report, once, that another call may own the key by now; the body goes on."""
        if not self._is_lost and not self.is_in_transaction:
            self._is_lost = True
            logger.warning("%s has lost its lease; another execution may run", self._plan.function)
            self._reporter.report(EventKind.LEASE_LOST, fence=self.record.fence)
            self._flight.end(None)

    # --- Completed in a transaction of the body's -------------------------------------------------------------------

    async def pause_renewal(self) -> None:
        """Renew no more for now; wait for a renewal under way, which the transaction would meet."""
        renewal = self._halt_renewal()
        if renewal is not None:
            try:
                await renewal.ended(within_seconds=SHORTEST_REQUEST_SECONDS)
            except asyncio.CancelledError:  # nothing is written, and the body may go on
                self.resume_renewal()
                raise

    def resume_renewal(self) -> None:
        """Renew again: if the transaction is rolled back, the body may try another one."""
        if self._renews:
            at = max(self.next_renewal_at(), self._loop_state.time() + self._interval() / RENEWALS_PER_LEASE)
            self._loop_state.renewals.watch(self, at=at, context=copy_context())

    async def commitment(self, shield: CancellationShield) -> tuple[Commitment, DataRecord | None]:
        """Look what has become of the outcome; return that and the record found.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed to answer.
        """
        layer, record = self._plan.layer, self.record
        find = partial(layer.get, self._key)
        found = await self._ask_persistently(find, shield=shield, effect=COMMIT_UNKNOWN)
        is_free = True
        if isinstance(layer, SupportsCompletionInTransaction) and lifecycle.is_held_by(found, record.owner):
            is_free = await self._ask_persistently(partial(layer.is_free, record), shield=shield, effect=COMMIT_UNKNOWN)
            if not is_free:  # or it was committed after the first look
                found = await self._ask_persistently(find, shield=shield, effect=COMMIT_UNKNOWN)
        return lifecycle.commitment(found, record.owner, is_free=is_free), found

    # --- Ended ------------------------------------------------------------------------------------------------------

    def stop_renewal(self) -> None:
        """Stop renewing, for good: the body has ended, though a completion that it has started may not have."""
        self._renews = False
        self._halt_renewal()

    def _halt_renewal(self) -> Renewal | None:
        """Renew no more; return the renewal that may be under way."""
        self._loop_state.renewals.unwatch(self)
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.stop()
        return renewal

    def completion_shield(self) -> CancellationShield:
        """Stop renewing; return a shield under which to complete the claim, for as long as its lease is held.

        Raises:
            IdempotencyLeaseLostError: This process is a fork of the one that made the claim.
        """
        self.stop_renewal()
        self.check_process()
        now = self._loop_state.time()
        if self.lease_deadline is None:
            return CancellationShield(deadline=now + RETRIES_WITHOUT_LEASE_SECONDS)
        # Once at least, though we come late.
        return CancellationShield(deadline=max(self.lease_deadline, now + CLEANUP_SECONDS))

    async def complete(
        self, text: str, outcome: OutcomeKind | None, *, shield: CancellationShield, effect: str = EFFECT_HAPPENED
    ) -> DataRecord | None:
        """Store the outcome, and try again while the lease is held; return the record, or None: the claim is lost.

        `effect` tells an error the state of the function.

        Raises:
            IdempotencyPersistenceLayerError: It could not be stored.
        """
        plan, now = self._plan, self._plan.clock()
        record = self.completed(text, outcome, now=now)
        try:
            stored = self._ask_persistently(lambda: plan.layer.complete(record, now=now), shield=shield, effect=effect)
            is_stored: bool = stored.answer if isinstance(stored, Immediate) else await stored
        except IdempotencySerializationError as error:
            if outcome is OutcomeKind.UNAVAILABLE:
                message = f"the layer finds even a mark too large; {effect}"
                raise IdempotencyPersistenceLayerError(message, key=self._key) from error
            logger.error("the result of %s cannot be stored: %s", plan.function, error)  # noqa: TRY400 - no trace: it may show the result
            return await self.complete(UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE, shield=shield, effect=effect)
        return record if is_stored else None

    def completed(self, text: str, outcome: OutcomeKind | None, *, now: float) -> DataRecord:
        """Return the record of an outcome of the claim."""
        return lifecycle.completed(
            self.record,
            response_data=text,
            outcome=outcome,
            expires_after_seconds=self._plan.config.expires_after_seconds,
            now=now,
        )

    async def release(self, *, is_failure: bool, shield: CancellationShield) -> None:
        """Release it, or leave it in doubt where the body may have had its effect and must not run again.

        A renewal under way need not be waited for: arriving later, it changes neither. A claim that a transaction holds
        is left to it, and to the lease: the transaction may yet be committed.
        """
        try:
            if is_failure or self._lease.may_be_taken_over:
                is_ours = await self._release_persistently(shield)
                ending = EventKind.RELEASED
            else:
                is_ours = await self._ask_persistently(self._abandon, shield=shield, effect=FAILED) is not None
                ending = EventKind.IN_DOUBT
        except IdempotencyHeldByTransactionError:
            return
        if not is_ours:
            self.note_loss()
            ending = EventKind.ABANDONED
        self._reporter.report(ending)

    def release_in_background(self) -> None:
        """Release it without waiting, for a body that is being closed."""
        in_background(self._release_unattended)

    async def _release_unattended(self) -> None:
        shield = CancellationShield()
        shield.bound(CLEANUP_SECONDS)
        try:
            await self.release(is_failure=False, shield=shield)
        finally:
            self._reporter.report_end()  # for want of another

    # --- Operations of the layer ------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return self.record.idempotency_key

    def _ask_persistently(
        self, start: Callable[[], Awaitable[T]], *, shield: CancellationShield, effect: str
    ) -> Awaitable[T]:
        """Try an operation that can be repeated until it succeeds, with back-off, until the deadline of `shield`.

        If the coroutine is closed meanwhile, the operation goes on in the background, for `CLEANUP_SECONDS`.
        """
        operation = _started(start)
        return operation if isinstance(operation, Immediate) else self._retried(operation, start, shield, effect)

    async def _persist(self, start: Callable[[], Awaitable[T]], *, effect: str) -> T:
        """Do the same in the background."""
        shield = CancellationShield()
        shield.bound(CLEANUP_SECONDS)
        return await self._ask_persistently(start, shield=shield, effect=effect)

    async def _retried(
        self, operation: Awaitable[T], start: Callable[[], Awaitable[T]], shield: CancellationShield, effect: str
    ) -> T:
        tries, reason = 1, ""
        try:
            while True:
                try:
                    answer = await _answered(operation, shield, self._key, effect, CLEANUP_SECONDS, tries=tries)
                    break
                except (IdempotencyPersistenceConfigError, IdempotencyHeldByTransactionError):
                    raise
                except IdempotencyPersistenceLayerError as failure:
                    if not await self._pause(tries, failure, shield):
                        raise
                    reason = told(failure.__cause__)
                tries += 1
                operation = _started(start)
        except GeneratorExit:
            in_background(partial(self._persist, start, effect=effect), after=shield.operation)
            raise
        if reason:
            logger.warning("the persistence layer did at try %d what it had failed to do: %s", tries, reason)
        return answer

    async def _pause(self, tries: int, failure: IdempotencyPersistenceLayerError, shield: CancellationShield) -> bool:
        """Wait before the next try; False: there is no time for another."""
        # About 0.1 s, then twice as long each time; not the same for many owners that fail at the same moment.
        longest = min(LONGEST_RETRY_DELAY_SECONDS, FIRST_RETRY_DELAY_SECONDS * 2.0 ** min(tries - 1, 10))
        delay = longest * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
        if shield.deadline is None or self._loop_state.time() + delay > shield.deadline:
            return False
        self._reporter.report(EventKind.PERSISTENCE_ERROR, error=failure)
        try:
            await shield.wait_for(asyncio.sleep(delay))
        except IdempotencyPersistenceConnectionError:
            return False  # the loop was blocked until after the deadline, and `failure` says more than this
        return True

    def _acquisition(self) -> Awaitable[Claimed | Blocked]:
        plan = self._plan
        skew = plan.config.max_clock_skew_seconds
        return plan.layer.acquire(self.record, now=plan.clock(), max_clock_skew_seconds=skew)

    def _renewed_record(self) -> Awaitable[DataRecord | None]:
        now = self._plan.clock()
        return self._plan.layer.renew(lifecycle.renewal(self.record, lease=self._lease, now=now), now=now)

    def _abandon(self) -> Awaitable[DataRecord | None]:
        return self._plan.layer.renew(lifecycle.abandoned(self.record), now=self._plan.clock())

    async def _release_persistently(self, shield: CancellationShield) -> bool:
        """Release it; False: it is not ours any more."""
        tries = 0

        def release() -> Awaitable[bool]:
            nonlocal tries
            tries += 1
            return self._release_once()

        is_ours = await self._ask_persistently(release, shield=shield, effect=FAILED)
        # After a failed try, a claim that is gone within its lease is one that this try has released.
        return is_ours or (tries > 1 and not self.has_lapsed())

    def _release_once(self) -> Awaitable[bool]:
        return self._plan.layer.release(self.record)


def may_be_claimed(failure: BaseException) -> bool:
    """Whether an acquisition that failed may have been applied, and only its reply was lost."""
    if isinstance(failure, IdempotencyPersistenceLayerError):
        return failure.may_be_applied
    return not isinstance(failure, IdempotencyUsageError)


# --- Renewal ---------------------------------------------------------------------------------------------------------


class Renewal:
    """Renews one claim."""

    __slots__ = ("_claim", "_has_body_ended", "_is_stopped", "_task")

    def __init__(self, claim: Claim, *, has_body_ended: Callable[[], bool]) -> None:
        self._claim = weakref.ref(claim)
        self._has_body_ended = has_body_ended
        self._is_stopped = False
        self._task = asyncio.get_running_loop().create_task(self._renew_repeatedly())

    def stop(self) -> None:
        """Stop; a renewal under way ends by itself."""
        self._is_stopped = True
        if not self._task.get_loop().is_closed():
            self._task.cancel()

    async def ended(self, *, within_seconds: float) -> None:
        """Wait until a renewal under way has settled, for so long at most."""
        await asyncio.wait([self._task], timeout=within_seconds)

    def _find(self) -> Claim | None:
        """Return the claim; None: it has ended, or its body does not run in this process."""
        claim = self._claim()
        if claim is None or self._is_stopped or self._has_body_ended() or not claim.is_of_this_process():
            return None
        return claim

    async def _renew_repeatedly(self) -> None:
        delay: float | None = 0.0
        while delay is not None:
            await asyncio.sleep(delay)
            delay = await self._renew()

    async def _renew(self) -> float | None:
        """Renew once; return how long to wait before the next time, None if there is none."""
        claim = self._find()
        if claim is None:
            return None
        with CancellationShield(deadline=claim.lease_deadline) as shield:
            is_ours = await claim.renew(shield)
        return max(0.0, claim.next_renewal_at() - asyncio.get_running_loop().time()) if is_ours else None


class Renewals:
    """The claims of one event loop that are held, but not for so long that they need a renewal."""

    __slots__ = ("_due", "_timer", "_wakes_at")

    def __init__(self) -> None:
        self._due: dict[Claim, tuple[float, Context]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf

    def watch(self, claim: Claim, *, at: float, context: Context) -> None:
        """Begin to renew the claim then, in seconds of the loop's clock, in the context of its own call."""
        self._due[claim] = at, context
        if at < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at = at
            # In an empty context: it serves all claims, and must not keep alive what the first caller has in its own.
            self._timer = asyncio.get_running_loop().call_at(at, self._wake, context=Context())

    def unwatch(self, claim: Claim) -> None:
        """Stop watching the claim."""
        self._due.pop(claim, None)

    def _wake(self) -> None:
        self._timer, self._wakes_at = None, math.inf
        now = asyncio.get_running_loop().time()
        waiting, self._due = self._due, {}
        for claim, (at, context) in waiting.items():
            if at > now:
                self.watch(claim, at=at, context=context)
            else:
                context.run(claim.begin_renewal)


# --- One operation of the layer ---------------------------------------------------------------------------------------


def ask(
    start: Callable[[], Awaitable[T]],
    *,
    shield: CancellationShield,
    key: str,
    effect: str,
    within_seconds: float | None = None,
) -> Awaitable[T]:
    """Wait for one operation of the layer, under a shield.

    Args:
        start: Starts the operation.
        shield: The shield.
        key: The idempotency key, for the error.
        effect: The state of the function, for the error.
        within_seconds: How long it may take. Default: until the deadline of `shield`.

    Raises:
        IdempotencyPersistenceLayerError: It failed.
        IdempotencySerializationError: The layer cannot hold the record.
    """
    operation = _started(start)
    if isinstance(operation, Immediate):
        return operation  # there is nothing to wait for, and no coroutine to pay for
    return _answered(operation, shield, key, effect, within_seconds)


def _started(start: Callable[[], Awaitable[T]]) -> Awaitable[T]:
    """Start an operation; an error that it raises at once is raised when it is awaited."""
    try:
        return start()
    except Exception as error:  # noqa: BLE001 - it is raised where the operation is awaited
        return _raised(error)


async def _raised(error: Exception) -> NoReturn:
    raise error


async def _answered(
    operation: Awaitable[T],
    shield: CancellationShield,
    key: str,
    effect: str,
    within_seconds: float | None,
    *,
    tries: int = 1,
) -> T:
    """Wait for an operation that was started, as `ask` does; `tries` tells the error how often."""
    try:
        return await shield.wait_for(operation, within_seconds=within_seconds)
    except Exception as error:
        if isinstance(error, IdempotencySerializationError) and effect in {EFFECT_HAPPENED, FOUND_HAPPENED}:
            raise  # the result does not fit; elsewhere it would be a fault of the layer
        if isinstance(error, IdempotencyUsageError):
            raise  # the caller has to change something, such as to end its transaction
        raise failure_of(error, key, effect, tries) from error
