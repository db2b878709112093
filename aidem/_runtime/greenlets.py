"""What the background loop and its thread are made of where gevent has patched the standard library."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from gevent import get_hub, getcurrent
from gevent.event import Event
from gevent.monkey import get_original
from gevent.selectors import GeventSelector

from aidem._runtime.threads import Lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


class OSThread:
    """A real thread, which gevent gives a hub of its own as soon as something in it waits."""

    def __init__(self, target: Callable[[], object]) -> None:
        self._target = target
        self._alive = Lock()

    def start(self) -> None:
        """Start it."""
        self._alive.acquire()
        trace = threading.gettrace()  # what `threading` has its own threads traced by, such as a debugger
        get_original("_thread", "start_new_thread")(lambda: (sys.settrace(trace), self._run()), ())  # type: ignore[func-returns-value]

    def is_alive(self) -> bool:
        """Whether it has started and has not ended."""
        return bool(self._alive.locked())

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        if self._alive.acquire(timeout=-1 if timeout is None else timeout):
            self._alive.release()

    def _run(self) -> None:
        try:
            self._target()
        finally:
            get_hub().destroy(destroy_loop=True)
            self._alive.release()


class GeventLoop(asyncio.SelectorEventLoop):
    """An event loop that lets the greenlets of its thread run while it waits: gevent's sockets and locks need that."""

    def __init__(self) -> None:
        super().__init__(_Selector())

    def run_in_executor(  # type: ignore[override] # one overload less
        self,
        executor: Executor | None,  # noqa: ARG002 - the signature of asyncio
        func: Callable[..., Any],
        *args: Any,
    ) -> asyncio.Future[Any]:
        """Call something in a real thread; those of an executor would be greenlets of this one."""
        future: asyncio.Future[Any] = self.create_future()

        def work() -> None:
            answer = error = None
            try:
                answer = func(*args)
            except Exception as exc:  # noqa: BLE001 - it is raised where the future is awaited
                error = exc
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
                self.call_soon_threadsafe(_settle, future, answer, error)

        OSThread(work).start()
        return future

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        """Look up a host as the standard library does: gevent's way takes more threads, which outlive this one."""
        lookup = partial(get_original("socket", "getaddrinfo"), *args, **options)
        return await self.run_in_executor(None, lookup)


class _Selector(GeventSelector):
    """A selector of the thread that selects; the one in which the loop is made has another hub."""

    def __init__(self) -> None:
        super().__init__()
        self._early: list[tuple[Any, ...]] | None = []

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        if self._early is not None:
            return self._early.append((fileobj, events, data))
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> Any:
        early, self._early = self._early, None
        for registration in early or ():
            super().register(*registration)
        return super().select(timeout)


def _settle(future: asyncio.Future[Any], answer: Any, error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(answer)
    else:
        future.set_exception(error)


class GreenletLock:
    """A lock that is held until another thread releases it; the greenlet that made it waits for it."""

    def __init__(self) -> None:
        self._released = Event()
        self._wakeup = get_hub().loop.async_()  # as long as it is started, the hub knows that something may come
        self._wakeup.start(self._wake)

    def acquire(self, *, timeout: float | None = None) -> None:
        """Wait until it is released."""
        self._released.wait(timeout)

    def release(self) -> None:
        """Release it."""
        self._wakeup.send()

    def _wake(self) -> None:
        self._wakeup.stop()
        self._wakeup.close()
        self._released.set()


def is_hub_running() -> bool:
    """Whether the hub itself runs this, in a callback: it must not wait for anything."""
    return getcurrent() is get_hub()
