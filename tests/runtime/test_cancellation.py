"""Cancelled at every await of every path: the key is never stuck, and never falsely completed."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aidem import IdempotencyConfig, RecordStatus, idempotency, idempotent_function
from aidem._runtime.cancellation import CancellationShield, UncancellableFuture
from aidem.exceptions import IdempotencyInDoubtError, IdempotencyPersistenceConnectionError
from aidem.hooks import EventKind
from tests.support.planned import (
    LAYERS,
    VIRTUAL_TIME,
    Fault,
    PlannedLayer,
    Till,
    VirtualTimeLoop,
    made_idempotent,
    other_process,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

CYCLES = 400
ORDER = {"id": 7}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


# --- How a call is cancelled: each way runs it, and is told when ---


class Cancelling:
    """Runs a call and cancels it after a number of turns of the loop; says whether that came in time."""

    def __init__(self, after_cycles: int) -> None:
        self.after_cycles = after_cycles
        self.was_cancelled = False

    async def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        task = asyncio.ensure_future(self._guarded(call))
        for _ in range(self.after_cycles):
            await asyncio.sleep(0)
        if not task.done():
            self.was_cancelled = True
            await self.cancel(task)
        return await asyncio.gather(task, return_exceptions=True)

    async def _guarded(self, call: Callable[[], Awaitable[Any]]) -> Any:
        return await call()

    async def cancel(self, task: asyncio.Future[Any]) -> None:
        task.cancel()


class Once(Cancelling):
    pass


class Twice(Cancelling):
    async def cancel(self, task: asyncio.Future[Any]) -> None:
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()


class ByTimeout(Cancelling):
    async def _guarded(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(None) as self.timeout:
            return await call()

    async def cancel(self, task: asyncio.Future[Any]) -> None:
        if self.after_cycles == 0:  # the task has not come to its timeout yet
            await asyncio.sleep(0)
        self.timeout.reschedule(asyncio.get_running_loop().time())


class ByScope(Cancelling):
    async def _guarded(self, call: Callable[[], Awaitable[Any]]) -> Any:
        with anyio.CancelScope() as self.scope:
            return await call()

    async def cancel(self, task: asyncio.Future[Any]) -> None:
        if self.after_cycles == 0:
            await asyncio.sleep(0)
        self.scope.cancel()


WAYS = [Once, Twice, ByTimeout, ByScope]


# --- What is cancelled ------------------------------------------------------------------------------------------------


def decorated(layer: Any, till: Till, config: IdempotencyConfig) -> Callable[[], Coroutine[Any, Any, Any]]:
    charge = idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(till.charge)
    return lambda: charge(ORDER)


def block(layer: Any, till: Till, config: IdempotencyConfig) -> Callable[[], Coroutine[Any, Any, Any]]:
    async def call() -> Any:
        async with idempotency(ORDER, persistence_store=layer, config=config, key_prefix="charge") as execution:
            return await execution.run(till.charge, ORDER)

    return call


FORMS = [decorated, block]


def pass_time() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.pass_time_in_every_cycle(0.001)


async def settled(layer: PlannedLayer) -> None:
    """Let what still runs in the background end."""
    await asyncio.sleep(1)


def records(layer: PlannedLayer) -> list[Any]:
    return list(layer.inner.records().values())


def new_layer(kind: Callable[[], PlannedLayer], operation: str | None = None, *faults: Fault) -> PlannedLayer:
    layer = kind()
    layer.latency_seconds = 0.001
    return layer if operation is None else layer.plan(operation, *faults)


async def every_cycle(
    way: type[Cancelling],
    prepare: Callable[[], tuple[PlannedLayer, Till, Callable[[], Awaitable[Any]]]],
    check: Callable[[PlannedLayer, Till, Any], Awaitable[None]],
) -> None:
    """Cancel the call once in every turn of the loop that it lives."""
    cancelled = 0
    pass_time()
    for cycle in range(CYCLES):
        layer, till, call = prepare()
        cancelling = way(cycle)
        [ending] = await cancelling.run(call)
        await settled(layer)
        if not cancelling.was_cancelled:
            break
        cancelled += 1
        await check(layer, till, ending)
    else:
        pytest.fail("the call lived longer than it was cancelled")
    assert cancelled >= 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_call_leaves_the_key_free_or_rightly_completed(way: Any, kind: Any, form: Any) -> None:
    config = IdempotencyConfig()

    def prepare() -> Any:
        layer, till = new_layer(kind), Till()
        till.seconds = 0.001
        return layer, till, form(layer, till, config)

    finished = 0

    async def check(layer: PlannedLayer, till: Till, ending: Any) -> None:
        nonlocal finished
        found = records(layer)
        assert all(record.status is RecordStatus.COMPLETED for record in found)
        finished += bool(found)
        if found:
            assert till.charges == [ORDER]  # it was charged before anything was completed
            charged = 1
        else:
            charged = len(till.charges) + 1
        till.seconds = 0
        assert await form(layer, till, config)() == {"receipt": charged}  # at once, nobody waits for a lease

    await every_cycle(way, prepare, check)
    assert finished > 0  # it was cancelled during completion too


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_call_whose_body_fails_gives_the_key_back_though_cancelled(way: Any, kind: Any, form: Any) -> None:
    config = IdempotencyConfig()

    def prepare() -> Any:
        layer, till = new_layer(kind), Till()
        till.error = RuntimeError("declined")
        return layer, till, form(layer, till, config)

    errors = 0

    async def check(layer: PlannedLayer, till: Till, ending: Any) -> None:
        nonlocal errors
        assert not records(layer)
        errors += ending is till.error

    await every_cycle(way, prepare, check)
    assert errors > 0  # cancelled while it gave the key back: the error of the body won


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_at_most_once_leaves_a_cancelled_body_in_doubt_and_a_cancelled_claim_free(way: Any, kind: Any) -> None:
    config = IdempotencyConfig(on_abandoned="raise")

    def prepare() -> Any:
        layer, till = new_layer(kind), Till()
        till.seconds = 0.001
        return layer, till, decorated(layer, till, config)

    doubts = 0

    async def check(layer: PlannedLayer, till: Till, ending: Any) -> None:
        nonlocal doubts
        found = records(layer)
        if not till.charges:
            assert not found
        elif found[0].status is RecordStatus.INPROGRESS:
            doubts += 1
            with pytest.raises(IdempotencyInDoubtError):
                await decorated(layer, till, config)()
        assert till.charges in ([], [ORDER])

    await every_cycle(way, prepare, check)
    assert doubts > 0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_completion_that_fails_at_first_is_still_completed(way: Any, kind: Any) -> None:
    config = IdempotencyConfig()
    error = IdempotencyPersistenceConnectionError("the store went away")

    def prepare() -> Any:
        layer, till = new_layer(kind, "complete", Fault(error=error), Fault(error=error, applied=True)), Till()
        return layer, till, decorated(layer, till, config)

    completed = 0

    async def check(layer: PlannedLayer, till: Till, ending: Any) -> None:
        nonlocal completed
        if till.charges and layer.calls.count("complete"):
            completed += 1
            assert [record.status for record in records(layer)] == [RecordStatus.COMPLETED]

    await every_cycle(way, prepare, check)
    assert completed > 0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_waiter_that_is_cancelled_leaves_the_owner_and_other_waiters_alone(way: Any, kind: Any) -> None:
    waiting = IdempotencyConfig(wait_timeout_seconds=10)
    pass_time()

    for cycle in range(CYCLES):
        layer, till = new_layer(kind), Till()
        till.seconds = 0.05
        owner = asyncio.ensure_future(decorated(layer, till, waiting)())
        await asyncio.sleep(0.01)
        other = asyncio.ensure_future(decorated(layer, till, waiting)())
        cancelling = way(cycle)
        await cancelling.run(decorated(layer, till, waiting))
        assert await owner == await other == {"receipt": 1}
        if not cancelling.was_cancelled:
            break
    assert cycle >= 2


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
async def test_a_caller_cancelled_while_it_polls_a_foreign_owner_leaves_nothing(way: Any, kind: Any) -> None:
    waiting = IdempotencyConfig(wait_timeout_seconds=0.2)
    polled = 0
    pass_time()
    for cycle in range(CYCLES):
        layer, till = new_layer(kind), Till()
        foreign = other_process(layer)
        till.seconds = 5
        owner = asyncio.ensure_future(decorated(foreign, till, waiting)())
        await asyncio.sleep(0.01)
        cancelling = way(cycle)
        await cancelling.run(decorated(layer, till, waiting))
        polled += layer.calls.count("acquire") > 1
        assert await owner == {"receipt": 1}
        assert [record.status for record in records(layer)] == [RecordStatus.COMPLETED]
        if not cancelling.was_cancelled:
            break
    assert polled > 0


@pytest.mark.parametrize("kind", LAYERS)
async def test_a_store_that_never_answers_holds_a_cancelled_caller_for_a_bounded_time(kind: Any) -> None:
    layer, till = new_layer(kind, "acquire", Fault(gate=asyncio.Event())), Till()
    task = asyncio.ensure_future(decorated(layer, till, IdempotencyConfig())())
    await asyncio.sleep(1)
    started = asyncio.get_running_loop().time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.get_running_loop().time() - started == pytest.approx(5.0, abs=0.1)
    assert not till.charges


# --- What else must not happen ----------------------------------------------------------------------------------------


async def test_a_cancellation_while_the_key_is_given_back_ends_a_retry_loop() -> None:
    layer, till = PlannedLayer().plan("release", *(Fault(before_seconds=0.1) for _ in range(50))), Till()
    till.error = ValueError("declined")
    charge = made_idempotent(till.charge, layer)
    attempts = 0

    async def retry() -> None:
        nonlocal attempts
        for _ in range(50):
            attempts += 1
            try:
                await charge(ORDER)
            except ValueError:
                continue

    async def fail_soon() -> None:
        await asyncio.sleep(0.25)
        raise RuntimeError("sibling")

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(retry())
            group.create_task(fail_soon())
    assert attempts < 6


async def test_a_timeout_that_the_body_outran_leaves_no_stray_cancellation() -> None:
    layer, till = PlannedLayer().plan("release", Fault(before_seconds=0.2)), Till()
    till.error = ValueError("declined")
    with pytest.raises(ValueError, match="declined"):
        async with asyncio.timeout(0.1):
            await made_idempotent(till.charge, layer)(ORDER)
    await asyncio.sleep(1)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_that_was_withdrawn_does_not_come_back() -> None:
    layer, till = PlannedLayer().plan("release", Fault(before_seconds=0.2)), Till()
    till.error = ValueError("declined")
    cleaned_up = False

    async def swallows() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:  # its clean-up has a timeout of its own
            with pytest.raises(ValueError, match="declined"):
                async with asyncio.timeout(0.1):
                    await made_idempotent(till.charge, layer)(ORDER)
            await asyncio.sleep(1)
            cleaned_up = True
            raise

    task = asyncio.ensure_future(swallows())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned_up


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("operation", ["acquire", "complete", "release"])
async def test_nothing_spins_while_a_cancelled_scope_waits_for_a_write(kind: Any, operation: str) -> None:
    layer, till = kind().plan(operation, Fault(before_seconds=1)), Till()
    till.error = ValueError("declined") if operation == "release" else None
    loop: Any = asyncio.get_running_loop()
    select, turns = loop._selector.select, 0

    def counting(timeout: float | None = None) -> Any:
        nonlocal turns
        turns += 1
        loop.pass_time_in_every_cycle(0.0001)
        return select(timeout)

    loop._selector.select = counting
    with anyio.CancelScope() as scope:
        loop.call_later(0.1, scope.cancel)
        with contextlib.suppress(ValueError):
            await made_idempotent(till.charge, layer)(ORDER)
        await asyncio.sleep(1)
    assert scope.cancelled_caught
    assert turns < 100


WITHOUT_ANYIO = """
import asyncio, sys
from aidem import idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer

