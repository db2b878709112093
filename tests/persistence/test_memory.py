from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from aidem._rules.lifecycle import Claimed
from aidem._rules.record import DataRecord
from aidem._runtime.cancellation import CancellationShield
from aidem._runtime.clock import wall_clock
from aidem.persistence import PersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock, PurgeConformance, ScanConformance, TakeOverConformance, claim_of, completed_of


class TestConformance(TakeOverConformance, ScanConformance, PurgeConformance):
    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return MemoryPersistenceLayer(clock=clock)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def layer(clock: FakeClock) -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer(clock=clock)


def claimed(layer: MemoryPersistenceLayer, key: str = "key", *, owner: str = "ours") -> DataRecord:
    now = layer.clock()
    answer = layer.acquire(claim_of(key, now=now, owner=owner), now=now).answer
    assert isinstance(answer, Claimed)
    return answer.record


def test_a_memory_layer_is_a_persistence_layer(layer: MemoryPersistenceLayer) -> None:
    assert isinstance(layer, PersistenceLayer)


def test_the_machines_clock_judges_unless_another_is_given(clock: FakeClock) -> None:
    assert MemoryPersistenceLayer().clock is wall_clock
    assert MemoryPersistenceLayer(clock=clock).clock is clock


def test_an_operation_needs_neither_a_loop_nor_a_turn_of_it(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    async def call() -> bool:
        claim = claim_of("key", now=clock())
        answer = await layer.acquire(claim, now=clock())
        assert await layer.renew(claim, now=clock()) == await layer.get("key") == answer.record
        assert await layer.complete(completed_of(answer.record, now=clock()), now=clock())
        await layer.forget("key")
        return await layer.release(answer.record)

    with pytest.raises(StopIteration) as stopped:
        call().send(None)
    assert stopped.value.value is False


def test_the_engine_is_handed_the_answer_without_a_task(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    claim = claimed(layer)
    with pytest.raises(StopIteration) as stopped:
        CancellationShield().wait_for(layer.acquire(claim, now=clock())).send(None)
    assert stopped.value.value == Claimed(claim)


async def test_the_fence_grows_over_release_within_one_millisecond(layer: MemoryPersistenceLayer) -> None:
    first = claimed(layer)
    assert await layer.release(first)
    assert claimed(layer).fence == first.fence + 1


async def test_the_fence_grows_over_a_clock_that_goes_back(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    first = claimed(layer)
    await layer.forget("key")
    clock.advance(-3600)
    second = claimed(layer)
    clock.advance(-3600)
    await layer.forget("key")
    assert first.fence < second.fence < claimed(layer).fence


async def test_a_claim_found_again_does_not_bring_the_fence_back(layer: MemoryPersistenceLayer) -> None:
    claimed(layer, "early")
    late = claimed(layer, "late")
    claimed(layer, "early")
    await layer.forget("late")
    assert claimed(layer, "late").fence > late.fence


def test_the_first_fence_is_the_time_of_the_claim_in_milliseconds(
    layer: MemoryPersistenceLayer, clock: FakeClock
) -> None:
    assert claimed(layer).fence == int(clock() * 1000)


@pytest.mark.parametrize("late_seconds", [2.5, -2.5])
async def test_what_was_asked_for_counts_from_when_it_is_done(
    layer: MemoryPersistenceLayer, clock: FakeClock, late_seconds: float
) -> None:
    asked = clock() - late_seconds
    expected = claim_of("key", now=clock())
    claim = (await layer.acquire(claim_of("key", now=asked), now=asked)).record
    assert claim.in_progress_expiry_timestamp == expected.in_progress_expiry_timestamp
    renewed = await layer.renew(claim_of("key", now=asked, lease_seconds=3), now=asked)
    assert renewed is not None
    assert renewed.in_progress_expiry_timestamp == int(clock() * 1000) + 3000
    await layer.complete(completed_of(claim, now=asked, kept_seconds=60), now=asked)
    stored = await layer.get("key")
    assert stored is not None
    assert stored.expiry_timestamp is not None
    assert 60 <= stored.expiry_timestamp - clock() <= 61


async def test_a_repeated_completion_does_not_prolong_the_window(
    layer: MemoryPersistenceLayer, clock: FakeClock
) -> None:
    claim = claimed(layer)
    assert await layer.complete(completed_of(claim, now=clock()), now=clock())
    stored = await layer.get("key")
    clock.advance(1)
    assert await layer.complete(completed_of(claim, now=clock()), now=clock())
    assert await layer.get("key") == stored


async def test_a_test_sees_what_is_stored_and_cannot_change_it(layer: MemoryPersistenceLayer) -> None:
    claim = claimed(layer)
    assert layer.records() == {"key": claim}
    layer.records().clear()
    assert await layer.get("key") == claim


def test_expired_records_do_not_pile_up(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    sizes = list[int]()
    for number in range(20_000):
        clock.advance(0.01)
        claimed(layer, f"key-{number}")
        sizes.append(len(layer.records()))
    live = 600  # kept for less than six seconds, a hundred a second
    assert live / 2 < max(sizes) < 1.3 * live


async def test_sweeping_keeps_what_has_not_expired(layer: MemoryPersistenceLayer, clock: FakeClock) -> None:
    keys = [f"key-{number}" for number in range(1000)]
    fences = [claimed(layer, key).fence for key in keys]
    for number in range(0, 1000, 2):
        await layer.forget(keys[number])  # what was to be swept may be gone
    for _ in range(1000):
        claimed(layer, "another")
    assert [layer.get(key).answer is not None for key in keys] == [False, True] * 500
    clock.advance(4.999)  # their last millisecond
    claimed(layer, "another", owner="theirs")
    for _ in range(1000):
        claimed(layer, "another", owner="theirs")
    assert [record.fence for key in keys if (record := layer.get(key).answer)] == fences[1::2]


async def test_records_stay_when_the_layer_is_closed(layer: MemoryPersistenceLayer) -> None:
    async with layer as opened:
        assert opened is layer
        claim = claimed(layer)
    assert await layer.get("key") == claim


class HaltingClock(FakeClock):
    """Lets another thread try to get through while it is asked for the first time, in the middle of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.passed = threading.Event()
        self.was_passed = False

    def __call__(self) -> float:
        if not self.asked.is_set():
            self.asked.set()
            self.was_passed = self.passed.wait(timeout=0.1)
        return super().__call__()


OPERATIONS: dict[str, Callable[[MemoryPersistenceLayer, DataRecord, float], object]] = {
    "acquire": lambda layer, record, now: layer.acquire(record, now=now),
    "complete": lambda layer, record, now: layer.complete(completed_of(record, now=now), now=now),
    "renew": lambda layer, record, now: layer.renew(record, now=now),
    "release": lambda layer, record, now: layer.release(record),
    "get": lambda layer, record, now: layer.get(record.idempotency_key),
    "forget": lambda layer, record, now: layer.forget(record.idempotency_key),
}
JUDGING = ["acquire", "complete", "renew"]


@pytest.mark.parametrize("first", JUDGING)
@pytest.mark.parametrize("second", OPERATIONS)
def test_no_other_thread_gets_between_look_up_and_write(first: str, second: str) -> None:
    clock = HaltingClock()
    layer = MemoryPersistenceLayer(clock=clock)
    now = FakeClock()()

    def interfere() -> None:
        clock.asked.wait()
        OPERATIONS[second](layer, claim_of("key", now=now, owner="theirs"), now)
        clock.passed.set()

    thread = threading.Thread(target=interfere)
    thread.start()
    OPERATIONS[first](layer, claim_of("key", now=now), now)
    thread.join()
    assert clock.passed.is_set()
    assert not clock.was_passed
