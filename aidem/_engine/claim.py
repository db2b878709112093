"""A claim of ours that is held: renewed while the body runs, and then completed, released or left in doubt."""

from __future__ import annotations

import asyncio
import logging
from contextvars import copy_context
from typing import TYPE_CHECKING, Final

from aidem._engine.claimed_record import ClaimedRecord
from aidem._engine.operations import EFFECT_HAPPENED, FAILED, RUNNING, ask
from aidem._engine.renewal import Renewal
from aidem._rules import lifecycle
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, in_background
from aidem.exceptions import (
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._rules.record import DataRecord

logger = logging.getLogger("aidem")

RENEWALS_PER_LEASE: Final = 3
RETRIES_WITHOUT_LEASE_SECONDS: Final = 30.0
SHORTEST_REQUEST_SECONDS: Final = 1.0


class Claim(ClaimedRecord):
    """One claim of one call, made anew for every attempt to acquire the key."""

    # No slots: a claim that is never held, as that of a replay, pays nothing for these.
    _is_lost = False
    _failed_renewals = 0  # in a row
    _renewal: Renewal | None = None
    _has_body_ended: Callable[[], bool]

    # --- Held -------------------------------------------------------------------------------------------------------

    def hold(self, *, taken_over: bool, has_body_ended: Callable[[], bool] | None) -> None:
        """Hold the claim that was acquired, and see to its renewal."""
        self._publish()
        if self._renews:
            if has_body_ended is None:
                task = asyncio.current_task()
                has_body_ended = bool if task is None else task.done
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
        """Renew once, and take note of the answer; False: it is not ours any more, or the body has ended meanwhile."""
        asked = self._asking()
        shield.deadline = asked[0] + max(self._interval(), SHORTEST_REQUEST_SECONDS)
        if self.lease_deadline is not None and not self.has_lapsed():
            shield.deadline = min(shield.deadline, self.lease_deadline)
        try:
            record = await ask(self._renewed_record, shield=shield, key=self._key, effect=RUNNING)
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

    async def confirm(self) -> bool:
        """Renew at the store; False: it is not ours any more.

        Raises:
            IdempotencyPersistenceLayerError: The layer failed, or answers later than the lease lasts.
        """
        self.check_process()
        for _ in range(2):
            asked = self._asking()
            with CancellationShield() as shield:
                record = await ask(self._renewed_record, shield=shield, key=self._key, effect=RUNNING)
            if record is None:
                self.note_loss()
                return False
            self._take(record, asked)
            self._publish()
            if not self.has_lapsed():  # the answer may come after the lease has passed
                return True
        message = f"the persistence layer answers later than the lease lasts; {RUNNING}"
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

    def stop_renewal(self) -> None:
        """Renew no more, as the body has ended."""
        self._loop_state.renewals.forget(self)
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.stop()

    def completion_deadline(self) -> float:
        """Return how long to try to complete it, in seconds of the loop's clock: while the lease is held."""
        now = self._loop_state.time()
        if self.lease_deadline is None:
            return now + RETRIES_WITHOUT_LEASE_SECONDS
        return max(self.lease_deadline, now + CLEANUP_SECONDS)  # once at least, though we come late

    async def complete(
        self, text: str, outcome: OutcomeKind | None, *, shield: CancellationShield
    ) -> DataRecord | None:
        """Store the outcome, trying again while the lease is held; return the record, None if it is not ours any more.

        Raises:
            IdempotencyPersistenceLayerError: It could not be stored.
        """
        plan, now = self._plan, self._plan.clock()
        record = lifecycle.completed(
            self.record,
            response_data=text,
            outcome=outcome,
            expires_after_seconds=plan.config.expires_after_seconds,
            now=now,
        )
        try:
            is_stored = await self._ask_persistently(
                lambda: plan.layer.complete(record, now=now), shield=shield, effect=EFFECT_HAPPENED
            )
        except IdempotencySerializationError as error:
            if outcome is OutcomeKind.UNAVAILABLE:
                message = f"the layer finds even a mark too large; {EFFECT_HAPPENED}"
                raise IdempotencyPersistenceLayerError(message, key=self._key) from error
            logger.error("the result of %s cannot be stored: %s", plan.function, error)  # noqa: TRY400 - no trace: it may show the result
            return await self.complete(UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE, shield=shield)
        return record if is_stored else None

    async def undo(self, *, is_failure: bool, shield: CancellationShield) -> None:
        """Give the key back, or leave it in doubt where the body may have had its effect and must not run again.

        A renewal under way need not be waited for: arriving later, it changes neither.
        """
        if is_failure or self._lease.may_be_taken_over:
            is_ours = await self._released(shield)
            if is_ours:
                self._reporter.report(EventKind.RELEASED, fence=self.record.fence)
        else:
            is_ours = await self._ask_persistently(self._abandon, shield=shield, effect=FAILED) is not None
        if not is_ours:
            self.note_loss()

    def undo_in_background(self) -> None:
        """Undo the claim of a body that is being closed, without waiting."""
        in_background(self._undo_unattended)

    async def _undo_unattended(self) -> None:
        shield = CancellationShield()
        shield.bound(CLEANUP_SECONDS)
        await self.undo(is_failure=False, shield=shield)
