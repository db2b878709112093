"""An event loop of virtual time that is stepped from outside, one iteration at a time."""

from __future__ import annotations

import asyncio
import heapq
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections import deque


class HasNow(Protocol):
    """Whatever knows the virtual time."""

    now: float


class _NoSelector:
    def select(self, _timeout: float | None = None) -> list[Any]:
        return []

    def close(self) -> None: ...


class SimLoop(asyncio.BaseEventLoop):
    """The loop of one process; its clock has an offset, as monotonic clocks of processes have."""

    if TYPE_CHECKING:
        _ready: deque[asyncio.Handle]
        _scheduled: list[Any]
        _timer_cancelled_count: int

        def _run_once(self) -> None: ...
        def _asyncgen_firstiter_hook(self, agen: Any) -> None: ...
        def _asyncgen_finalizer_hook(self, agen: Any) -> None: ...

    def __init__(self, clock: HasNow, *, offset: float) -> None:
        super().__init__()
        self.clock = clock
        self.offset = offset
        self._selector = _NoSelector()
        self._clock_resolution = 0.0  # a timer that fired early would fire again and again: time stands still meanwhile

    def time(self) -> float:
        return self.clock.now + self.offset

    def _process_events(self, _event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def is_due(self) -> bool:
        """Whether it has something to do at this instant."""
        if self._ready:
            return True
        scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
            self._timer_cancelled_count -= 1
        return bool(scheduled) and scheduled[0]._when < self.time() + self._clock_resolution

    def next_at(self) -> float | None:
        """Return when it is due, in virtual time; None: never. Call `is_due` first."""
        return self._scheduled[0]._when - self.offset if self._scheduled else None

    def step(self) -> None:
        """Run one iteration, as `run_forever` does."""
        hooks = sys.get_asyncgen_hooks()
        self._thread_id: int | None = threading.get_ident()
        sys.set_asyncgen_hooks(firstiter=self._asyncgen_firstiter_hook, finalizer=self._asyncgen_finalizer_hook)
        asyncio._set_running_loop(self)
        try:
            self._run_once()
        finally:
            self._thread_id = None
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def dispose(self) -> None:
        """Close it with all that it had to do, and keep nothing of the world but its time."""
        self.set_exception_handler(None)
        if not self.is_closed():
            self._ready.clear()
            self._scheduled.clear()
            self.close()
        self.clock = _Ended(self.clock.now)


class _Ended:
    def __init__(self, now: float) -> None:
        self.now = now
