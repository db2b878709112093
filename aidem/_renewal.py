"""Lease renewal: a claim is renewed at a third of its lease, while its body runs and not a moment longer.

A short call pays for a timer, not for a task. Nothing renews a claim whose body is not running: the keeper holds its
call weakly, and stops when the call is over or gone, its task or thread is dead, or the process is a fork of the one
that made the claim.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import TYPE_CHECKING, Final, Protocol

from aidem._cancellation import HeldOff

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aidem._record import DataRecord

logger = logging.getLogger("aidem")

RENEWALS_PER_LEASE: Final = 3


class Renewable(Protocol):
    """The side of a call that its keeper sees."""

    def is_running(self) -> bool:
        """Whether the claim is held and its body still runs in this process."""
        ...

    def request_renewal(self) -> Awaitable[DataRecord | None]:
        """Ask the persistence layer to renew the claim."""
        ...

    def renewed(self, record: DataRecord, *, asked_at: float) -> None:
        """Take note that the lease counts from `asked_at`, in seconds of the loop's clock."""
        ...

    def lost(self) -> None:
        """Take note that the claim is not ours any more."""
        ...

    def renewal_failed(self, error: Exception) -> None:
        """Take note that the persistence layer failed to answer."""
        ...


class LeaseKeeper:
    """Renews the claim of one call."""

    __slots__ = ("_call", "_interval_seconds", "_loop", "_task", "_timer")

    def __init__(self, call: Renewable, *, lease_seconds: float) -> None:
        self._call = weakref.ref(call)
        self._interval_seconds = lease_seconds / RENEWALS_PER_LEASE
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(self._interval_seconds, self._wake)

    def stop(self) -> None:
        """Renew no more; a request already under way settles by itself."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _wake(self) -> None:
        self._task = self._loop.create_task(self._keep())

    async def _keep(self) -> None:
        delay: float | None = 0.0
        while delay is not None:
            await asyncio.sleep(delay)
            delay = await self._renew()

    async def _renew(self) -> float | None:
        """Renew once; return how long to wait before the next time, None if there is none."""
        call = self._call()
        if call is None or not call.is_running():
            return None
        held_off = HeldOff()
        asked_at = self._loop.time()
        try:
            record = await held_off.settle(call.request_renewal())
        except Exception as error:  # noqa: BLE001 - whatever it is: the next try may work, and the lease may yet hold
            call.renewal_failed(error)
            held_off.deliver()
            return self._interval_seconds / RENEWALS_PER_LEASE
        held_off.deliver()
        if not call.is_running():
            return None
        if record is None:
            call.lost()
            return None
        call.renewed(record, asked_at=asked_at)
        return self._interval_seconds - (self._loop.time() - asked_at)
