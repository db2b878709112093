"""Waiting: for another call of this loop, for another process, and for the winner of a claim that was lost."""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING, Final

from aidem._engine.claim import ask
from aidem._engine.failures import LOST
from aidem._rules import lifecycle
from aidem._rules.lifecycle import NextStep
from aidem._runtime.cancellation import CancellationShield
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceLayerError,
    IdempotencyValidationError,
)

if TYPE_CHECKING:
    from aidem._engine.plan import CallKey, Plan
    from aidem._engine.shared import SingleFlight
    from aidem._rules.record import DataRecord

logger = logging.getLogger("aidem")

SHORTEST_PAUSE_SECONDS: Final = 0.01
FIRST_DELAY_SECONDS: Final = 0.05
DELAY_GROWTH: Final = 1.4
LONGEST_DELAY_SECONDS: Final = 1.0
PASSED_SECONDS: Final = 0.002
"""How long after the end of a lease it has surely passed: it counts in whole milliseconds, which are rounded."""


class WaitBudget:
    """The time that one call may wait for others.

    Attributes:
        has_waited: Whether it has waited.
    """

    __slots__ = ("_deadline", "_key", "_plan", "has_waited")

    def __init__(self, plan: Plan, key: CallKey) -> None:
        self._plan = plan
        self._key = key
        self._deadline: float | None = None
        self.has_waited = False

    def remaining_seconds(self) -> float:
        """Return how long it may still wait; the time counts from the first time that this is asked."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._plan.config.wait_timeout_seconds
        return self._deadline - now

    async def follow(self, leader: SingleFlight, flight: SingleFlight) -> DataRecord | None:
        """Wait in line while another call of this loop is at the store.

        Returns:
            The outcome that it found, a live record of another payload, or a claim in doubt; None: it is our turn to
            ask the store, or the time is over.

        Raises:
            IdempotencyValidationError: The other call has another payload.
            IdempotencyAlreadyInProgressError: It did not end in time.
            IdempotencyInDoubtError: It asked a check, which has not found out.
            IdempotencyPersistenceLayerError: It could not ask the store.
        """
        differing = leader.differing_record(self._key.payload_hash, now=asyncio.get_running_loop().time())
        if differing is not None:
            raise IdempotencyValidationError(record=differing)
        remaining = self.remaining_seconds()
        if remaining <= 0:
            raise self.in_progress(leader.record, now=self._plan.clock())
        self.has_waited = True
        ending = await flight.wait_behind(leader, timeout_seconds=remaining)
        if isinstance(ending, IdempotencyError):
            own = type(ending)(str(ending))  # each of many callers may add notes to its own
            vars(own).update({name: value for name, value in vars(ending).items() if name != "__notes__"})
            raise own from ending.__cause__
        return ending

    async def pause(self, record: DataRecord | None, *, polls: int, now: float) -> None:
        """Wait before the store is asked again.

        Args:
            record: The record that blocks the call; None: not known.
            polls: How often the store was asked before.
            now: Epoch seconds by the clock that judged the record.

        Raises:
            IdempotencyAlreadyInProgressError: The time is over.
        """
        remaining = self.remaining_seconds()
        if remaining <= 0:
            raise self.in_progress(record, now=now)
        self.has_waited = True
        growth = DELAY_GROWTH ** min(polls, 20)
        # At most 20 looks in the first 5 s, then at most one a second.
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * growth)
        seconds = min(delay * random.uniform(1.0, 1.25), remaining)  # noqa: S311 - jitter, not a secret
        end = None if record is None else lifecycle.lease_end(record)
        if end is not None and (lapses_in := end / 1000 - now + PASSED_SECONDS) > 0:
            seconds = min(seconds, lapses_in)
        await self._until_change(seconds, shortest=min(seconds, SHORTEST_PAUSE_SECONDS * growth))

    async def _until_change(self, seconds: float, *, shortest: float) -> None:
        """Wait until the layer tells of a change; sleep if it cannot tell, or returns too soon."""
        layer = self._plan.waits_for_change
        if layer is None:
            await asyncio.sleep(seconds)
            return
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        try:
            await layer.wait_for_change(self._key.text, seconds)
        except Exception as error:  # noqa: BLE001 - polling works without it
            logger.debug("wait_for_change failed: %s", type(error).__name__)
            shortest = seconds
        await asyncio.sleep(max(0.0, shortest - (loop.time() - started_at)))

    def in_progress(self, record: DataRecord | None, *, now: float) -> IdempotencyAlreadyInProgressError:
        """Return the error for a call whose time is over."""
        end = None if record is None else lifecycle.lease_end(record)
        # It may end at any moment, so even a long lease is worth a look after a second.
        wait = LONGEST_DELAY_SECONDS if end is None else min(LONGEST_DELAY_SECONDS, max(0.0, end / 1000 - now))
        return IdempotencyAlreadyInProgressError(key=self._key.text, record=record, retry_after_seconds=wait)


async def winner(plan: Plan, key: CallKey) -> DataRecord:
    """Return the outcome of the call that took our claim over, and wait for it as any caller does.

    Raises:
        IdempotencyLeaseLostError: There is none.
        IdempotencyPersistenceLayerError: The layer failed to answer.
    """
    budget, polls = WaitBudget(plan, key), 0
    while True:
        record = await _look(plan, key, budget)
        now = plan.clock()
        if record is None or lifecycle.is_expired(record, now=now):
            raise IdempotencyLeaseLostError(key=key.text, record=None, reason="it was taken over and released")
        step = lifecycle.next_step(record, payload_hash=key.payload_hash, now=now)
        if step is NextStep.REPLAY:
            return record
        try:
            if step is not NextStep.WAIT:
                raise budget.in_progress(record, now=now)
            await budget.pause(record, polls=polls, now=now)
        except IdempotencyAlreadyInProgressError as running:
            reason = "another call took it over and has no outcome for this payload yet"
            raise IdempotencyLeaseLostError(key=key.text, record=record, reason=reason) from running
        polls += 1


async def _look(plan: Plan, key: CallKey, budget: WaitBudget) -> DataRecord | None:
    """Return the record as stored; while the store fails to answer, ask again within the time of the call."""
    polls = 0
    while True:
        try:
            with CancellationShield() as shield:
                return await ask(partial(plan.layer.get, key.text), shield=shield, key=key.text, effect=LOST)
        except IdempotencyPersistenceConfigError:
            raise
        except IdempotencyPersistenceLayerError:
            if budget.remaining_seconds() <= 0:
                raise
            await budget.pause(None, polls=polls, now=plan.clock())
            polls += 1
