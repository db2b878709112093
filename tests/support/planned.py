"""What tests of the engine share: a loop whose time jumps, and a layer whose faults are planned."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from aidem import IdempotencyConfig, idempotent_function
from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.memory import MemoryPersistenceLayer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aidem import AbandonedExecution, DataRecord
    from aidem.hooks import EventKind, IdempotencyEvent
    from aidem.persistence import Blocked, Claimed

EPOCH = 1_700_000_000.0
NO_ROUTE = IdempotencyPersistenceConnectionError("no route")


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, jumps to it; I/O that is ready comes first."""

    virtual_time = 0.0
    seconds_per_cycle = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(None if timeout is None else 0)
        self.virtual_time += self.seconds_per_cycle
        if not ready and timeout is not None and timeout > 0:
            self.virtual_time += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop on which waiting takes no time; for code without threads and sockets."""

    def __init__(self) -> None:
        self.jumping_selector = _JumpingSelector()
        super().__init__(self.jumping_selector)

    def pass_time_in_every_cycle(self, seconds: float) -> None:
        """Let time pass also while there is always something to do."""
        self.jumping_selector.seconds_per_cycle = seconds

    def jump(self, seconds: float) -> None:
        """Let time pass at once, as when something blocks the loop."""
        self.jumping_selector.virtual_time += seconds

    def time(self) -> float:
        return 1000.0 + self.jumping_selector.virtual_time


VIRTUAL_TIME = ("asyncio", {"loop_factory": VirtualTimeLoop})


def wall_clock() -> float:
    """Epoch seconds that go with the time of the running loop."""
    return EPOCH + asyncio.get_running_loop().time()


@dataclass
class Fault:
    """What happens to one operation: it waits, then fails before or after it was applied."""

    error: Exception | None = None
    applied: bool = False
    before_seconds: float = 0.0
    after_seconds: float = 0.0
    gate: asyncio.Event | None = None


@dataclass
class PlannedLayer:
    """A layer of coroutines around another, as a user would write one; remembers calls, fails as planned."""

    inner: Any = field(default_factory=lambda: MemoryPersistenceLayer(clock=wall_clock))
    calls: list[str] = field(default_factory=list)
    faults: defaultdict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    clock: Callable[[], float] = wall_clock
    latency_seconds: float = 0.0

    __hash__ = object.__hash__

    def plan(self, operation: str, *faults: Fault) -> Self:
        self.faults[operation].extend(faults)
        return self

    async def _do(self, operation: str, apply: Callable[[], Awaitable[Any]]) -> Any:
        self.calls.append(operation)
        fault = self.faults[operation].pop(0) if self.faults[operation] else Fault()
        await asyncio.sleep(self.latency_seconds + fault.before_seconds)
        if fault.gate is not None:
            await fault.gate.wait()
        if fault.error is not None and not fault.applied:
            raise fault.error
        answer = await apply()
        await asyncio.sleep(fault.after_seconds)
        if fault.error is not None:
            raise fault.error
        return answer

    async def acquire(
        self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0
    ) -> Claimed | Blocked:
        return await self._do(
            "acquire", lambda: self.inner.acquire(record, now=now, max_clock_skew_seconds=max_clock_skew_seconds)
        )

    async def take_over(self, found: DataRecord, record: DataRecord, *, now: float, **options: Any) -> Any:
        options.pop("max_clock_skew_seconds", None)
        operation = "put back" if options.get("force") else "take_over"
        return await self._do(operation, lambda: self.inner.take_over(found, record, now=now, **options))

    async def complete(self, record: DataRecord, *, now: float) -> bool:
        return await self._do("complete", lambda: self.inner.complete(record, now=now))

    async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:
        return await self._do("renew", lambda: self.inner.renew(record, now=now))

    async def release(self, record: DataRecord) -> bool:
        return await self._do("release", lambda: self.inner.release(record))

    async def get(self, key: str) -> DataRecord | None:
        return await self._do("get", lambda: self.inner.get(key))

    async def forget(self, key: str) -> None:
        await self._do("forget", lambda: self.inner.forget(key))

    async def open(self) -> None:
        """Nothing to open."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""


def other_process(layer: PlannedLayer) -> PlannedLayer:
    """Return a layer of its own on the same records: nothing but the store is shared."""
    return PlannedLayer(inner=layer.inner)


def only_record(layer: PlannedLayer) -> Any:
    [record] = layer.inner.records().values()
    return record


