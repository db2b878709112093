"""A process: an event loop with a persistence layer of its own; it can be paused, crash and be cut off."""

from __future__ import annotations

import random
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.simulation.conditions import EAGER_TASKS
from tests.simulation.loop import SimLoop
from tests.simulation.network import Client, Listener
from tests.simulation.rules import Rule
from tests.simulation.store import EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.world import World


class Process:
    """Its flights, renewals and local cache are its own, since its layer is."""

    def __init__(self, world: World, number: int) -> None:
        conditions = world.conditions
        self.world = world
        self.number = number
        self.rng = random.Random(world.rng.random())
        self.loop = SimLoop(world, offset=self.rng.uniform(0, 1000))
        self.loop.set_exception_handler(self._loop_failed)
        if conditions.eager:
            self.loop.set_task_factory(EAGER_TASKS)
        self.clock_offset = world.rng.uniform(-1, 1) * conditions.skew
        self.is_dead = False
        self.is_disposed = False
        self.frozen_until = 0.0
        self.frozen_total = 0.0
        self.cut_off_until = 0.0
        self.last_fault = ""
        self._inbox: list[Callable[[], None]] = []
        self._faults: list[tuple[float, float]] = []
        self.use_cache = world.rng.random() < 0.4
        self.layer = (Listener if world.rng.random() < 0.3 else Client)(self)

    def epoch(self) -> float:
        """Return epoch seconds by its own clock."""
        return EPOCH + self.world.now + self.clock_offset

    def own_seconds(self) -> float:
        """Return the seconds that it has not been frozen."""
        frozen = self.frozen_total - max(0.0, self.frozen_until - self.world.now)
        return self.world.now - frozen

    # --- Pauses and crashes -------------------------------------------------------------------------------------------

    def is_frozen(self) -> bool:
        return self.world.now < self.frozen_until

    def is_runnable(self) -> bool:
        return not (self.is_dead or self.is_frozen())

    def freeze(self, seconds: float, *, is_suspended: bool = False) -> None:
        """Step it no more for a while: SIGSTOP, a body that blocks the loop, or a machine that is suspended.

        The clock of the loop stands still while the machine is suspended.
        """
        if not self.is_runnable():
            return
        world = self.world
        self.frozen_until = world.now + seconds
        self.frozen_total += seconds
        self.note_fault(world.now, self.frozen_until)
        world.happened["suspension" if is_suspended else "pause"] += 1
        world.tell(f"p{self.number} is {'suspended' if is_suspended else 'paused'} for {seconds:.3f}")
        world.at(self.frozen_until, partial(self._thaw, stood_still_seconds=seconds if is_suspended else 0.0))

    def _thaw(self, *, stood_still_seconds: float) -> None:
        """See the replies that came meanwhile before the timers, or after one iteration with the timers alone."""
        self.loop.offset -= stood_still_seconds
        inbox, self._inbox = self._inbox, []
        if inbox and self.rng.random() < 0.3 and not self.is_dead:
            self.loop.step()
        for deliver in inbox:
            self.loop.call_soon(deliver)

    def crash(self) -> None:
        """Step it never again."""
        if self.is_dead:
            return
        self.is_dead = True
        self.world.tell(f"p{self.number} crashes")
        self.world.happened["crash"] += 1
        for call in self.world.calls:
            if call.process is self and call.ended_at is None:
                call.is_crashed = True

    def cut_off(self, seconds: float) -> None:
        """Let nothing through to the store or back for a while."""
        world, timeout = self.world, self.world.conditions.client_timeout
        if world.is_calm:
            return
        world.happened["partition"] += 1
        world.tell(f"p{self.number} is cut off for {seconds:.3f}")
        self.cut_off_until = max(self.cut_off_until, world.now + seconds)
        self.note_fault(world.now - timeout, world.now + seconds + timeout)

    def is_cut_off(self) -> bool:
        return self.world.now < self.cut_off_until

    def post(self, deliver: Callable[[], None]) -> None:
        """Hand a reply to its loop, as soon as it runs."""
        if self.is_dead:
            return
        if self.is_frozen():
            self._inbox.append(deliver)
        else:
            self.loop.call_soon(deliver)

    # --- What went wrong ----------------------------------------------------------------------------------------------

    def note_fault(self, since: float, until: float) -> None:
        """Excuse what happens in that span."""
        if self._faults and self._faults[-1][1] >= since:
            since = min(since, self._faults[-1][0])
            until = max(until, self._faults.pop()[1])
        self._faults.append((since, until))

    def was_faulty(self, since: float, until: float) -> bool:
        """Whether anything went wrong between it and the store."""
        return any(a <= until and b >= since for a, b in reversed(self._faults)) or self.world.was_down(since, until)

    def _loop_failed(self, _loop: Any, context: dict[str, Any]) -> None:
        if self.is_dead or self.is_disposed:
            return
        error = context.get("exception")
        shown = "".join(traceback.format_exception(error)) if error else ""
        self.world.violate(Rule.H7, f"the loop was told: {context.get('message')} {shown}")
