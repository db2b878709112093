"""The background event loop of the process: runs coroutines for threads that wait for them.

One thread with one loop, started on first use and kept, since a client that a layer opens belongs to its loop. A fork
has none of its parent's threads, so a child starts its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import time
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from aidem._runtime.cancellation import CLEANUP_SECONDS, writes
from aidem._runtime.lambda_lifecycle import BeforeSnapshot
from aidem._runtime.threads import Lock, event_loop, held_lock, is_patched, thread_for
from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

INTERRUPTED_SECONDS: Final = CLEANUP_SECONDS + 1.0
"""How long an interrupted thread waits for its step, which bounds its own clean-up a little shorter."""

CLOSED = "aidem.sync was closed while this call waited for its layer; close it when no thread is in an idempotent call"


def run(start: Callable[[], Coroutine[Any, Any, T]], *, closed: str = CLOSED) -> T:
    """Run a coroutine on the background loop, in a copy of the caller's context, and wait for it.

    An interrupt of the waiting thread, such as Ctrl-C, cancels the coroutine, and is raised once that has cleaned up.

    Args:
        start: Starts the coroutine.
        closed: What the error says if the loop was closed meanwhile.

    Raises:
        IdempotencyUsageError: The loop was closed meanwhile.
    """
    step = BackgroundStep(start)
    try:
        submit(step)
        step.wait()
    except BaseException:
        step.abandon()
        raise
    return step.answer(closed)


async def in_waiting_thread(function: Callable[[], T]) -> T:
    """Call a function in the thread that waits for this coroutine, which is one that `run` runs.

    An interrupt of the thread meanwhile cancels the coroutine. Another `BaseException` of the function is an interrupt.
    """
    answer: T = await _step.get().errand(function)
    return answer


def run_unattended(start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Start a coroutine and do not wait for it, if there is a background loop.

    For finalizers, which may run at any point, also while this thread holds the lock: it takes none.
    """
    loop = _process.loop
    if loop is not None:
        BackgroundStep(start).submit_to(loop)


def submit(step: BackgroundStep[Any]) -> None:
    """Let the background loop begin a step; start the loop if there is none."""
    with _process.lock:
        if _process.loop is None or not _process.loop.is_alive() or _process.loop.is_patched is not is_patched():
            loop = BackgroundLoop()
            loop.start()
            _process.loop = loop  # not before: an interrupt may keep it from being started
            atexit.register(close, is_exiting=True)  # so it runs before what layers have registered
            _before_snapshot.arm()
        step.submit_to(_process.loop)


def close(*, is_exiting: bool = False) -> None:
    """End the background loop, after the steps that are under way; the next one starts another.

    Args:
        is_exiting: Whether the interpreter exits: then only daemon threads are left. Their steps are cancelled at once,
            which leaves no write half-done, and they are not woken.
    """
    with _process.lock:
        loop, _process.loop = _process.loop, None
        if loop is not None:
            loop.end(is_exiting=is_exiting)  # under the lock: a step comes before this, or goes to another loop
    if loop is not None:
        atexit.unregister(close)
        loop.join()


