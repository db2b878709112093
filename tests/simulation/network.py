"""The network: what lies between a process and the store, and what goes wrong there."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from aidem import DataRecord
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence import Blocked, Claimed, Immediate, UncancellableFuture

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.simulation.call import Call
    from tests.simulation.process import Process

CURRENT: ContextVar[Call | None] = ContextVar("simulated_call", default=None)
"""The call whose code is running."""


class Fault(StrEnum):
    """What happens to one request."""

    LOSE_REQUEST = "lose request"
    LOSE_REPLY = "lose reply"
    APPLY_LATE = "apply late"
    SLOW_REPLY = "slow reply"
    THEN_CUT_OFF = "slow reply, then cut off"
    DUPLICATE = "duplicate"
    LATE_DUPLICATE = "late duplicate"
    ERROR_BEFORE = "error before"
    ERROR_AFTER = "error after"
    FOREIGN_ERROR = "foreign error"
    ERROR_AT_ONCE = "error at once"
    HANG = "hang"


class Client:
    """A persistence layer: what a process has to talk to the store."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.clock = process.epoch

    def acquire(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> Awaitable[Any]:
        call = CURRENT.get()
        if call is not None:
            call.owners.add(record.owner)
            self.world.by_owner[record.owner] = call
        store, skew = self.world.store, max_clock_skew_seconds
        return self._ask("acquire", record, lambda: store.acquire(record, now=now, skew=skew))

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,
        force: bool = False,
    ) -> Awaitable[DataRecord | None]:
        call = CURRENT.get()
        if call is not None and not force:  # else it is put back, and nobody's
            call.owners.add(record.owner)
            self.world.by_owner[record.owner] = call
        store, skew = self.world.store, max_clock_skew_seconds
        return self._ask("take_over", record, lambda: store.take_over(found, record, now=now, skew=skew, force=force))

    def complete(self, record: DataRecord, *, now: float) -> Awaitable[bool]:
        return self._ask("complete", record, lambda: self.world.store.complete(record, now=now))

    def renew(self, record: DataRecord, *, now: float) -> Awaitable[DataRecord | None]:
        return self._ask("renew", record, lambda: self.world.store.renew(record, now=now))

    def release(self, record: DataRecord) -> Awaitable[bool]:
        return self._ask("release", record, lambda: self.world.store.release(record))

    def get(self, key: str) -> Awaitable[DataRecord | None]:
        call = CURRENT.get()
        if call is not None:
            call.has_looked = True
        return self._ask("get", None, lambda: self.world.store.get(key))

    def forget(self, key: str) -> Awaitable[None]:
        raise NotImplementedError(key)

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def _ask(self, operation: str, record: DataRecord | None, apply: Callable[[], Any]) -> Awaitable[Any]:
        world = self.world
        request = Request(self.process, operation, record, apply)
        world.judge.asked(request)
        if request.call is not None:
            request.call.spring(operation)
        style = world.conditions.style
        if style == "mixed":
            style = world.rng.choice(["coroutine", "future"])
        if style == "settled":
            answer = apply()
            world.judge.answered(request, answer)
            return Immediate(answer)
        return self._as_coroutine(request) if style == "coroutine" else self._as_future(request)

    async def _as_coroutine(self, request: Request) -> Any:
        future = request.future = asyncio.get_running_loop().create_future()
        request.send()
        return await future

    def _as_future(self, request: Request) -> UncancellableFuture[Any]:
        future: UncancellableFuture[Any] = UncancellableFuture(loop=asyncio.get_running_loop())
        request.future = future
        request.send()
        return future


class Listener(Client):
    """A layer that says it can tell of changes, and does so at random."""

    async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
        rng = self.world.rng
        self.world.happened["wait_for_change"] += 1
        match rng.randrange(4):
            case 0:
                await asyncio.sleep(timeout_seconds)
            case 1:
                await asyncio.sleep(rng.uniform(0, timeout_seconds))
            case 2:
                raise IdempotencyPersistenceConnectionError("the listener is gone")
            case _:
                return


