"""Waiting for a running execution, and taking over from one that failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyPersistenceConnectionError,
    IdempotencyValidationError,
)
from aidem.hooks import EventKind
from tests.support import VIRTUAL_TIME, Fault, Listener, PlannedLayer, Till

ORDER = {"id": 7, "amount": 10}


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def charger(layer: Any, till: Till, **options: Any) -> Any:
    config = IdempotencyConfig(event_key_jmespath="id", **options)
    return idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(till.charge)


def other_process(layer: PlannedLayer) -> PlannedLayer:
    """Return a layer of its own on the same records: nothing but the store is shared."""
    return PlannedLayer(inner=layer.inner)


async def started(call: Any) -> asyncio.Future[Any]:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.01)
    return task


async def test_without_wait_timeout_a_running_execution_is_an_error_at_once() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 1
    owner = await started(charger(layer, till)(ORDER))
    with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
        await charger(layer, till)(ORDER)
    assert caught.value.retry_after_seconds == 1.0
    assert caught.value.record is not None
    assert caught.value.key == caught.value.record.idempotency_key
    assert await owner == {"receipt": 1}


async def test_a_waiter_gets_the_result_of_the_running_execution() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 2
    owner = await started(charger(layer, till)(ORDER))
    assert await charger(other_process(layer), till, wait_timeout_seconds=5)(ORDER) == {"receipt": 1}
    assert await owner == {"receipt": 1}
    assert len(till.charges) == 1


async def test_a_waiter_gives_up_at_its_timeout() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 20
    owner = await started(charger(layer, till)(ORDER))
    loop = asyncio.get_running_loop()
    for beside in (layer, other_process(layer)):
        waiting = charger(beside, till, wait_timeout_seconds=3)
        began = loop.time()
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await waiting(ORDER)
        assert loop.time() - began == pytest.approx(3, abs=0.05)
    await owner


async def test_a_waiter_takes_over_when_the_owner_fails() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds, till.error = 2, RuntimeError("declined")
    owner = await started(charger(layer, till)(ORDER))
    succeeding = Till()
    here = await started(charger(layer, succeeding, wait_timeout_seconds=10)(ORDER))
    elsewhere = await started(charger(other_process(layer), succeeding, wait_timeout_seconds=10)(ORDER))
    with pytest.raises(RuntimeError, match="declined"):
        await owner
    assert await here == await elsewhere == {"receipt": 1}
    assert succeeding.charges == [ORDER]


async def test_a_waiter_takes_over_as_soon_as_the_lease_of_a_vanished_owner_has_passed() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 3600
    vanished = await started(charger(other_process(layer), till, lease_seconds=4, renew_lease=False)(ORDER))
    began = asyncio.get_running_loop().time()
    succeeding = Till()
    listener = Listener()
    charge = charger(layer, succeeding, wait_timeout_seconds=60, hooks=(listener,))
    assert await charge(ORDER) == {"receipt": 1}
    assert asyncio.get_running_loop().time() - began == pytest.approx(4, abs=0.05)
    assert EventKind.TAKEN_OVER in listener.kinds
    vanished.cancel()


async def test_a_waiter_beside_the_owner_takes_over_too_once_its_lease_has_passed() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 50
    owner = await started(charger(layer, till, lease_seconds=4, renew_lease=False)(ORDER))
    succeeding = Till()
    assert await charger(layer, succeeding, wait_timeout_seconds=40)(ORDER) == {"receipt": 1}
    assert await owner == {"receipt": 1}  # the loser hands out the winner's outcome
    assert len(till.charges) == len(succeeding.charges) == 1


async def test_a_thousand_callers_of_one_key_are_one_execution_and_two_requests() -> None:
    layer, till = PlannedLayer(latency_seconds=0.001), Till()
    till.seconds = 20  # long enough for a renewal
    charge = charger(layer, till, wait_timeout_seconds=60, lease_seconds=90)
    assert await asyncio.gather(*(charge(ORDER) for _ in range(1000))) == [{"receipt": 1}] * 1000
    assert layer.calls == ["acquire", "complete"]


async def test_a_thousand_callers_ask_a_foreign_owner_twenty_times_in_five_seconds_and_then_once_a_second() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 30
    owner = await started(charger(layer, till, lease_seconds=90)(ORDER))
    elsewhere = other_process(layer)
    charge = charger(elsewhere, till, wait_timeout_seconds=60)
    waiters = asyncio.gather(*(charge(ORDER) for _ in range(1000)))
    await asyncio.sleep(5)
    assert 5 <= len(elsewhere.calls) <= 20
    asked = len(elsewhere.calls)
    await asyncio.sleep(10)
    assert 5 <= len(elsewhere.calls) - asked <= 10
    assert await waiters == [await owner] * 1000


async def test_a_poller_that_gives_up_hands_its_pace_on() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 30
    owner = await started(charger(layer, till, lease_seconds=90)(ORDER))
    elsewhere = other_process(layer)
    waiters = [await started(charger(elsewhere, till, wait_timeout_seconds=1 + n)(ORDER)) for n in range(5)]
    await asyncio.sleep(5)
    assert len(elsewhere.calls) <= 25
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert {type(result) for result in results} == {IdempotencyAlreadyInProgressError}
    await owner


async def test_waiters_compare_the_payload_before_they_wait() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 20
    options: dict[str, Any] = {"wait_timeout_seconds": 60, "payload_validation_jmespath": "amount"}
    owner = await started(charger(layer, till, **options)(ORDER))
    began = asyncio.get_running_loop().time()
    for beside in (layer, other_process(layer)):
        with pytest.raises(IdempotencyValidationError):
            await charger(beside, till, **options)(ORDER | {"amount": 11})
    assert asyncio.get_running_loop().time() == began
    assert await owner == {"receipt": 1}


async def test_a_follower_with_the_stored_payload_is_not_refused_because_its_leader_has_another() -> None:
    layer, till = PlannedLayer(), Till()
    options: dict[str, Any] = {"wait_timeout_seconds": 60, "payload_validation_jmespath": "amount"}
    await charger(layer, till, **options)(ORDER)
    slow = other_process(layer).plan("acquire", Fault(before_seconds=1))
    leader = await started(charger(slow, till, **options)(ORDER | {"amount": 11}))
    follower = await started(charger(slow, till, **options)(ORDER))
    with pytest.raises(IdempotencyValidationError):
        await leader
    assert await follower == {"receipt": 1}


async def test_a_follower_gives_up_at_its_timeout_though_the_store_has_not_answered_its_leader() -> None:
    layer, till = PlannedLayer().plan("acquire", Fault(before_seconds=30)), Till()
    leader = await started(charger(layer, till, wait_timeout_seconds=60)(ORDER))
    with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
        await charger(layer, till, wait_timeout_seconds=2)(ORDER)
    assert caught.value.record is None
    assert await leader == {"receipt": 1}


async def test_followers_share_the_error_of_a_store_that_is_down() -> None:
    down = IdempotencyPersistenceConnectionError("no route")
    layer, till = PlannedLayer().plan("acquire", Fault(error=down, before_seconds=1)), Till()
    charge = charger(layer, till, wait_timeout_seconds=60)
    results = await asyncio.gather(*(charge(ORDER) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {IdempotencyPersistenceConnectionError}
    assert len({id(result) for result in results}) == 20  # an error of its own for each
    assert layer.calls.count("acquire") == 1
    assert not till.charges


async def test_a_layer_that_tells_of_changes_wakes_its_waiters() -> None:
    class Telling(PlannedLayer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.waited: list[tuple[str, float]] = []
            self.changed = asyncio.Event()

        async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
            self.waited.append((key, timeout_seconds))
            await self.changed.wait()

    layer, till = PlannedLayer(), Till()
    till.seconds = 2.2
    owner = await started(charger(layer, till)(ORDER))
    telling = Telling(inner=layer.inner)
    waiter = await started(charger(telling, till, wait_timeout_seconds=60)(ORDER))
    await owner
    assert telling.calls == ["acquire"]
    telling.changed.set()
    assert await waiter == {"receipt": 1}
    [(key, timeout_seconds)] = telling.waited
    assert key.startswith("charge#")
    assert 0 < timeout_seconds <= 1.25


@pytest.mark.parametrize("beside", [lambda layer: layer, other_process], ids=["this process", "another process"])
async def test_waiting_is_reported(beside: Any) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds = 2
    owner = await started(charger(layer, till)(ORDER))
    await charger(beside(layer), till, wait_timeout_seconds=60, hooks=(listener,))(ORDER)
    assert sorted(listener.kinds) == [EventKind.REPLAYED, EventKind.WAITED]
    await owner
