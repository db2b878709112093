"""Lease renewal: a claim is renewed at a third of its lease, while its body runs and not a moment longer.

A short call pays for an entry in a dict: one timer serves all claims of an event loop, and only a body that lasts long
enough gets a task that renews. Nothing renews a claim whose body is not running: claims are held weakly, and renewal
ends when the call is over or gone, its task or thread is dead, or the process is a fork of the one that made it.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Final, Protocol

from aidem._cancellation import HeldOff

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from aidem._record import DataRecord

RENEWALS_PER_LEASE: Final = 3


class Renewable(Protocol):
    """A claim as its renewal sees it."""

    @property
    def renewal_interval_seconds(self) -> float:
        """How long to wait between renewals."""
        ...

    def is_running(self) -> bool:
        """Whether the claim is held, and its body still runs in this process."""
        ...

    def renew_with(self, task: asyncio.Task[None]) -> None:
        """Keep the task that renews the claim, to cancel it when the body has ended."""
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


class Renewals:
    """The claims of one event loop that are held, but not for so long that they need a renewal."""

    __slots__ = ("_due", "_timer")

    def __init__(self) -> None:
        self._due: dict[weakref.ref[Renewable], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, claim: Renewable) -> weakref.ref[Renewable]:
        """Renew the claim when it is time; the answer is what `forget` takes."""
        reference = weakref.ref(claim)
        self._watch(reference, asyncio.get_running_loop().time() + claim.renewal_interval_seconds)
        return reference

    def forget(self, reference: weakref.ref[Renewable]) -> None:
        """Watch the claim no more."""
        self._due.pop(reference, None)

    def _watch(self, reference: weakref.ref[Renewable], due: float) -> None:
        self._due[reference] = due
        if self._timer is not None and due < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(due, self._wake)

    def _wake(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        waiting, self._due = self._due, {}
        for reference, due in waiting.items():
            claim = reference()
            if claim is None:
                continue
            if due > now:
                self._watch(reference, due)
            elif claim.is_running():
                claim.renew_with(loop.create_task(_renew_repeatedly(reference)))


async def _renew_repeatedly(reference: weakref.ref[Renewable]) -> None:
    delay: float | None = 0.0
    while delay is not None:
        await asyncio.sleep(delay)
        delay = await _renew(reference())


async def _renew(claim: Renewable | None) -> float | None:
    """Renew once; return how long to wait before the next time, None if there is none."""
    if claim is None or not claim.is_running():
        return None
    loop, held_off = asyncio.get_running_loop(), HeldOff()
    asked_at = loop.time()
    try:
        record = await held_off.settle(claim.request_renewal())
    except Exception as error:  # noqa: BLE001 - whatever it is: the next try may work, and the lease may yet hold
        claim.renewal_failed(error)
        held_off.deliver()
        return claim.renewal_interval_seconds / RENEWALS_PER_LEASE
    held_off.deliver()
    if not claim.is_running():
        return None
    if record is None:
        claim.lost()
        return None
    claim.renewed(record, asked_at=asked_at)
    return max(0.0, asked_at + claim.renewal_interval_seconds - loop.time())
