"""Waiting: for another call of this loop, for another process, and for the winner of a claim that was lost."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from aidem import _state
from aidem._cancellation import HeldOff
from aidem._operations import DELAY_GROWTH, EFFECT_HAPPENED, LONGEST_DELAY_SECONDS, ask, backoff_seconds
from aidem._state import Step
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceLayerError,
    IdempotencyValidationError,
)

if TYPE_CHECKING:
    from aidem._flights import Flight
    from aidem._plan import Key, Plan
    from aidem._record import DataRecord

logger = logging.getLogger("aidem")

SHORTEST_PAUSE_SECONDS: Final = 0.01


class Patience:
    """How long one call waits.

    Attributes:
        has_waited: Whether it had to.
    """

    __slots__ = ("_deadline", "_key", "_plan", "has_waited")

    def __init__(self, plan: Plan, key: Key) -> None:
        self._plan = plan
        self._key = key
        self._deadline: float | None = None
        self.has_waited = False

    def remaining_seconds(self) -> float:
        """Return how long it may wait yet; the time counts from the first question."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._plan.config.wait_timeout_seconds
        return self._deadline - now

    async def follow(self, flight: Flight) -> DataRecord | None:
        """Wait while another call of this loop is at the store; return the outcome it found, None if it has none.

        Raises:
            IdempotencyValidationError: The other call has another payload.
            IdempotencyAlreadyInProgressError: It did not end in time.
            IdempotencyPersistenceLayerError: It could not ask the store.
        """
        loop = asyncio.get_running_loop()
        while not flight.is_over:
            if flight.record is not None and _state.differs(flight.record, self._key.payload_hash):
                raise IdempotencyValidationError(record=flight.record)
            remaining = self.remaining_seconds()
            if remaining <= 0:
                raise self.in_progress(flight.record, now=self._plan.clock())
            if flight.lease_deadline is not None:
                if loop.time() >= flight.lease_deadline:
                    return None  # its claim may be taken over by now
                remaining = min(remaining, flight.lease_deadline - loop.time())
            self.has_waited = True
            await flight.change(timeout_seconds=remaining)
        if isinstance(flight.ending, IdempotencyPersistenceLayerError):
            failure = flight.ending
            raise type(failure)(str(failure), key=failure.key) from failure
        return flight.ending

    async def pause(self, record: DataRecord, *, polls: int, now: float) -> None:
        """Wait until it is worth asking the store again.

        Args:
            record: What blocks the call.
            polls: How often the store was asked in vain.
            now: Epoch seconds by the clock that judged the record.

        Raises:
            IdempotencyAlreadyInProgressError: The time is over.
        """
        remaining = self.remaining_seconds()
        if remaining <= 0:
            raise self.in_progress(record, now=now)
        self.has_waited = True
        seconds = min(backoff_seconds(polls), remaining)
        end = _state.lease_end(record)
        if end is not None and end / 1000 > now:
            seconds = min(seconds, end / 1000 - now + 0.001)
        shortest = SHORTEST_PAUSE_SECONDS * DELAY_GROWTH ** min(polls, 20)
        await self._until_change(seconds, shortest=min(seconds, shortest))

    async def _until_change(self, seconds: float, *, shortest: float) -> None:
        """Wait for the layer to tell of a change, if it does; sleep where it cannot, or comes back too soon."""
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
        """Return the error for a call that waits no longer."""
        end = None if record is None else _state.lease_end(record)
        # It may end at any moment, so even a long lease is worth a look after a second.
        wait = LONGEST_DELAY_SECONDS if end is None else min(LONGEST_DELAY_SECONDS, max(0.0, end / 1000 - now))
        return IdempotencyAlreadyInProgressError(key=self._key.text, record=record, retry_after_seconds=wait)


async def winner(plan: Plan, key: Key) -> DataRecord:
    """Return the outcome of whoever took our claim over, waiting for it as a waiter does.

    Raises:
        IdempotencyLeaseLostError: There is none.
        IdempotencyPersistenceLayerError: The layer failed to answer.
    """
    patience, polls = Patience(plan, key), 0
    while True:
        with HeldOff() as held_off:
            find = partial(plan.layer.get, key.text)
            record = await ask(find, held_off=held_off, key=key.text, effect=EFFECT_HAPPENED)
        now = plan.clock()
        if record is None or _state.is_expired(record, now=now):
            raise IdempotencyLeaseLostError(key=key.text, record=None, reason="it was taken over and given back")
        step = _state.next_step(record, payload_hash=key.payload_hash, now=now)
        if step is Step.REPLAY:
            return record
        try:
            if step is not Step.WAIT:
                raise patience.in_progress(record, now=now)
            await patience.pause(record, polls=polls, now=now)
        except IdempotencyAlreadyInProgressError as running:
            reason = "another call took it over and has no outcome for this payload yet"
            raise IdempotencyLeaseLostError(key=key.text, record=record, reason=reason) from running
        polls += 1