runs, begun, may_end = [], asyncio.Event(), asyncio.Event()

class Slow(MemoryPersistenceLayer):
    async def complete(self, record, *, now):
        begun.set()
        await may_end.wait()
        return await super().complete(record, now=now)

@idempotent_function(persistence_store=Slow())
async def pay(order):
    runs.append(order)
    return "paid"

async def main():
    first = asyncio.create_task(pay("o-1"))
    await begun.wait()
    for _ in range(2):
        first.cancel()
        await asyncio.sleep(0)
    assert not first.done()
    may_end.set()
    [error] = await asyncio.gather(first, return_exceptions=True)
    assert isinstance(error, asyncio.CancelledError), error
    assert await pay("o-1") == "paid"
    assert runs == ["o-1"]
    assert "anyio" not in sys.modules

asyncio.run(main())
"""


def test_a_write_outlasts_a_cancellation_where_anyio_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_ANYIO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def test_a_future_that_is_done_already_is_an_answer() -> None:
    future: UncancellableFuture[int] = UncancellableFuture(loop=asyncio.get_running_loop())
    future.settle(1)
    future.settle(2)
    future.fail(ValueError())
    with CancellationShield() as shield:
        assert await shield.wait_for(future) == 1


@pytest.mark.parametrize(("deadline", "within_seconds"), [(2.0, 5.0), (5.0, 2.0), (None, 2.0), (2.0, None)])
async def test_an_operation_that_does_not_answer_fails_at_the_earlier_of_its_limits(
    deadline: float | None, within_seconds: float | None
) -> None:
    loop = asyncio.get_running_loop()
    start, silent = loop.time(), UncancellableFuture[int](loop=loop)
    shield = CancellationShield(deadline=None if deadline is None else start + deadline)
    with pytest.raises(IdempotencyPersistenceConnectionError), shield:
        await shield.wait_for(silent, within_seconds=within_seconds)
    assert loop.time() - start == pytest.approx(2.0)


@pytest.mark.parametrize("has_failed", [False, True])
async def test_the_time_limits_of_an_operation_do_not_keep_it_when_it_has_ended(has_failed: bool) -> None:
    loop = asyncio.get_running_loop()
    future: UncancellableFuture[int] = UncancellableFuture(loop=loop)
    for limit in (1000.0, 500.0):
        future.give_up_at(loop.time() + limit)
    if has_failed:
        future.fail(ValueError())
    else:
        future.settle(1)
    kept = weakref.ref(future)
    del future
    assert kept() is None


# --- Ended otherwise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
async def test_a_coroutine_closed_while_it_acquires_releases_after_the_claim_was_applied(
    kind: Any, on_abandoned: Any
) -> None:
    layer, till = kind().plan("acquire", Fault(before_seconds=1)), Till()
    coroutine = made_idempotent(till.charge, layer, on_abandoned=on_abandoned)(ORDER)
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(3)
    assert not layer.inner.records()
    assert layer.calls == ["acquire", "release"]


def test_a_key_is_given_back_though_the_loop_shuts_down() -> None:
    layer, till = PlannedLayer(latency_seconds=0.01), Till()
    till.seconds = 60

    async def main() -> None:
        asyncio.ensure_future(made_idempotent(till.charge, layer)(ORDER))  # noqa: RUF006 - left to the shutdown
        await asyncio.sleep(0.1)
        assert layer.inner.records()

    asyncio.run(main())
    assert not layer.inner.records()


@pytest.mark.parametrize("kind", [EventKind.TAKEN_OVER, EventKind.WAITED, EventKind.CLAIMED])
@pytest.mark.parametrize("form", ["function", "block"])
async def test_an_observer_that_ends_the_program_leaves_no_claim(kind: EventKind, form: str) -> None:
    class Ending:
        def on_event(self, event: Any) -> None:
            if event.kind is kind:
                raise SystemExit

    layer, till = PlannedLayer(), Till()
    till.seconds = 100
    options: dict[str, Any] = {"lease_seconds": 5, "renew_lease": False}
    vanished = asyncio.ensure_future(made_idempotent(till.charge, other_process(layer), **options)(ORDER))
    await asyncio.sleep(1)
    config = IdempotencyConfig(wait_timeout_seconds=60, hooks=(Ending(),))
    block = idempotency(ORDER, persistence_store=layer, config=config, key_prefix="charge")
    call = made_idempotent(Till().charge, layer, wait_timeout_seconds=60, hooks=(Ending(),))
    with pytest.raises(SystemExit):
        await (block.__aenter__() if form == "block" else call(ORDER))
    assert not layer.inner.records()
    vanished.cancel()
