"""A claim of ours: asked for, held and renewed, and then completed, released or left in doubt."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from typing import TYPE_CHECKING, Final

from aidem import _state
from aidem._cancellation import in_background
from aidem._record import OutcomeKind
from aidem._renewal import RENEWALS_PER_LEASE
from aidem._state import Claimed
from aidem.exceptions import (
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT, exception_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._cancellation import HeldOff
    from aidem._flights import Flight
    from aidem._plan import Key, Plan
    from aidem._record import DataRecord
    from aidem._renewal import Renewals
    from aidem._state import Blocked
    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")

FIRST_DELAY_SECONDS: Final = 0.05
DELAY_GROWTH: Final = 1.4
LONGEST_DELAY_SECONDS: Final = 1.0
RETRIES_WITHOUT_LEASE_SECONDS: Final = 30.0

NOTHING_RUN: Final = "the function was not run"
RUNNING: Final = "the function is running"
EFFECT_HAPPENED: Final = "the function has run and its effect has happened, its outcome is not recorded"


class _Process:
    """Stands for this process: a fork gets another one."""


_process = _Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - asking for the pid would be a system call or two for every call
    _process = _Process()


os.register_at_fork(after_in_child=_forked)


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
        "_held_off",
        "_is_body_alive",
        "_is_lost",
        "_lease",
        "_plan",
        "_process",
        "_renewal",
        "_renewal_task",
        "_renewals",
        "_renews",
        "_reporter",
        "_task",
        "lease_deadline",
        "record",
    )

    def __init__(self, plan: Plan, key: Key, *, flight: Flight, held_off: HeldOff, reporter: Reporter) -> None:
        self._plan = plan
        self._flight = flight
        self._held_off = held_off
        self._reporter = reporter
        self._renewals: Renewals | None = None
        self._renewal_task: asyncio.Task[None] | None = None
        self._is_lost = False
        self._process = _process
        self._asked_at = asyncio.get_running_loop().time()  # before the request goes out: the lease counts from here
        self._lease, self._renews = plan.lease()
        seconds = self._lease.lease_seconds
        self.lease_deadline = None if seconds is None else self._asked_at + seconds
        # The token comes from the kernel, for every claim anew: snapshots and forks share no generator.
        self.record = _state.claim(
            key.text, owner=os.urandom(16).hex(), payload_hash=key.payload_hash, lease=self._lease, now=plan.clock()
        )

    # --- Asked for --------------------------------------------------------------------------------------------------

    async def acquire(self) -> Claimed | Blocked:
        """Ask for the key; whatever interrupts it leaves no claim behind, as far as the layer answers."""
        skew = self._plan.config.max_clock_skew_seconds
        layer = self._plan.layer
        try:
            answer = await self._held_off.settle(
                layer.acquire(self.record, now=self._plan.clock(), max_clock_skew_seconds=skew)
            )
        except BaseException as error:
            if not isinstance(error, IdempotencyPersistenceConfigError):
                self.release_in_background()  # it may have been applied, and only the reply lost
            self._held_off.deliver()
            if isinstance(error, Exception):
                raise layer_failure(error, self.record.idempotency_key, NOTHING_RUN) from error
            raise
        if self._held_off.is_pending:
            if isinstance(answer, Claimed):
                await self._release_unused()
            self._held_off.deliver()
        return answer

    async def _release_unused(self) -> None:
        try:
            await self._held_off.settle(self._plan.layer.release(self.record))
        except Exception:
            logger.exception("a claim of %s could not be released; it lapses with its lease", self._plan.function)

    # --- Held -------------------------------------------------------------------------------------------------------

    def hold(self, answer: Claimed, *, renewals: Renewals, is_body_alive: Callable[[], bool] | None) -> None:
        """Hold the claim as the layer stored it, and see to its renewal."""
        self.record = answer.record
        self._flight.publish(answer.record, lease_deadline=self.lease_deadline)
        if self._renews:
            self._task = asyncio.current_task() if is_body_alive is None else None
            self._is_body_alive = is_body_alive
            self._renewals = renewals
            self._renewal = renewals.watch(self)
        if answer.taken_over:
            self._reporter.report(EventKind.TAKEN_OVER, fence=self.record.fence)

    @property
    def renewal_interval_seconds(self) -> float:
        """How long to wait between renewals."""
        return (self._lease.lease_seconds or 0.0) / RENEWALS_PER_LEASE

    def is_running(self) -> bool:
        """Whether the claim is to be renewed: it is held, and its body runs in this process."""
        if self._renewals is None or not self.is_of_this_process():
            return False
        if self._is_body_alive is not None:
            return self._is_body_alive()
        return self._task is None or not self._task.done()

    def renew_with(self, task: asyncio.Task[None]) -> None:
        """Keep the task that renews the claim, to cancel it when the body has ended."""
        self._renewal_task = task

    def is_of_this_process(self) -> bool:
        """Whether it was made here, and not by the process that this one is a fork of."""
        return self._process is _process

    def check_process(self) -> None:
        """Raise `IdempotencyLeaseLostError` in a fork of the process that made the claim."""
        if not self.is_of_this_process():
            reason = "this process is a fork of the one that owns it"
            raise IdempotencyLeaseLostError(key=self.record.idempotency_key, record=self.record, reason=reason)

    def request_renewal(self) -> Awaitable[DataRecord | None]:
        """Ask the persistence layer to renew the claim."""
        now = self._plan.clock()
        return self._plan.layer.renew(_state.renewal(self.record, lease=self._lease, now=now), now=now)

    def renewed(self, record: DataRecord, *, asked_at: float) -> None:
        """Take note that the lease counts from `asked_at`, in seconds of the loop's clock."""
        self.record = record
        if self._lease.lease_seconds is not None:
            self.lease_deadline = asked_at + self._lease.lease_seconds
        self._flight.publish(record, lease_deadline=self.lease_deadline)

    def renewal_failed(self, error: Exception) -> None:
        """Take note that the persistence layer failed to answer; once the lease has passed, the claim may be lost."""
        logger.warning("the lease of %s could not be renewed: %s", self._plan.function, error)
        self._reporter.report(EventKind.PERSISTENCE_ERROR, fence=self.record.fence, error=error)
        if self.lease_deadline is not None and asyncio.get_running_loop().time() >= self.lease_deadline:
            self.lost()

    def lost(self) -> None:
        """Take note, once, that the claim may belong to somebody else by now; the body is left to finish."""
        if not self._is_lost:
            self._is_lost = True
            logger.warning("%s lost its lease while it ran; another execution may start", self._plan.function)
            self._reporter.report(EventKind.LEASE_LOST, fence=self.record.fence)
            self._flight.end(None)

    async def confirm(self) -> None:
        """Renew at the store, and raise if the claim is not ours any more."""
        self.check_process()
        asked_at = asyncio.get_running_loop().time()
        record = await self.settle(self.request_renewal, effect=RUNNING)
        self._held_off.deliver()
        if record is None:
            self.lost()
            reason = "another call owns it, or it was released by hand"
            raise IdempotencyLeaseLostError(key=self.record.idempotency_key, record=None, reason=reason)
        self.renewed(record, asked_at=asked_at)

    # --- Ended ------------------------------------------------------------------------------------------------------

    def stop_renewal(self) -> None:
        """Renew no more, as the body has ended; a request already under way settles by itself."""
        if self._renewals is not None:
            self._renewals.forget(self._renewal)
            self._renewals = None
        if self._renewal_task is not None:
            self._renewal_task.cancel()
            self._renewal_task = None

    async def complete(self, text: str, outcome: OutcomeKind | None) -> DataRecord | None:
        """Store the outcome, trying again while the lease is held; return the record, None if it is not ours any more.

        Raises:
            IdempotencyPersistenceLayerError: It could not be stored.
        """
        attempt = 0
        while True:
            try:
                return await self._complete_once(text, outcome)
            except IdempotencySerializationError as error:
                if outcome is OutcomeKind.UNAVAILABLE:
                    raise layer_failure(error, self.record.idempotency_key, EFFECT_HAPPENED) from error
                logger.error("the result of %s cannot be stored: %s", self._plan.function, error)  # noqa: TRY400 - no trace: it may show the result
                text, outcome = UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE
            except Exception as error:  # noqa: BLE001 - a foreign layer may raise anything
                failure = layer_failure(error, self.record.idempotency_key, EFFECT_HAPPENED)
                self._reporter.report(EventKind.PERSISTENCE_ERROR, fence=self.record.fence, error=failure)
                await self._pause_or_raise(failure, attempt)
                attempt += 1

    async def _complete_once(self, text: str, outcome: OutcomeKind | None) -> DataRecord | None:
        plan, now = self._plan, self._plan.clock()
        record = _state.completed(
            self.record,
            response_data=text,
            outcome=outcome,
            expires_after_seconds=plan.config.expires_after_seconds,
            now=now,
        )
        return record if await self._held_off.settle(plan.layer.complete(record, now=now)) else None

    async def _pause_or_raise(self, failure: IdempotencyPersistenceLayerError, attempt: int) -> None:
        now = asyncio.get_running_loop().time()
        if self.lease_deadline is None:
            self.lease_deadline = now + RETRIES_WITHOUT_LEASE_SECONDS
        deadline = min(self.lease_deadline, self._held_off.deadline or self.lease_deadline)
        delay = backoff_seconds(attempt)
        if isinstance(failure, IdempotencyPersistenceConfigError) or now + delay > deadline:
            raise failure
        logger.warning("%s: %s; trying again", self._plan.function, failure)
        await self._held_off.settle(asyncio.sleep(delay))

    async def give_back(self, error: BaseException) -> DataRecord | None:
        """Undo the claim after its body raised, or store the exception if it is an outcome; return what was stored."""
        if isinstance(error, asyncio.CancelledError):
            self._held_off.bound()
        if isinstance(error, Exception) and type(error) in self._plan.config.stored_exceptions:
            return await self.complete(*self._outcome_of(error))
        await self._held_off.settle(self._undo(is_failure=isinstance(error, Exception)))
        self._reporter.report(EventKind.RELEASED, fence=self.record.fence)
        return None

    def give_back_in_background(self) -> None:
        """Undo the claim of a body that is being closed, without waiting."""
        in_background(lambda: self._undo(is_failure=False))

    def _undo(self, *, is_failure: bool) -> Awaitable[object]:
        layer = self._plan.layer
        if is_failure or self._lease.may_be_taken_over:
            return layer.release(self.record)
        # At most once: nobody knows how far the body came, so the key is in doubt, and at once.
        now = self._plan.clock()
        return layer.renew(_state.abandoned(self.record, now=now), now=now)

    def _outcome_of(self, error: Exception) -> tuple[str, OutcomeKind]:
        try:
            return exception_text(error), OutcomeKind.EXCEPTION
        except IdempotencySerializationError as exc:
            logger.error("an exception of %s cannot be stored: %s", self._plan.function, exc)  # noqa: TRY400 - as above
            return UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE

    def release_in_background(self) -> None:
        """Release the claim without waiting, for those who cannot wait."""
        in_background(lambda: self._plan.layer.release(self.record))

    async def settle(self, ask: Callable[[], Awaitable[DataRecord | None]], *, effect: str) -> DataRecord | None:
        """Ask the layer, and say in an error whether the function has run."""
        try:
            return await self._held_off.settle(ask())
        except Exception as error:
            raise layer_failure(error, self.record.idempotency_key, effect) from error


def backoff_seconds(attempt: int) -> float:
    """Return how long to wait before the next attempt: at most 20 in the first 5 s, then at most one a second."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * DELAY_GROWTH ** min(attempt, 20))
    return delay * random.uniform(1.0, 1.25)  # noqa: S311 - jitter, not a secret


def layer_failure(error: Exception, key: str, effect: str) -> IdempotencyPersistenceLayerError:
    """Return the error of a layer as one of ours that says whether the function has run."""
    kind = type(error) if isinstance(error, IdempotencyPersistenceLayerError) else IdempotencyPersistenceLayerError
    return kind(f"{str(error) or type(error).__name__}; {effect}", key=key)
