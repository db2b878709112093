"""How a write survives cancellation: in this module and nowhere else.

A cancelled caller must not leave a write half-done: a claim may have been stored, a completion may be on its way. So
its caller waits for an operation inside a `CancellationShield`, which delivers the cancellation once, when the
operation has ended:

    caller                     CancellationShield                 operation (a task of its own)
      │  wait_for(operation)          │                                    │
      ├──────────────────────────────►│  starts it                         │
      │                               ├───────────────────────────────────►│
      │  cancel()                     │                                    │  writes
      ├──────────────────────────────►│  remembered; at most               │
      │                               │  CLEANUP_SECONDS left              │
      │  cancel()                     │                                    │
      ├──────────────────────────────►│  nothing more                      │
      │                               │◄───────────────────────────────────┤ answer
      │◄──────────────────────────────┤ answer                             │
      │  leaves the shield            │                                    │
      ├──────────────────────────────►│                                    │
      │◄──────────────────────────────┤ CancelledError, once

Facts that shape this:

- A task is cancelled through the `cancel` of the future it waits for. If that answers False, asyncio remembers the
  request and raises `CancelledError` once the future is done: however often it is cancelled, natively or by
  `asyncio.timeout`. `UncancellableFuture` is such a future.
- anyio cancels a scope by cancelling its tasks in every cycle of the loop until they end, so a task that holds out
  makes the loop spin, unless it does so within `CancelScope(shield=True)`. Native cancellation cuts through that scope.
- Such a scope costs more than a request to a fast store. So the first cancellation is let through to the waiting task,
  and only then it goes on waiting, shielded, for the future that cannot be cancelled.

Nothing is shielded for ever: from the first cancellation on, an operation has `CLEANUP_SECONDS` to end.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from aidem.exceptions import IdempotencyError, IdempotencyPersistenceConnectionError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

logger = logging.getLogger("aidem")

T = TypeVar("T")

CLEANUP_SECONDS: Final = 5.0


# --- What a layer may answer, so that its operation needs no task -----------------------------------------------------


class Immediate(Generic[T]):
    """The answer to an operation that did not have to wait: as a future that is done, at a third of its cost."""

    __slots__ = ("answer",)

    def __init__(self, answer: T) -> None:
        self.answer = answer

    def __await__(self) -> Generator[Any, None, T]:
        return self.answer
        yield  # which makes it a generator


class UncancellableFuture(asyncio.Future[T]):
    """The answer to an operation that ends by itself: it is not cancelled with the tasks that wait for it.

    The layer calls `settle` or `fail`, on the loop of the future; both do nothing once it is done.
    """

    _give_up_timer: asyncio.TimerHandle | None = None
    _waiter: asyncio.Future[None] | None = None

    def settle(self, answer: T) -> None:
        """Set the answer."""
        if not self.done():
            self.set_result(answer)
            self._ended()

    def fail(self, error: BaseException) -> None:
        """Set the error; asyncio does not warn if nothing retrieves it, as the caller may be closed by then."""
        if not self.done():
            self.set_exception(error)
            self.exception()
            self._ended()

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002 - the signature of asyncio.Future
        """Return False: the task that waits is cancelled when the future is done."""
        return False

    def waiter(self) -> asyncio.Future[None]:
        """Return a future that is done when this one is, and that can be cancelled without it."""
        self._waiter = self.get_loop().create_future()
        return self._waiter

    def give_up_at(self, deadline: float) -> None:
        """Fail when no answer has come by then, in seconds of the loop's clock; the earliest deadline counts."""
        earlier = self._give_up_timer
        if self.done() or (earlier is not None and earlier.when() <= deadline):
            return
        if earlier is not None:
            earlier.cancel()
        # In an empty context: a cancelled timer is kept for a while, and must not keep what the caller has in its own.
        self._give_up_timer = self.get_loop().call_at(deadline, self._give_up, context=contextvars.Context())

    def _give_up(self) -> None:
        self.fail(IdempotencyPersistenceConnectionError("the persistence layer did not answer in time"))

    def _ended(self) -> None:
        timer, self._give_up_timer = self._give_up_timer, None
        if timer is not None:
            timer.cancel()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


# --- The shield -------------------------------------------------------------------------------------------------------