class BackgroundStep(Generic[T]):
    """One coroutine, which runs on the background loop while the thread that asked for it waits."""

    __slots__ = ("_answer", "_errand", "_error", "_finished", "_is_asked", "_is_over", "_loop", "_start", "_task")

    _answer: T
    _loop: BackgroundLoop

    def __init__(self, start: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._start = start
        self._is_asked = False
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._errand: Callable[[], None] | None = None
        self._finished = held_lock()  # waiting for a lock is the cheapest way to be woken by another thread

    # --- In the thread that waits -----------------------------------------------------------------------------------

    def submit_to(self, loop: BackgroundLoop) -> None:
        """Let the loop begin the coroutine."""
        self._loop = loop
        self._is_asked = True  # before it is: an interrupt may come between any two lines
        loop.call(self._begin)

    def wait(self) -> None:
        """Wait until it is over; meanwhile call what it wants to be called in this thread."""
        self._finished.acquire()
        while self._errand is not None:
            self._take_errand()()
            self._finished.acquire()

    def _take_errand(self) -> Callable[[], None]:
        errand, self._errand = cast("Callable[[], None]", self._errand), None
        self._finished = held_lock()  # a lock of greenlets is released once
        return errand

    def abandon(self) -> None:
        """Cancel it, and wait for its clean-up, bounded; another interrupt does not cut that short."""
        deadline = time.monotonic() + INTERRUPTED_SECONDS
        if self._errand is not None:  # the interrupt came before it was begun
            self._take_errand()
        if not (self._is_asked and self._loop.call(self._cancel)):
            return
        while not self._is_over and (remaining := deadline - time.monotonic()) > 0:
            with contextlib.suppress(BaseException):
                self._finished.acquire(timeout=remaining)

    def answer(self, closed: str) -> T:
        """Return the result of the coroutine, or raise its error; if it was cancelled, one with the text `closed`."""
        error, self._error = self._error, None
        if error is None:
            return self._answer
        try:
            if isinstance(error, asyncio.CancelledError):
                raise IdempotencyUsageError(closed) from error
            raise error
        finally:
            del error  # or its traceback would keep this frame in a cycle

    # --- On the loop ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        # In the context of the thread that waits: a callback runs in a copy of it, and a task copies that.
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._loop.steps.add(self._task)

    def _cancel(self) -> None:
        if self._task is None:  # interrupted before the loop was asked
            self._end()
        else:
            self._task.add_done_callback(self._end)  # it may end before it has begun
            # When it has begun: its writes then end, as in any cancelled call.
            self._task.get_loop().call_soon(self._task.cancel)

    async def errand(self, function: Callable[[], Any]) -> Any:
        """Let the thread that waits call a function; return what it returns, or raise the exception that it raises."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(set_answer: Callable[[Any], None], value: Any) -> None:
            if not answer.done():
                set_answer(value)

        def call() -> None:
            try:
                value, set_answer = function(), answer.set_result
            except Exception as error:  # noqa: BLE001 - it is the coroutine's
                value, set_answer = error, answer.set_exception
            self._loop.call(partial(settle, set_answer, value))

        self._errand = call
        self._wake()
        return await answer

    async def _run(self) -> None:
        _step.set(self)
        try:
            self._answer = await self._start()
        except BaseException as error:  # noqa: BLE001 - it is the thread's that waits, SystemExit too
            self._error = error
        self._end()

    def _end(self, _task: object = None) -> None:
        if self._task is not None:
            self._loop.steps.discard(self._task)
        if not (self._is_over or self._loop.is_exiting):
            self._is_over = True
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(Exception):  # it was woken before, and an interrupt has kept it from noticing
            self._finished.release()


_step: Final[ContextVar[BackgroundStep[Any]]] = ContextVar("aidem_background_step")
"""The step whose task is running."""


class BackgroundLoop:
    """A thread with an event loop.

    Attributes:
        is_alive: Whether the thread runs.
        is_patched: Whether gevent had patched the standard library when it was made. One that was made before cannot
            begin threads any more, so it only finishes what it was asked.
        steps: The tasks that threads wait for.
        is_exiting: Whether it ends because the interpreter exits.
    """

    def __init__(self) -> None:
        self.is_exiting = False
        self.is_patched = is_patched()
        self.steps: set[asyncio.Task[None]] = set()
        self._loop = event_loop()
        self._ending: asyncio.Task[None] | None = None
        self._has_ended = False
        self._is_taken = Lock()  # by its thread, or by a `start` that was interrupted before: it closes the loop
        # A daemon, as nothing would end it before the interpreter waits for its threads.
        self._thread = thread_for(self._serve, name="aidem.sync")
        self.is_alive = self._thread.is_alive

    def start(self) -> None:
        """Start the thread. If that fails or is interrupted, the thread ends at once, if there is one."""
        try:
            self._thread.start()
        except BaseException:
            if self._is_taken.acquire(blocking=False):
                self._loop.close()
            else:
                self.end()
            raise

    def call(self, callback: Callable[[], object]) -> bool:
        """Let the loop call something; False: it is closed."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return False
        return True

    def end(self, *, is_exiting: bool = False) -> None:
        """Let it finish, then end the thread."""
        self.is_exiting = is_exiting
        self.call(self._begin_to_end)

    def join(self) -> None:
        """Wait until the thread has ended, bounded."""
        self._thread.join(4 * CLEANUP_SECONDS)

    def _serve(self) -> None:
        if not self._is_taken.acquire(blocking=False):
            return
        while not self._has_ended:
            # A task that raises one of these stops the loop, which other threads need.
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self._loop.run_forever()
        self._loop.close()

    def _begin_to_end(self) -> None:
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        """Let the steps end, cancel other tasks, and close the clients that layers keep in async generators."""
        if not self.is_exiting:
            await _wait(self.steps)
        left = asyncio.all_tasks() - {self._ending}
        for task in left - writes:
            task.cancel()
        await _wait(left)
        await _wait({self._loop.create_task(self._loop.shutdown_asyncgens())})
        self._has_ended = True
        self._loop.stop()


async def _wait(tasks: set[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=CLEANUP_SECONDS)


class _Process:
    """The loop of this process, and the lock that is held to start, ask or end it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.loop: BackgroundLoop | None = None


_process = _Process()
_before_snapshot: Final = BeforeSnapshot(close)


def _forked() -> None:
    global _process  # noqa: PLW0603 - the lock may have been held by a thread that the child does not have
    _process = _Process()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_forked)
