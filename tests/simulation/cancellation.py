"""The ways in which a call is cancelled, each as a caller of aidem would do it."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from tests.simulation.call import Call


class Way(StrEnum):
    """How a call is cancelled."""

    NONE = "none"
    NATIVE = "native"
    TWICE = "twice"
    OFTEN = "often"
    TIMEOUT = "timeout"
    WAIT_FOR = "wait_for"
    SCOPE = "scope"
    FAIL_AFTER = "fail_after"
    CANCEL_SCOPE = "cancel_scope"
    GROUP = "group"
    CLOSE = "close"


TASK_CANCELS: Final = {Way.NATIVE: 1, Way.TWICE: 2, Way.OFTEN: 6}
"""How often the task itself is cancelled."""


async def bounded(call: Call) -> Any:
    """Make a call in the way that is its own."""
    if call.way in _LATER:
        call.process.loop.call_later(call.when, call.note_cancellation)
    return await _WAYS.get(call.way, _unbounded)(call)


async def _unbounded(call: Call) -> Any:
    return await call.made()


async def _within_timeout(call: Call) -> Any:
    async with asyncio.timeout(call.when):
        return await call.made()


async def _waited_for(call: Call) -> Any:
    return await asyncio.wait_for(call.made(), call.when)


async def _moved_on(call: Call) -> Any:
    with anyio.move_on_after(call.when):
        return await call.made()
    raise TimeoutError


async def _failed_after(call: Call) -> Any:
    with anyio.fail_after(call.when):
        return await call.made()


async def _in_cancel_scope(call: Call) -> Any:
    with anyio.CancelScope() as scope:

        def cancel() -> None:
            call.note_cancellation()
            scope.cancel()

        handle = call.process.loop.call_later(call.when, cancel)
        try:
            return await call.made()
        finally:
            handle.cancel()
    raise TimeoutError


async def _in_group(call: Call) -> Any:
    outcomes: list[tuple[Any, BaseException | None]] = []

    async def fail() -> None:
        await asyncio.sleep(call.when)
        call.note_cancellation()
        raise TimeoutError

    async def make() -> None:
        try:
            outcomes.append((await call.made(), None))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - the group would wrap it
            outcomes.append((None, error))

    try:
        async with asyncio.TaskGroup() as group:
            failing = group.create_task(fail())
            group.create_task(make()).add_done_callback(lambda _task: failing.cancel())
    except* TimeoutError:
        if not outcomes:
            raise TimeoutError from None
    [(value, error)] = outcomes
    if error is not None:
        raise error
    return value


async def _closed(call: Call) -> Any:
    return await _Closing(call, call.made(), awaits=call.world.rng.randrange(0, 12))


class _Closing:
    """Drives a coroutine, and closes it after some of its awaits: `GeneratorExit`, with a loop that still runs."""

    def __init__(self, call: Call, coroutine: Coroutine[Any, Any, Any], *, awaits: int) -> None:
        self.call = call
        self.coroutine = coroutine
        self.awaits = awaits

    def __await__(self) -> Generator[Any, Any, Any]:
        call = self.call
        step = partial(self.coroutine.send, None)
        for _ in range(self.awaits):
            try:
                waits_for = step()
            except StopIteration as stop:
                return stop.value
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's
                step = partial(self.coroutine.throw, error)
            else:
                step = partial(self.coroutine.send, None)
        call.is_closed = True
        call.world.happened["closed " + ("in the body" if call.is_running else "at the store")] += 1
        self.coroutine.close()
        raise TimeoutError


_WAYS: Final[dict[Way, Callable[[Call], Awaitable[Any]]]] = {
    Way.TIMEOUT: _within_timeout,
    Way.WAIT_FOR: _waited_for,
    Way.SCOPE: _moved_on,
    Way.FAIL_AFTER: _failed_after,
    Way.CANCEL_SCOPE: _in_cancel_scope,
    Way.GROUP: _in_group,
    Way.CLOSE: _closed,
}
_LATER: Final = {Way.TIMEOUT, Way.WAIT_FOR, Way.SCOPE, Way.FAIL_AFTER}
