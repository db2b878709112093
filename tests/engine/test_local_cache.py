"""`use_local_cache`: completed records in memory, so that a replay asks no store."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aidem import IdempotencyConfig, RecordStatus, idempotency, idempotent_function
from aidem._engine.shared import LocalCache
from aidem._rules.record import DataRecord
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock
from tests.support.planned import Listener, PlannedLayer, Till


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def layer(clock: FakeClock) -> PlannedLayer:
    return PlannedLayer(inner=MemoryPersistenceLayer(clock=clock), clock=clock)


def charger(layer: Any, till: Till, **settings: Any) -> Any:
    options: dict[str, Any] = {
        "use_local_cache": True,
        "event_key_jmespath": "id",
        "expires_after_seconds": 60,
    } | settings
    config = IdempotencyConfig(**options)
    return idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="charge"
    )(till.charge)


async def test_a_cached_replay_asks_no_store(layer: PlannedLayer) -> None:
    till, listener = Till(), Listener()
    charge = charger(layer, till, hooks=(listener,))
    assert [await charge({"id": 1}) for _ in range(3)] == [{"receipt": 1}] * 3
    assert layer.calls == ["acquire", "complete"]
    assert listener.kinds == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.REPLAYED, EventKind.REPLAYED]


async def test_without_the_setting_every_replay_asks_the_store(layer: PlannedLayer) -> None:
    charge = charger(layer, Till(), use_local_cache=False)
    for _ in range(3):
        await charge({"id": 1})
    assert layer.calls == ["acquire", "complete", "acquire", "acquire"]


async def test_a_replay_from_the_store_is_cached_too(layer: PlannedLayer, clock: FakeClock) -> None:
    till = Till()
    await charger(layer, till)({"id": 1})
    elsewhere = PlannedLayer(inner=layer.inner, clock=clock)
    charge = charger(elsewhere, till)
    assert [await charge({"id": 1}) for _ in range(3)] == [{"receipt": 1}] * 3
    assert elsewhere.calls == ["acquire"]


async def test_a_cached_record_ends_with_its_window(layer: PlannedLayer, clock: FakeClock) -> None:
    charge = charger(layer, Till())
    await charge({"id": 1})
    clock.advance(60)
    assert await charge({"id": 1}) == {"receipt": 1}
    clock.advance(1)
    assert await charge({"id": 1}) == {"receipt": 2}


async def test_every_caller_gets_an_object_of_its_own(layer: PlannedLayer) -> None:
    charge = charger(layer, Till())
    for _ in range(3):
        result = await charge({"id": 1})
        assert result == {"receipt": 1}
        result["receipt"] = "changed"


async def test_another_payload_is_refused_from_the_cache(layer: PlannedLayer) -> None:
    charge = charger(layer, till := Till(), payload_validation_jmespath="amount")
    await charge({"id": 1, "amount": 5})
    with pytest.raises(IdempotencyValidationError):
        await charge({"id": 1, "amount": 6})
    assert layer.calls == ["acquire", "complete"]
    assert await charge({"id": 1, "amount": 5}) == {"receipt": 1}
    assert len(till.charges) == 1


async def test_another_payload_is_refused_before_anything_is_cached(layer: PlannedLayer, clock: FakeClock) -> None:
    till = Till()
    await charger(layer, till, payload_validation_jmespath="amount")({"id": 1, "amount": 5})
    elsewhere = PlannedLayer(inner=layer.inner, clock=clock)
    with pytest.raises(IdempotencyValidationError):
        await charger(elsewhere, till, payload_validation_jmespath="amount")({"id": 1, "amount": 6})
    await charger(elsewhere, till)({"id": 1, "amount": 6})
    assert elsewhere.calls == ["acquire", "acquire"]


async def test_a_running_execution_is_never_cached(layer: PlannedLayer) -> None:
    started, gate = asyncio.Event(), asyncio.Event()

    class Slow(Till):
        async def charge(self, order: Any) -> Any:
            started.set()
            await gate.wait()
            return await super().charge(order)

    charge = charger(layer, Slow())
    task = asyncio.ensure_future(charge({"id": 1}))
    await started.wait()
    for _ in range(2):
        with pytest.raises(IdempotencyAlreadyInProgressError):
            await charge({"id": 1})
    assert layer.calls == ["acquire"] * 3
    gate.set()
    assert await task == {"receipt": 1}
    assert await charge({"id": 1}) == {"receipt": 1}
    assert layer.calls == [*["acquire"] * 3, "complete"]


async def test_a_failed_execution_is_not_cached(layer: PlannedLayer) -> None:
    till = Till()
    till.error = LookupError()
    charge = charger(layer, till)
    with pytest.raises(LookupError):
        await charge({"id": 1})
    till.error = None
    assert await charge({"id": 1}) == {"receipt": 2}


async def test_outcomes_that_are_no_results_are_cached_and_stay_what_they_are(layer: PlannedLayer) -> None:
    till = Till()
    till.error = LookupError("declined")
    charge = charger(layer, till, stored_exceptions=(LookupError,))
    for _ in range(2):
        with pytest.raises(LookupError, match="declined"):
            await charge({"id": 1})

    async def unstorable(order: Any) -> object:
        return object()

    config = IdempotencyConfig(use_local_cache=True)
    function = idempotent_function(persistence_store=layer, config=config)(unstorable)
    with pytest.warns(IdempotencyWarning):
        await function(1)
    with pytest.raises(IdempotencyResultUnavailableError):
        await function(1)
    assert layer.calls == ["acquire", "complete"] * 2


async def test_the_least_recently_used_record_makes_room(layer: PlannedLayer) -> None:
    charge = charger(layer, Till(), local_cache_max_items=2)
    for key in (1, 2, 1, 3):  # 2 is the one that was not used for longest
        await charge({"id": key})
    layer.calls.clear()
    await charge({"id": 1})
    await charge({"id": 3})
    assert layer.calls == []
    await charge({"id": 2})
    assert layer.calls == ["acquire"]


async def test_functions_and_blocks_on_one_layer_share_it_and_mix_nothing_up(layer: PlannedLayer) -> None:
    config = IdempotencyConfig(use_local_cache=True)

    async def name(name: str) -> str:
        return name

    one, two = (
        idempotent_function(persistence_store=layer, config=config, key_prefix=prefix)(name) for prefix in ("a", "b")
    )
    assert [await one("x"), await two("y"), await one("x"), await two("y")] == ["x", "y", "x", "y"]
    for _ in range(2):
        async with idempotency("x", persistence_store=layer, config=config) as execution:
            assert await execution.run(name, "block") == "block"
    assert len(layer.calls) == 6


async def test_layers_share_no_cache(clock: FakeClock) -> None:
    till = Till()
    layers = [MemoryPersistenceLayer(clock=clock) for _ in range(2)]
    assert [await charger(layer, till)({"id": 1}) for layer in layers] == [{"receipt": 1}, {"receipt": 2}]


async def test_the_response_hook_sees_replays_from_the_cache(layer: PlannedLayer) -> None:
    charge = charger(layer, Till(), response_hook=lambda response, record: [response, record.status])
    await charge({"id": 1})
    assert await charge({"id": 1}) == [{"receipt": 1}, RecordStatus.COMPLETED]


# --- The cache itself -------------------------------------------------------------------------------------------------


def record(key: Any, status: RecordStatus = RecordStatus.COMPLETED, **fields: Any) -> DataRecord:
    return DataRecord(idempotency_key=str(key), status=status, **fields)


def test_a_claim_is_not_kept() -> None:
    cache = LocalCache()
    cache.put(record("key", RecordStatus.INPROGRESS), max_items=5)
    assert cache.get("key", now=0) is None


def test_an_expired_record_is_dropped() -> None:
    cache = LocalCache()
    cache.put(record("key", expiry_timestamp=10), max_items=5)
    assert cache.get("key", now=10) == record("key", expiry_timestamp=10)
    assert cache.get("key", now=11) is None
    assert cache.get("key", now=10) is None


def test_a_newer_record_takes_the_place_of_an_older_one_and_is_the_youngest() -> None:
    cache = LocalCache()
    for key in (1, 2, 1, 3):
        cache.put(record(key), max_items=2)
    assert [cache.get(str(key), now=0) is not None for key in (1, 2, 3)] == [True, False, True]


def test_a_record_that_was_looked_up_is_younger_than_one_that_was_not() -> None:
    cache = LocalCache()
    for key in (1, 2):
        cache.put(record(key), max_items=2)
    cache.get("1", now=0)
    cache.put(record(3), max_items=2)
    assert [cache.get(str(key), now=0) is not None for key in (1, 2, 3)] == [True, False, True]


def test_threads_may_share_it() -> None:
    cache = LocalCache()
    barrier = threading.Barrier(4)

    def work(thread: int) -> int:
        barrier.wait()
        for step in range(2000):
            cache.put(record((thread + step) % 7, expiry_timestamp=step % 3), max_items=3)
            cache.get(str(step % 7), now=1)
        return len(cache._records)

    with ThreadPoolExecutor(4) as pool:
        assert all(size <= 3 for size in pool.map(work, range(4)))
