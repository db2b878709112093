"""What the processes of the stateful tests are made of: a loop that stops by itself, and fronts with planned faults."""

from __future__ import annotations

import asyncio
import selectors
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.testing import FakeClock
from tests.stateful.model import CallSeen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem import DataRecord
    from tests.stateful.world import World

STORE_MUST_ANSWER_WITHIN_SECONDS = 20.0
START = 1_800_000_000.0


class Fault(StrEnum):
    """What happens to an operation between a process and the store."""

    LOSE_REQUEST = "lose request"
    LOSE_REPLY = "lose reply"
    HOLD_REQUEST = "hold request"
    HOLD_REPLY = "hold reply"


# --- The loop ---------------------------------------------------------------------------------------------------------


class _StoppingSelector(selectors.DefaultSelector):
    """Stops the loop instead of waiting, unless the store (another thread) owes an answer."""

    loop: SteppedLoop
    owed = 0
    next_timer_seconds: float | None = None

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.owed:
            ready = super().select(STORE_MUST_ANSWER_WITHIN_SECONDS)
            assert ready, "the store did not answer"
            return ready
        self.next_timer_seconds = timeout
        self.loop.stop()
        return ready


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop that runs by the clock of the test, and as long as there is something to do."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.selector = _StoppingSelector()
        super().__init__(self.selector)
        self.selector.loop = self

    def time(self) -> float:
        return self.clock() - START


# --- Processes --------------------------------------------------------------------------------------------------------

CALL: ContextVar[CallSeen] = ContextVar("call")


@dataclass(frozen=True, kw_only=True)
class Request:
    """An operation on its way to the store."""

    operation: str
    call: CallSeen
    record: DataRecord | None
    ask: Callable[[Any], Awaitable[Any]]


@dataclass(eq=False)
class Held:
    """A request that has not reached the store yet, or (`ask` is None) a reply that has not come back."""

    request: Request | None
    reply: asyncio.Future[Any]
    answer: Any = None


class Process:
    """A process, and its front to the store: a persistence layer whose faults are planned."""

    def __init__(self, world: World, *, settling: bool) -> None:
        self.world = world
        self.clock = world.clock
        self.is_dead = False
        self.settling = settling
        self.faults: dict[str, Fault] = {}
        self.faults_seen = 0
        self.calls: dict[str | None, CallSeen] = {}  # by the owner of a claim

    def acquire(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
        assert record.idempotency_key == CALL.get().key
        CALL.get().owners.add(record.owner)
        self.calls[record.owner] = CALL.get()
        return self._ask("acquire", record, lambda store: store.acquire(record, now=now))

    def complete(self, record: DataRecord, *, now: float) -> Any:
        return self._ask("complete", record, lambda store: store.complete(record, now=now))

    def renew(self, record: DataRecord, *, now: float) -> Any:
        return self._ask("renew", record, lambda store: store.renew(record, now=now))

    def release(self, record: DataRecord) -> Any:
        return self._ask("release", record, lambda store: store.release(record))

    def get(self, key: str) -> Any:
        return self._ask("get", None, lambda store: store.get(key))

    async def forget(self, key: str) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        """Nothing to open."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    def _ask(self, operation: str, record: DataRecord | None, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        # A renewal runs in whatever context its timer was made; a record tells whose it is.
        call = CALL.get() if record is None else self.calls[record.owner]
        request = Request(operation=operation, call=call, record=record, ask=ask)
        answer = self._send(request)
        return self._settling(answer) if self.settling else answer

    def _settling(self, answer: Awaitable[Any]) -> UncancellableFuture[Any]:
        """Answer a future that settles by itself, as aidem's own layers do."""
        loop = asyncio.get_running_loop()
        future: UncancellableFuture[Any] = UncancellableFuture(loop=loop)
        task = self.world.spawn(answer)

        def done(task: asyncio.Task[Any]) -> None:
            lost = IdempotencyPersistenceConnectionError("the world came to its end")
            error = lost if task.cancelled() else task.exception()
            future.fail(error) if error is not None else future.settle(task.result())

        task.add_done_callback(done)
        return future

    async def _send(self, request: Request) -> Any:
        if self.is_dead:
            await self._for_ever()
        fault = self.faults.pop(request.operation, None)
        if fault is not None:
            self._note(fault, request)
        if fault is Fault.LOSE_REQUEST:
            raise IdempotencyPersistenceConnectionError("the request was lost")
        if fault is Fault.HOLD_REQUEST:
            answer = await self.world.hold(request, None)
        else:
            answer = await self.world.apply(request)
        if fault is Fault.HOLD_REPLY:
            answer = await self.world.hold(None, answer)
        if self.is_dead:
            await self._for_ever()
        if fault is Fault.LOSE_REPLY:
            raise IdempotencyPersistenceConnectionError("the reply was lost")
        return answer

    def _note(self, fault: Fault, request: Request) -> None:
        self.faults_seen += 1
        request.call.faults += 1
        self.world.happened[f"{fault} of {request.operation}"] += 1
        self.world.happened[fault] += 1

    async def _for_ever(self) -> None:
        await asyncio.get_running_loop().create_future()
