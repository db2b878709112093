"""A claim at the store: proposed and asked for, renewed and released; and how long it holds by our own clock."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aidem._engine.operations import FAILED, NOTHING_RUN, ask, ask_persistently, persist, started
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._runtime.cancellation import CancellationShield, Immediate, in_background
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._engine.plan import CallKey, Plan
    from aidem._engine.shared import PerLoop
    from aidem._engine.single_flight import SingleFlight
    from aidem._rules.record import DataRecord
    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")

T = TypeVar("T")

GIVING_BACK_SECONDS: Final = 1.0
"""How long a failed call tries to give its key back before its caller gets the exception."""


_SINCE_BOOT: Final = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
"""A clock that goes on while the machine is suspended: on Linux CLOCK_BOOTTIME, on macOS CLOCK_MONOTONIC."""


def seconds_since_boot() -> float:
    """Return seconds that count time in suspension, too; event loops use a clock that may not."""
    return time.monotonic() if _SINCE_BOOT is None else time.clock_gettime(_SINCE_BOOT)  # on Windows, monotonic does


class _Process:
    """Stands for this process: a fork gets another one."""


_process = _Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - asking for the pid would be a system call or two for every call
    _process = _Process()


getattr(os, "register_at_fork", dict)(after_in_child=_forked)  # where there is no fork, nothing is to be done


class ClaimedRecord:
    """The record of one claim, with a token of its own.

    Attributes:
        record: The claim as proposed, then as stored.
        lease_deadline: When it lapses, in seconds of the loop's clock, which may stand still while the machine is
            suspended; None: not before it expires.
    """

    __slots__ = (
        "_asked_at",
        "_flight",
        "_lapses_after_boot",
        "_lease",
        "_loop_state",
        "_plan",
        "_process",
        "_renews",
        "_reporter",
        "lease_deadline",
        "record",
    )

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
            key.text, owner=os.urandom(16).hex(), payload_hash=key.payload_hash, lease=self._lease, now=plan.clock()
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
        if not self.is_of_this_process():
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

    # --- Asked for --------------------------------------------------------------------------------------------------

    async def acquire(self) -> Claimed | Blocked | None:
        """Ask for the key; whatever interrupts it leaves no claim behind, as far as the layer answers.

        Returns:
            The answer; None: the claim was lost again before the answer came.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        shield = CancellationShield()
        try:
            operation = started(self._acquisition)
            if isinstance(operation, Immediate):
                answer: Claimed | Blocked = operation.answer
                if self._holds(answer):
                    return answer
            with shield:
                return await self._acquired(operation, shield)
        except (IdempotencyError, asyncio.CancelledError):  # raised when the key was given back
            raise
        except BaseException:  # a signal handler raised, or the coroutine is closed: nothing may be awaited any more
            in_background(partial(self._release_unless_refused, shield.operation), after=shield.operation)
            raise

    async def _acquired(
        self, operation: Awaitable[Claimed | Blocked], shield: CancellationShield
    ) -> Claimed | Blocked | None:
        try:
            answer = await ask(lambda: operation, shield=shield, key=self._key, effect=NOTHING_RUN)
            holds = self._holds(answer)
            if shield.is_pending and isinstance(answer, Claimed):
                await self._release_unused(shield)
            elif not holds and not await self._renew_late(shield):
                return None
        except IdempotencyError as failure:
            if _may_be_claimed(failure):
                await self._release_unused(shield)
            raise
        return answer

    def _holds(self, answer: Claimed | Blocked) -> bool:
        """Take note of the answer; False: it came after the lease that it gives."""
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
        if failure is None or _may_be_claimed(failure):
            await self._persist(self._release, effect=NOTHING_RUN)

    async def _release_unused(self, shield: CancellationShield) -> None:
        """Release a claim that nothing ran under, or that is not even there; the caller waits for its error."""
        is_urgent = not shield.is_pending
        if is_urgent:
            shield.bound(GIVING_BACK_SECONDS)
        try:
            if is_urgent and self._lease.may_be_taken_over:
                await ask(self._release, shield=shield, key=self._key, effect=NOTHING_RUN)
            else:  # or it would be in doubt though nothing ran
                await self._ask_persistently(self._release, shield=shield, effect=NOTHING_RUN)
        except IdempotencyError as failure:
            function = self._plan.function
            logger.warning("a claim of %s could not be released, it lapses with its lease: %s", function, failure)

    # --- What is asked of the layer ---------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return self.record.idempotency_key

    def _ask_persistently(
        self, start: Callable[[], Awaitable[T]], *, shield: CancellationShield, effect: str
    ) -> Awaitable[T]:
        return ask_persistently(start, shield=shield, key=self._key, effect=effect, reporter=self._reporter)

    def _persist(self, start: Callable[[], Awaitable[T]], *, effect: str) -> Awaitable[T]:
        return persist(start, key=self._key, effect=effect, reporter=self._reporter)

    def _acquisition(self) -> Awaitable[Claimed | Blocked]:
        plan = self._plan
        skew = plan.config.max_clock_skew_seconds
        return plan.layer.acquire(self.record, now=plan.clock(), max_clock_skew_seconds=skew)

    def _renewed_record(self) -> Awaitable[DataRecord | None]:
        now = self._plan.clock()
        return self._plan.layer.renew(lifecycle.renewal(self.record, lease=self._lease, now=now), now=now)

    def _abandon(self) -> Awaitable[DataRecord | None]:
        return self._plan.layer.renew(lifecycle.abandoned(self.record), now=self._plan.clock())

    async def _released(self, shield: CancellationShield) -> bool:
        """Release it; False: it is not ours any more."""
        tries = 0

        def release() -> Awaitable[bool]:
            nonlocal tries
            tries += 1
            return self._release()

        is_ours = await self._ask_persistently(release, shield=shield, effect=FAILED)
        # After a failed try, a claim that is gone within its lease is one that this try has released.
        return is_ours or (tries > 1 and not self.has_lapsed())

    def _release(self) -> Awaitable[bool]:
        return self._plan.layer.release(self.record)


def _may_be_claimed(failure: BaseException) -> bool:
    """Whether an acquisition that failed may have been applied, and only its reply was lost."""
    return not isinstance(failure, IdempotencyPersistenceLayerError) or failure.may_be_applied
