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
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from anyio import CancelScope

from aidem.exceptions import IdempotencyPersistenceConnectionError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

T = TypeVar("T")

CLEANUP_SECONDS: Final = 5.0


class Settled(Generic[T]):
    """The answer to an operation that never had to wait: what a done future says, at a third of its price."""

    __slots__ = ("answer",)

    def __init__(self, answer: T) -> None:
        self.answer = answer

    def __await__(self) -> Generator[Any, None, T]:
        yield from ()
        return self.answer


class SettlingFuture(asyncio.Future[T]):
    """The answer to an operation that ends by itself; whoever waits for it is cancelled only after that.

    Who produces the answer calls `settle` or `fail`, on the loop of the future; both do nothing once it is done.
    """

    _is_bounded = False

    def settle(self, answer: T) -> None:
        """Set the answer."""
        if not self.done():
            self.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Set the error."""
        if not self.done():
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002 - the signature of asyncio.Future
        """Hold the cancellation off, for a bounded time: always answers False."""
        self.give_up_at(self.get_loop().time() + CLEANUP_SECONDS)
        return False

    def give_up_at(self, deadline: float) -> None:
        """Fail when no answer has come by then, in seconds of the loop's clock; the first deadline counts."""
        if not self.done() and not self._is_bounded:
            self._is_bounded = True
            timer = self.get_loop().call_at(deadline, self._give_up)
            self.add_done_callback(lambda _future: timer.cancel())

    def _give_up(self) -> None:
        self.fail(
            IdempotencyPersistenceConnectionError(
                f"the persistence layer did not answer within {CLEANUP_SECONDS:g} s of a cancellation"
            )
        )


class HeldOff:
    """Settles the operations of one call, and keeps the cancellation that came meanwhile.

    Attributes:
        deadline: Until when operations may settle, in seconds of the loop's clock; None: as long as they take.
    """

    __slots__ = ("_cancellation", "deadline")

    def __init__(self) -> None:
        self._cancellation: asyncio.CancelledError | None = None
        self.deadline: float | None = None

    async def settle(self, operation: Awaitable[T]) -> T:
        """Wait for the operation to settle, whatever happens to the caller; return its answer or raise its error.

        The operation is a `Settled`, a `SettlingFuture`, or a coroutine, which then runs as a task of its own.
        """
        if isinstance(operation, Settled):
            answer: T = operation.answer
            return answer
        if isinstance(operation, SettlingFuture):
            future: SettlingFuture[T] = operation
            await self._wait(future)
        else:
            future = _as_task(operation)
            with CancelScope(shield=True):
                await self._wait(future)
        return future.result()

    async def _wait(self, future: SettlingFuture[Any]) -> None:
        if self.deadline is not None:
            future.give_up_at(self.deadline)
        try:
            await future
        except asyncio.CancelledError as cancellation:
            self._cancellation = self._cancellation or cancellation
            self.bound()
        except Exception:  # noqa: BLE001, S110 - it is in the future, and raised from there
            pass

    def bound(self) -> None:
        """Give operations `CLEANUP_SECONDS` from now, as the caller has been cancelled; the first call counts."""
        if self.deadline is None:
            self.deadline = asyncio.get_running_loop().time() + CLEANUP_SECONDS

    @property
    def is_pending(self) -> bool:
        """Whether a cancellation waits to be delivered."""
        return self._cancellation is not None

    def deliver(self) -> None:
        """Raise the cancellation that was held off, once."""
        cancellation, self._cancellation = self._cancellation, None
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
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return  # nobody could finish it; what it would have undone ends with its lease
    operation = start()
    future = operation if isinstance(operation, SettlingFuture) else _as_task(operation)
    future.give_up_at(loop.time() + CLEANUP_SECONDS)
    future.add_done_callback(_retrieve)


def _retrieve(future: asyncio.Future[Any]) -> None:
    future.exception()  # asked for, so that asyncio does not log it as never retrieved