class CancellationShield:
    """A section whose operations end although the task is cancelled; leaving it delivers the cancellation, once.

    Attributes:
        deadline: When operations fail that have not ended, in seconds of the loop's clock. Default: never.
        operation: The operation that was waited for last.
    """

    __slots__ = ("_cancellation", "deadline", "operation")

    def __init__(self, *, deadline: float | None = None) -> None:
        self._cancellation: asyncio.CancelledError | None = None
        self.deadline = deadline
        self.operation: UncancellableFuture[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        cancellation, self._cancellation = self._cancellation, None
        if cancellation is not None and exc_type is not GeneratorExit:
            try:
                raise cancellation
            finally:
                del cancellation  # or its traceback would keep this frame in a cycle

    @property
    def is_pending(self) -> bool:
        """Whether a cancellation is to be delivered."""
        return self._cancellation is not None

    async def wait_for(self, operation: Awaitable[T], *, within_seconds: float | None = None) -> T:
        """Wait until the operation has ended, even if the task is cancelled; return its answer or raise its error.

        The operation is an `Immediate`, an `UncancellableFuture`, or a coroutine, which then runs as a task of its own.
        It fails when it takes longer than `within_seconds`.
        """
        if isinstance(operation, Immediate):
            answer: T = operation.answer
            return answer
        future: UncancellableFuture[T] = operation if isinstance(operation, UncancellableFuture) else as_task(operation)
        self.operation = future
        deadline = self.deadline
        if within_seconds is not None:
            soon = future.get_loop().time() + within_seconds
            deadline = soon if deadline is None else min(deadline, soon)
        if deadline is not None:
            future.give_up_at(deadline)
        if not future.done():
            try:
                await future.waiter()
            except asyncio.CancelledError as cancellation:
                self._cancellation = self._cancellation or cancellation
                future.give_up_at(self.bound(CLEANUP_SECONDS))
                await _outlast(future)
        return future.result()

    def bound(self, seconds: float) -> float:
        """Move the deadline forward to so many seconds from now, unless it is earlier; return it."""
        deadline = asyncio.get_running_loop().time() + seconds
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)
        return self.deadline

    def request_again(self) -> None:
        """Request the cancellation again instead of delivering it: an error of the body goes first.

        It is then delivered at the next `await`, unless its requester has withdrawn it by then, as `asyncio.timeout`
        does when the error passes it.
        """
        cancellation, self._cancellation = self._cancellation, None
        task = asyncio.current_task()
        if cancellation is not None and task is not None:
            asyncio.get_running_loop().call_soon(_cancel_again, task, task.cancelling(), cancellation.args)


async def _outlast(future: UncancellableFuture[Any]) -> None:
    # A scope of anyio can be around this task only if anyio is loaded, and not while another thread still loads it.
    scope: Any = getattr(sys.modules.get("anyio"), "CancelScope", None)
    with nullcontext() if scope is None else scope(shield=True):
        try:
            await future
        except asyncio.CancelledError:
            pass  # cancelled once more: one is delivered
        except Exception:  # noqa: BLE001, S110 - it is in the future, and raised from there
            pass


def _cancel_again(task: asyncio.Task[Any], requests: int, args: tuple[Any, ...]) -> None:
    if task.cancelling() >= max(1, requests) and not task.done():  # it was not withdrawn
        task.cancel(*args)
        task.uncancel()  # it is the same request, not one more


# --- Operations that need a task --------------------------------------------------------------------------------------

writes: Final[set[asyncio.Task[Any]]] = set()
"""Operations that run as tasks of their own. Code that cancels the tasks of a loop waits for these; they are bounded.

The references are strong, as asyncio itself keeps only weak ones.
"""


def as_task(operation: Awaitable[T]) -> UncancellableFuture[T]:
    """Run the operation as a task, strongly referenced, behind a future that cannot be cancelled."""
    loop = asyncio.get_running_loop()
    future: UncancellableFuture[T] = UncancellableFuture(loop=loop)
    task = loop.create_task(_await(operation), context=contextvars.copy_context())
    writes.add(task)

    def task_done(task: asyncio.Task[T]) -> None:
        writes.discard(task)
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


def in_background(start: Callable[[], Awaitable[Any]], *, after: UncancellableFuture[Any] | None = None) -> None:
    """Start an operation without waiting for it, bounded; without a running loop it is not started.

    For a coroutine that is being closed (`GeneratorExit`) and may not await any more.

    Args:
        start: Starts the operation.
        after: An operation that has to end first, with an answer or an error.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return  # nothing could run it; the claim that it would have released lapses with its lease
    if after is None or after.done() or after.get_loop() is not loop:
        _start_unattended(start, loop)
    else:
        after.give_up_at(loop.time() + CLEANUP_SECONDS)
        after.add_done_callback(lambda _after: _start_unattended(start, loop))


def _start_unattended(start: Callable[[], Awaitable[Any]], loop: asyncio.AbstractEventLoop) -> None:
    async def operate() -> None:
        await start()

    future = as_task(operate())
    future.give_up_at(loop.time() + CLEANUP_SECONDS)
    future.add_done_callback(_log_failure)


def _log_failure(future: asyncio.Future[Any]) -> None:
    error = future.exception()
    if error is not None:
        told = error if isinstance(error, IdempotencyError) else type(error).__name__  # foreign text may show data
        logger.warning("a call that was closed has left a claim behind, which lapses with its lease: %s", told)
