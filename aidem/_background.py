"""The background event loop of the process: runs coroutines for threads that wait for them.

One thread with one loop, started on first use and kept, since a client that a layer opens belongs to its loop. A fork
has none of its parent's threads, so a child starts its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from aidem._cancellation import CLEANUP_SECONDS
from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from collections.abc import Set as AbstractSet

T = TypeVar("T")

INTERRUPTED_SECONDS: Final = CLEANUP_SECONDS + 1.0
"""How long an interrupted thread waits for its step, which bounds its own clean-up a little shorter."""

CLOSED = (
    "aidem.sync was closed while this call waited for the persistence layer; call sync.close() when no other thread is "
    "in an idempotent call"
)


def run(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the background loop, in a copy of the caller's context, and wait for it.

    Whatever interrupts the waiting thread, such as Ctrl-C, cancels the coroutine, and goes on once that has cleaned up.

    Raises:
        IdempotencyUsageError: The loop was closed meanwhile.
    """
    step = Step(start)
    try:
        submit(step)
        step.wait()
    except BaseException:
        step.abandon()
        raise
    return step.answer()


def run_unattended(start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run a coroutine for nobody, if there is a background loop.

    For finalizers, which may run at any point, also while this thread holds the lock: it takes none.
    """
    loop = _process.loop
    if loop is not None:
        Step(start).submit_to(loop)


def submit(step: Step[Any]) -> None:
    """Let the background loop begin a step; start the loop if there is none."""
    with _process.lock:
        if _process.loop is None or not _process.loop.is_alive():
            _process.loop = BackgroundLoop()
            _process.loop.start()
            atexit.register(close)  # before what the layers in use have registered, which they need until then
        step.submit_to(_process.loop)


def close() -> None:
    """End the background loop, after the steps that are under way; the next one starts another."""
    with _process.lock:
        loop, _process.loop = _process.loop, None
        if loop is not None:
            loop.end()  # under the lock: every step was submitted before, or goes to another loop
    if loop is not None:
        atexit.unregister(close)
        loop.join()


class Step(Generic[T]):
    """One coroutine, which runs on the background loop while the thread that asked for it waits."""

    __slots__ = ("_answer", "_context", "_error", "_finished", "_is_over", "_loop", "_start", "_task")

    _answer: T

    def __init__(self, start: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._start = start
        self._context = contextvars.copy_context()
        self._loop: BackgroundLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._finished = threading.Lock()  # waiting for a lock is the cheapest way to be woken by another thread
        self._finished.acquire()

    # --- In the thread that waits -----------------------------------------------------------------------------------

    def submit_to(self, loop: BackgroundLoop) -> None:
        """Let the loop begin the coroutine."""
        self._loop = loop  # first: an interrupt may come between any two lines
        loop.call(self._begin)

    def wait(self) -> None:
        """Wait until it is over."""
        self._finished.acquire()

    def abandon(self) -> None:
        """Cancel it, and wait for its clean-up, bounded; another interrupt does not cut that short."""
        deadline = time.monotonic() + INTERRUPTED_SECONDS
        if self._loop is None or not self._loop.call(self._cancel):
            return
        while not self._is_over and (remaining := deadline - time.monotonic()) > 0:
            with contextlib.suppress(BaseException):
                self._finished.acquire(timeout=remaining)

    def answer(self) -> T:
        """Return what the coroutine returned, or raise what it raised."""
        error, self._error = self._error, None
        if error is None:
            return self._answer
        try:
            if isinstance(error, asyncio.CancelledError):
                raise IdempotencyUsageError(CLOSED) from error
            raise error
        finally:
            del error  # or its traceback would keep this frame in a cycle

    # --- On the loop ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), context=self._context)
        if self._loop is not None:
            self._loop.steps.add(self._task)

    def _cancel(self) -> None:
        if self._task is None:  # interrupted before the loop was asked
            self._end()
        else:
            self._task.add_done_callback(lambda _task: self._end())  # it may end before it has begun
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self._answer = await self._start()
        except BaseException as error:  # noqa: BLE001 - it is the thread's that waits, SystemExit too
            self._error = error
        self._end()

    def _end(self) -> None:
        if self._loop is not None and self._task is not None:
            self._loop.steps.discard(self._task)
        if not self._is_over:
            self._is_over = True
            self._finished.release()


class BackgroundLoop:
    """A thread with an event loop.

    Attributes:
        steps: The tasks that threads wait for.
    """

    def __init__(self) -> None:
        self.steps: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._ending: asyncio.Task[None] | None = None
        self._has_ended = False
        # A daemon, for nobody would end it before the interpreter waits for its threads.
        self._thread = threading.Thread(target=self._serve, name="aidem.sync", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread runs; an interrupt may have kept it from being started."""
        return self._thread.is_alive()

    def call(self, callback: Callable[[], object]) -> bool:
        """Let the loop call something; False: it is closed."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return False
        return True

    def end(self) -> None:
        """Let it finish, then end the thread."""
        self.call(self._begin_to_end)

    def join(self) -> None:
        """Wait until the thread has ended, bounded."""
        self._thread.join(4 * CLEANUP_SECONDS)

    def _serve(self) -> None:
        while not self._has_ended:
            # A task that raises one of these stops the loop, which other threads need.
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self._loop.run_forever()
        self._loop.close()

    def _begin_to_end(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        """Let the steps end, cancel what is left, and close the clients that layers keep in async generators."""
        await _wait(self.steps)
        left = asyncio.all_tasks() - {self._ending}
        for task in left:
            task.cancel()
        await _wait(left)
        await _wait({self._loop.create_task(self._loop.shutdown_asyncgens())})
        self._has_ended = True
        self._loop.stop()


async def _wait(tasks: AbstractSet[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=CLEANUP_SECONDS)


class _Process:
    """What this process has: the loop, and what is held to start, ask or end it."""

    __slots__ = ("lock", "loop")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: BackgroundLoop | None = None


_process = _Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - the lock may have been held by a thread that the child does not have
    _process = _Process()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_forked)
