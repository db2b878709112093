"""Lease renewal: a claim is renewed at a third of its lease, while its body runs and not a moment longer.

A short call pays for an entry in a dict: one timer serves all claims of an event loop, and only a body that lasts long
enough gets a task that renews. Nothing renews a claim whose body is not running: that task holds the claim weakly, and
ends when the call is over or gone, its task or thread is dead, or the process is a fork of the one that made it.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from contextvars import Context
from typing import TYPE_CHECKING

from aidem._runtime.cancellation import CancellationShield

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._engine.claim import Claim


class Renewal:
    """Renews one claim."""

    __slots__ = ("_claim", "_has_body_ended", "_is_stopped", "_task")

    def __init__(self, claim: Claim, *, has_body_ended: Callable[[], bool]) -> None:
        self._claim = weakref.ref(claim)
        self._has_body_ended = has_body_ended
        self._is_stopped = False
        self._task = asyncio.get_running_loop().create_task(self._renew_repeatedly())

    def stop(self) -> None:
        """Renew no more; a renewal under way settles by itself."""
        self._is_stopped = True
        if not self._task.get_loop().is_closed():
            self._task.cancel()

    def _find(self) -> Claim | None:
        """Return the claim if it is held and its body runs in this process."""
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
        """Let the claim begin its renewal then, in seconds of the loop's clock, and in the context of its own call."""
        self._due[claim] = at, context
        if at < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at = at
            # In an empty context: it serves all claims, and must not keep alive what the first caller has in its own.
            self._timer = asyncio.get_running_loop().call_at(at, self._wake, context=Context())

    def unwatch(self, claim: Claim) -> None:
        """Do not let it."""
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
