"""Cancelled at every await of every path: the key is never stuck, and never falsely completed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aidem import IdempotencyConfig, RecordStatus, idempotency, idempotent_function
from aidem.exceptions import IdempotencyInDoubtError, IdempotencyPersistenceConnectionError
from tests.support.planned import VIRTUAL_TIME, Fault, PlannedLayer, SettlingLayer, Till, VirtualTimeLoop

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
LAYERS = [PlannedLayer, SettlingLayer]


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
    return list(layer.inner._records.values())


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
        till.seconds = 0.3
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
        foreign = PlannedLayer(inner=layer.inner)  # another process: a layer of its own on the same records
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
