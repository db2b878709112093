"""How a write survives cancellation: in this module and nowhere else.

A cancelled caller must not leave a write half-done: a claim may have been stored, a completion may be on its way. So
while an operation is under way, cancellation is *held off*, and delivered once, after the operation has settled.

Two facts shape this:

- A task that waits for a future is cancelled through that future's `cancel`. If it answers False, asyncio remembers
  the request and raises `CancelledError` at the very `await`, but only once the future is done. That holds for
  `task.cancel()`, however often, and for `asyncio.timeout`. So a future that cannot be cancelled needs no task, no
  shield and no loop around it.
- anyio cancels a scope by cancelling its tasks again in every cycle of the loop until they end. Under
  `CancelScope(shield=True)` it does not; native cancellation cuts through that scope. So a foreign coroutine, which
  may take long, runs as a task behind such a future, and within such a scope.

Nothing is held off for ever: from the first cancellation on, an operation has `CLEANUP_SECONDS` to settle.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, Final, TypeVar

from anyio import CancelScope

from aidem.exceptions import IdempotencyPersistenceConnectionError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

CLEANUP_SECONDS: Final = 5.0


class SettlingFuture(asyncio.Future[T]):
    """The answer to an operation that ends by itself; whoever waits for it is cancelled only after that.

    Who produces the answer calls `settle` or `fail`, on the loop of the future; both do nothing once it is done.
    """

    _give_up_timer: asyncio.TimerHandle | None = None

    def settle(self, answer: T) -> None:
        """Set the answer."""
        if not self.done():
            self.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Set the error."""
        if not self.done():
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ANN401, ARG002 - the signature of asyncio.Future
        """Hold the cancellation off, for a bounded time: always answers False."""
        self.bound()
        return False

    def bound(self) -> None:
        """Give up when no answer has come within `CLEANUP_SECONDS`."""
        if not self.done() and self._give_up_timer is None:
            self._give_up_timer = self.get_loop().call_later(CLEANUP_SECONDS, self._give_up)
            self.add_done_callback(_cancel_timer)

    def _give_up(self) -> None:
        self.fail(
            IdempotencyPersistenceConnectionError(
                f"the persistence layer did not answer within {CLEANUP_SECONDS:g} s of a cancellation"
            )
        )


def _cancel_timer(future: asyncio.Future[Any]) -> None:
    if isinstance(future, SettlingFuture) and future._give_up_timer is not None:  # noqa: SLF001 - its own class
        future._give_up_timer.cancel()  # noqa: SLF001


class HeldOff:
    """Settles the operations of one call, and keeps the cancellation that came meanwhile.

    Attributes:
        cancellation: The first cancellation that was held off and not delivered yet.
    """

    __slots__ = ("cancellation",)

    def __init__(self) -> None:
        self.cancellation: asyncio.CancelledError | None = None

    async def settle(self, operation: Awaitable[T], *, bounded: bool = False) -> T:
        """Wait for the operation to settle, whatever happens to the caller; return its answer or raise its error.

        Args:
            operation: A `SettlingFuture`, or a coroutine, which then runs as a task of its own.
            bounded: Count `CLEANUP_SECONDS` from now, as the caller has been cancelled already.
        """
        if isinstance(operation, SettlingFuture):
            return await self._settle(operation, bounded=bounded or self.cancellation is not None)
        with CancelScope(shield=True):
            return await self._settle(_as_task(operation), bounded=bounded or self.cancellation is not None)

    async def _settle(self, future: SettlingFuture[T], *, bounded: bool) -> T:
        if bounded:
            future.bound()
        try:
            return await future
        except asyncio.CancelledError as cancellation:
            self.cancellation = self.cancellation or cancellation
            return future.result()

    def deliver(self) -> None:
        """Raise the cancellation that was held off, once."""
        cancellation, self.cancellation = self.cancellation, None
        if cancellation is not None:
            raise cancellation


# Tasks that settle something: asyncio itself keeps only weak references to tasks.
_tasks: set[asyncio.Task[Any]] = set()


def _as_task(operation: Awaitable[T]) -> SettlingFuture[T]:
    """Run the operation as a task, strongly referenced, behind a future that cannot be cancelled."""
    loop = asyncio.get_running_loop()
    future: SettlingFuture[T] = SettlingFuture(loop=loop)
    task = loop.create_task(_await(operation), context=contextvars.copy_context())
    _tasks.add(task)

    def task_done(task: asyncio.Task[T]) -> None:
        _tasks.discard(task)
        if task.cancelled():
            future.fail(IdempotencyPersistenceConnectionError("the operation of the persistence layer was cancelled"))
        elif (error := task.exception()) is not None:
            future.fail(error)
        else:
            future.settle(task.result())

    def future_done(_future: asyncio.Future[T]) -> None:
        task.cancel()  # it was given up: no task outlives its call

    task.add_done_callback(task_done)
    future.add_done_callback(future_done)
    return future


async def _await(operation: Awaitable[T]) -> T:
    return await operation


def in_background(start: Callable[[], Awaitable[Any]]) -> None:
    """Start an operation that nobody waits for, bounded; where no loop runs it is not started.

    For a coroutine that is being closed (`GeneratorExit`) and may not await any more.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # nobody could finish it; what it would have undone ends with its lease
    operation = start()
    future = operation if isinstance(operation, SettlingFuture) else _as_task(operation)
    future.bound()
    future.add_done_callback(_retrieve)


def _retrieve(future: asyncio.Future[Any]) -> None:
    future.exception()  # asked for, so that asyncio does not log it as never retrieved