class Request:
    """One operation on its way to the store and back.

    Attributes:
        asked_at: When the layer was asked, which may be earlier than the request goes out.
        call: Whose claim it is about; None: nobody's.
        is_confirmation: Whether it may be what `ensure_owned` asks, or what is asked after a check, before the body.
    """

    future: asyncio.Future[Any]
    timer: asyncio.TimerHandle

    def __init__(self, process: Process, operation: str, record: DataRecord | None, apply: Callable[[], Any]) -> None:
        self.process = process
        self.world = process.world
        self.operation = operation
        self.record = record
        self.apply = apply
        self.asked_at = process.world.now
        self.frozen_when_asked = process.frozen_total
        self.call = None if record is None else process.world.by_owner.get(record.owner)
        is_before_body = operation == "renew" and self.call is not None and not self.call.is_running
        self.is_confirmation = is_before_body or (self.call is not None and self.call.confirms)
        self.fault = ""

    def send(self) -> None:
        world, process, conditions = self.world, self.process, self.world.conditions
        self.fault = self._draw_fault()
        self.sent_at = world.now
        out, self.back = self._delays()
        world.tell(f"p{process.number} {self.operation} {world.name_of(self.record)} {self.fault}")
        if self.fault or out + self.back > conditions.lease_or(30) / 8:
            process.note_fault(self.sent_at, self.sent_at + max(conditions.client_timeout, out + self.back))
        if self.fault == Fault.ERROR_AT_ONCE:
            world.judge.answered(self, None)
            raise IdempotencyPersistenceConnectionError("refused")
        self.timer = process.loop.call_later(conditions.client_timeout, self._time_out)
        if not process.is_dead:
            world.at(world.now + out, self._arrive)

    def _draw_fault(self) -> str:
        world, conditions, process = self.world, self.world.conditions, self.process
        last, process.last_fault = process.last_fault, ""
        rate = max(conditions.fault_rate, conditions.stickiness if last else 0.0)
        if world.is_calm or not conditions.fault_rate or world.rng.random() >= rate:
            return ""
        fault: str = world.rng.choice(list(Fault))
        if last and world.rng.random() < conditions.stickiness:
            fault = last
        process.last_fault = fault
        world.happened[f"{fault}: {self.operation}"] += 1
        return fault

    def _delays(self) -> tuple[float, float]:
        conditions, rng = self.world.conditions, self.world.rng
        out, back = conditions.delay(), conditions.delay()
        lease = conditions.lease_or(3)
        if self.fault in {Fault.APPLY_LATE, Fault.HANG}:
            out = rng.uniform(0.0, conditions.longest_late)
        if self.fault in {Fault.SLOW_REPLY, Fault.HANG}:
            back = rng.choice([rng.uniform(0.0, conditions.longest_late), rng.uniform(0.5, 1.5) * lease])
        if self.fault == Fault.THEN_CUT_OFF:
            back = rng.uniform(0.0, min(conditions.longest_late, conditions.client_timeout, lease))
        return out, back

    # --- At the store -------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        world, process = self.world, self.process
        if world.is_down() or process.is_cut_off() or self.fault == Fault.LOSE_REQUEST:
            process.note_fault(self.sent_at, world.now + world.conditions.client_timeout)
            return
        if self.fault in {Fault.ERROR_BEFORE, Fault.FOREIGN_ERROR}:
            self._reply_with_error()
            return
        answer = self.apply()
        shown = _shown(answer)
        world.tell(f"    store: {self.operation} {world.name_of(self.record)} of p{process.number} -> {shown}")
        if self.fault == Fault.DUPLICATE:
            world.at(world.now + world.conditions.delay(), self.apply)
        if self.fault == Fault.LATE_DUPLICATE:
            world.at(world.now + world.rng.uniform(0.0, world.conditions.longest_late), self.apply)
        if self.fault == Fault.ERROR_AFTER:
            self._reply_with_error()
        else:
            self._reply(lambda: self._succeed(answer))

    def _reply_with_error(self) -> None:
        error: Exception = IdempotencyPersistenceConnectionError("reset")
        if self.fault == Fault.FOREIGN_ERROR:
            error = self.world.rng.choice([OSError("broken"), RuntimeError("bug"), ValueError("bug")])
        self._reply(lambda: self._fail(error))

    def _reply(self, deliver: Callable[[], None]) -> None:
        world, process = self.world, self.process

        def arrive() -> None:
            if process.is_cut_off() or self.fault == Fault.LOSE_REPLY:
                return
            process.post(deliver)
            if self.fault == Fault.THEN_CUT_OFF:
                process.cut_off(world.rng.uniform(1.0, 2.5) * world.conditions.lease_or(3))

        world.at(world.now + self.back, arrive)

    # --- Back in the process ------------------------------------------------------------------------------------------

    def _succeed(self, answer: Any) -> None:
        self.timer.cancel()
        if self.future.done():
            return
        self.world.judge.answered(self, answer)
        if isinstance(self.future, UncancellableFuture):
            self.future.settle(answer)
        else:
            self.future.set_result(answer)

    def _fail(self, error: Exception) -> None:
        self.timer.cancel()
        if self.future.done():
            return
        self.world.judge.answered(self, None)
        if isinstance(self.future, UncancellableFuture):
            self.future.fail(error)
        else:
            self.future.set_exception(error)

    def _time_out(self) -> None:
        self._fail(IdempotencyPersistenceConnectionError("timed out"))


def _shown(answer: Any) -> str:
    if isinstance(answer, Claimed | Blocked):
        return f"{type(answer).__name__} {answer.record.status} fence {answer.record.fence}"
    return answer.status if isinstance(answer, DataRecord) else repr(answer)