def made_idempotent(function: Any, layer: Any, **options: Any) -> Any:
    """Decorate a function that takes an order, with a configuration of these options."""
    config = IdempotencyConfig(**options)
    return idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(function)


class Listener:
    """A hook that remembers."""

    def __init__(self) -> None:
        self.events: list[IdempotencyEvent] = []

    def on_event(self, event: IdempotencyEvent) -> None:
        self.events.append(event)

    @property
    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


class DeclinedError(Exception):
    """What a till answers that some calls record as their outcome."""


class Till:
    """A payment service whose every charge is an effect that can be counted."""

    def __init__(self) -> None:
        self.charges: list[Any] = []
        self.error: BaseException | None = None
        self.seconds = 0.0

    async def charge(self, order: Any) -> dict[str, Any]:
        self.charges.append(order)
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return {"receipt": len(self.charges)}

    async def charge_event(self, event: Any, context: Any) -> dict[str, Any]:
        """Charge, as a handler that takes its time."""
        await asyncio.sleep(100)
        return await self.charge(event)


class Bank:
    """Answers a check as a test says, after some time; remembers who asked."""

    def __init__(self, *answers: Any, seconds: float = 0.0) -> None:
        self.answers = list(answers)
        self.seconds = seconds
        self.asked: list[AbandonedExecution] = []

    async def was_charged(self, abandoned: AbandonedExecution) -> Any:
        self.asked.append(abandoned)
        await asyncio.sleep(self.seconds)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def is_same_doubt(record: Any, found: Any, *, within_seconds: float = 0.0) -> bool:
    """Whether a claim is in doubt as one that was found, but for its owner, and for how long the store was asked."""
    late = record.lease_expiry_timestamp - found.lease_expiry_timestamp
    as_found = record.replace(
        owner=found.owner,
        fence=found.fence,
        expiry_timestamp=record.expiry_timestamp - -(-late // 1000),
        lease_expiry_timestamp=found.lease_expiry_timestamp,
    )
    return bool(as_found == found and 0 <= late <= 1000 * within_seconds)


async def closed_when(coroutine: Coroutine[Any, Any, Any], is_time: Callable[[], object]) -> None:
    """Drive a coroutine as a task would, and close it while it waits, once it is time."""
    waits_for = coroutine.send(None)
    while not is_time():
        await asyncio.sleep(0.001)
        if waits_for is None or waits_for.done():
            waits_for = coroutine.send(None)
    coroutine.close()


def real_now() -> float:
    """Epoch seconds of the machine."""
    return time.time()


class SettlingLayer(PlannedLayer):
    """A layer that answers futures which settle by themselves, as aidem's own layers for servers do."""

    def _do(self, operation: str, apply: Callable[[], Awaitable[Any]]) -> Any:
        loop = asyncio.get_running_loop()
        future: UncancellableFuture[Any] = UncancellableFuture(loop=loop)
        task = loop.create_task(super()._do(operation, apply))
        future.background = task  # type: ignore[attr-defined]

        def done(task: asyncio.Task[Any]) -> None:
            error = task.exception()
            if error is None:
                future.settle(task.result())
            else:
                future.fail(error)

        task.add_done_callback(done)
        return future

    def acquire(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
        return self._do("acquire", lambda: self.inner.acquire(record, now=now))

    def complete(self, record: DataRecord, *, now: float) -> Any:
        return self._do("complete", lambda: self.inner.complete(record, now=now))

    def renew(self, record: DataRecord, *, now: float) -> Any:
        return self._do("renew", lambda: self.inner.renew(record, now=now))

    def release(self, record: DataRecord) -> Any:
        return self._do("release", lambda: self.inner.release(record))

    def get(self, key: str) -> Any:
        return self._do("get", lambda: self.inner.get(key))


LAYERS = [PlannedLayer, SettlingLayer]


class InMemory(MemoryPersistenceLayer):
    """Answers at once, after something that a plan says."""

    def __init__(self, *before_answers: Callable[[], object]) -> None:
        super().__init__(clock=wall_clock)
        self.before_answers = list(before_answers)
        self.renewals = 0

    def acquire(self, *args: Any, **options: Any) -> Any:
        answer = super().acquire(*args, **options)
        self.before_answers.pop(0)()
        return answer

    def renew(self, *args: Any, **options: Any) -> Any:
        self.renewals += 1
        return super().renew(*args, **options)
