"""An event loop that is kept, and runs only while a call waits for it: between two calls everything stands still.

A client that a layer opens belongs to its loop, so a loop that is kept keeps connections. A call ends what it has left
behind, so that nothing of it goes on in the next one:

- Tasks are cancelled and waited for, as `asyncio.run` does. Two kinds are only waited for: writes of aidem's own, which
  are bounded, and what closes async generators that were dropped.
- Work for the loop's own threads is dropped if it has not begun, and waited for if it has.
- Async generators that are still referenced stay as they are: layers keep their clients in such.

What does not end in time is logged. A thread cannot be ended; because of a task, the whole loop is given up.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aidem._runtime.cancellation import CLEANUP_SECONDS, writes
from aidem._runtime.interrupts import Interrupts
from aidem._runtime.lambda_lifecycle import BeforeSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

logger = logging.getLogger("aidem")

T = TypeVar("T")

PATIENCE_SECONDS: Final = CLEANUP_SECONDS + 1.0
"""How long a call waits at most for what it has left behind; aidem's own writes are bounded a little shorter."""

CLOSING: Final = "async_generator_athrow"
"""The type, which has no public name, of what closes an async generator."""

TURNS: Final = 8
"""In how many turns of its loop a connection has found out that it was closed; with TLS it takes four."""


def run(start: Callable[[], Coroutine[Any, Any, T]], *, patience: Callable[[], float]) -> T:
    """Run a coroutine in a copy of the caller's context, and end what it has left behind.

    Ctrl-C and SIGTERM cancel it and go on once it has ended, unless other code handles them.

    Args:
        start: Starts the coroutine.
        patience: Answers, when the coroutine has ended, for how many seconds to wait for what it has left behind.
    """
    loop = _take()
    try:
        return loop.run(start, patience)
    finally:
        if loop.is_clean:
            _idle.append(loop)
        else:
            loop.close(patience=min(0.5, patience() / 4))  # which takes twice as long at most


def prepare(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the loop that the next call gets; tasks that it leaves behind may stay."""
    loop = _take()
    try:
        return loop.prepare(start)
    finally:
        _idle.append(loop)


def close() -> None:
    """Close the loops that are kept, and the clients that layers have opened on them; the next call makes another."""
    while _idle:
        _idle.pop().close(patience=PATIENCE_SECONDS)


class LambdaLoop:
    """A loop with its threads.

    Attributes:
        is_clean: Whether no task has outlasted its call.
    """

    def __init__(self) -> None:
        self.is_clean = True
        self._loop = asyncio.new_event_loop()
        self._threads = _Threads()
        self._loop.set_default_executor(self._threads)
        self._residents: set[asyncio.Task[Any]] = set()

    def prepare(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine; tasks that it leaves behind may stay."""
        try:
            return self._loop.run_until_complete(start())
        finally:
            self._residents = asyncio.all_tasks(self._loop)

    def run(self, start: Callable[[], Coroutine[Any, Any, T]], patience: Callable[[], float]) -> T:
        """Run a coroutine, and end what it has left behind."""
        task = self._loop.create_task(_thawed(start))
        task.add_done_callback(_look_at)
        with Interrupts(self._loop, task):
            try:
                return self._loop.run_until_complete(task)
            finally:
                self._end(patience())
                for left in self._left():
                    logger.warning("%s goes on although its call has ended: its event loop is given up", repr(left))
                if self._threads.unfinished:
                    logger.warning("%d threads go on although their call has ended", len(self._threads.unfinished))
                    self._threads.unfinished.clear()  # or every later call would wait for them, too

    def close(self, *, patience: float) -> None:
        """Close it, and with it the clients that layers keep in async generators."""
        self._residents = set()
        self._end(patience)
        generators = self._loop.create_task(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(asyncio.wait({generators}, timeout=patience))
        self._loop.close()

    def _end(self, patience: float) -> None:
        self.is_clean = False  # an interrupt may keep it from being known
        self._loop.run_until_complete(self._end_what_is_left(patience))
        self.is_clean = not self._left()

    async def _end_what_is_left(self, patience: float) -> None:
        deadline = self._loop.time() + patience
        while left := self._left() | self._threads.drained():
            for task in left - writes:
                if isinstance(task, asyncio.Task) and type(task.get_coro()).__name__ != CLOSING:
                    task.cancel()
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                break
            await asyncio.wait(left, timeout=remaining)

    def _left(self) -> set[asyncio.Future[Any]]:
        return {*asyncio.all_tasks(self._loop) - self._residents - {asyncio.current_task(self._loop)}}


async def _thawed(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Let connections first find out whether they were closed while the loop stood still."""
    for _ in range(TURNS):
        await asyncio.sleep(0)
    return await start()


def _look_at(task: asyncio.Task[Any]) -> None:
    """Retrieve the exception, so that asyncio does not warn: the caller may get an interrupt instead."""
    _ = task.cancelled() or task.exception()


class _Threads(ThreadPoolExecutor):
    """The threads of a loop.

    Attributes:
        unfinished: What they have not done yet, and has not been given up.
    """

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="aidem")
        self.unfinished: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a thread do something."""
        future = super().submit(fn, *args, **kwargs)
        self.unfinished.add(future)
        future.add_done_callback(self.unfinished.discard)
        return future

    def drained(self) -> set[asyncio.Future[Any]]:
        """Drop the work that has not begun, and return the work that has."""
        return {asyncio.wrap_future(work) for work in list(self.unfinished) if not work.cancel()}


# --- The loops of this process ----------------------------------------------------------------------------------------

_idle: Final[list[LambdaLoop]] = []  # more than one only where several threads have run something at once
_inherited: Final[list[LambdaLoop]] = []  # kept, as finalizing a loop of the parent would reach into its selector
_before_snapshot: Final = BeforeSnapshot(close)


def _take() -> LambdaLoop:
    _before_snapshot.arm()
    try:
        return _idle.pop()
    except IndexError:
        return LambdaLoop()


atexit.register(close)


def _after_fork_in_child() -> None:
    _inherited.extend(_idle)
    _idle.clear()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork_in_child)
