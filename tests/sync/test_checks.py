"""A check from blocking code: a plain one in the calling thread, an async one on the background loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aidem import AbandonedExecution, DidNotHappen, Happened, IdempotencyConfig, StillUnknown, sync
from aidem._runtime import background_loop
from aidem._runtime.background_loop import BackgroundStep
from aidem.exceptions import IdempotencyInDoubtError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import PlannedLayer, real_now

Charge = Callable[[], Any]


@pytest.fixture(autouse=True)
def _fresh_loop() -> Iterator[None]:
    sync.close()
    yield
    sync.close()


def charge_in_doubt(layer: Any, check: Any, **options: Any) -> tuple[Charge, list[str]]:
    """Return a function whose first execution was broken off, and what it runs."""
    ran: list[str] = []
    config = IdempotencyConfig(on_abandoned=check, **options)

    @sync.idempotent_function(persistence_store=layer, config=config, key_prefix="charge")
    def charge() -> dict[str, int]:
        ran.append(threading.current_thread().name)
        if len(ran) == 1:
            raise SystemExit
        return {"receipt": len(ran)}

    with pytest.raises(SystemExit):
        charge()
    return charge, ran


def lease_end_of(layer: MemoryPersistenceLayer) -> Any:
    [record] = layer.records().values()
    return record.lease_expiry_timestamp


def test_a_plain_check_runs_in_the_calling_thread_and_an_async_one_on_the_background_loop() -> None:
    asked: list[tuple[str, Any]] = []

    def plain(abandoned: AbandonedExecution) -> Any:
        asked.append((threading.current_thread().name, abandoned.payload))
        return DidNotHappen()

    async def asynchronous(abandoned: AbandonedExecution) -> Any:
        return plain(abandoned)

    async def later(abandoned: AbandonedExecution) -> Any:
        asked.append((threading.current_thread().name, abandoned.payload))
        return Happened({"receipt": 9})

    here = threading.current_thread().name
    for check, thread, answer in (
        (plain, here, {"receipt": 2}),
        (asynchronous, "aidem.sync", {"receipt": 2}),
        (lambda abandoned: later(abandoned), "aidem.sync", {"receipt": 9}),  # noqa: PLW0108 - not an async function itself
    ):
        asked.clear()
        charge, _ = charge_in_doubt(MemoryPersistenceLayer(), check)
        assert charge() == answer
        assert charge() == answer
        assert asked == [(thread, {})]


def test_the_claim_is_renewed_while_a_plain_check_blocks_its_thread() -> None:
    layer = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now)

    def check(_: AbandonedExecution) -> Any:
        while layer.calls.count("renew") < 3:
            time.sleep(0.01)
        return Happened({"receipt": 9})

    charge, ran = charge_in_doubt(layer, check, lease_seconds=1.5)
    layer.calls.clear()
    assert charge() == {"receipt": 9}
    assert len(ran) == 1


def test_a_block_asks_a_plain_check_in_its_thread() -> None:
    layer = MemoryPersistenceLayer()
    config = IdempotencyConfig(on_abandoned=lambda _: Happened(threading.current_thread().name))
    with pytest.raises(SystemExit), sync.idempotency("o-1", persistence_store=layer, config=config):
        raise SystemExit
    with sync.idempotency("o-1", persistence_store=layer, config=config) as execution:
        assert execution.replayed
    assert execution.result == threading.current_thread().name


def test_a_plain_check_that_raises_is_the_cause() -> None:
    error = ValueError("the bank is closed")

    def check(_: AbandonedExecution) -> Any:
        raise error

    layer = MemoryPersistenceLayer()
    charge, ran = charge_in_doubt(layer, check)
    with pytest.raises(IdempotencyInDoubtError) as caught:
        charge()
    assert caught.value.__cause__ is error
    assert lease_end_of(layer) == 0
    assert len(ran) == 1


def test_an_interrupt_of_a_plain_check_puts_the_claim_back_before_it_is_raised() -> None:
    def check(_: AbandonedExecution) -> Any:
        raise KeyboardInterrupt

    layer = MemoryPersistenceLayer()
    charge, ran = charge_in_doubt(layer, check)
    with pytest.raises(KeyboardInterrupt):
        charge()
    assert lease_end_of(layer) == 0
    assert len(ran) == 1


def test_an_interrupt_just_before_the_check_is_begun_puts_the_claim_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MemoryPersistenceLayer()
    charge, ran = charge_in_doubt(layer, lambda _: StillUnknown())
    take = BackgroundStep._take_errand
    interrupts: list[type[BaseException]] = [KeyboardInterrupt]

    def interrupted(self: BackgroundStep[Any]) -> Any:
        if interrupts:
            raise interrupts.pop()
        return take(self)

    monkeypatch.setattr(BackgroundStep, "_take_errand", interrupted)
    with pytest.raises(KeyboardInterrupt):
        charge()
    assert lease_end_of(layer) == 0
    assert len(ran) == 1


def test_an_answer_that_comes_after_the_coroutine_has_gone_on_is_dropped() -> None:
    may_answer = threading.Event()

    async def ask_in_vain() -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(background_loop.in_waiting_thread(lambda: may_answer.wait(10)), 0.01)
        may_answer.set()
        return "gone on"

    assert background_loop.run(ask_in_vain) == "gone on"
    assert background_loop.run(lambda: background_loop.in_waiting_thread(lambda: "still works")) == "still works"
