"""What a handler leaves behind is ended before its call returns; in between nothing runs."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import PlannedLayer

HOUR = 3600.0


@dataclass
class Context:
    remaining_ms: int

    def get_remaining_time_in_millis(self) -> int:
        return self.remaining_ms


@pytest.fixture(autouse=True)
def _fresh_loops() -> Iterator[None]:
    yield
    lambda_loop.close()


@pytest.fixture
def said() -> list[str]:
    return []


@lambda_handler
async def nothing(event: None, context: None) -> float:
    await asyncio.sleep(0)
    return asyncio.get_running_loop().time()


@pytest.fixture
def kept_alive() -> list[Any]:
    """Hold tasks, as asyncio holds them weakly."""
    return []


# --- Tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
def test_a_task_is_cancelled_and_its_clean_up_awaited(
    said: list[str], caplog: pytest.LogCaptureFixture, kept_alive: list[Any]
) -> None:
    async def leave() -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            await asyncio.sleep(2)
            said.append("cleaned up")

    @lambda_handler
    async def handler(event: None, context: None) -> str:
        kept_alive.append(asyncio.create_task(leave()))
        await asyncio.sleep(0)
        return "answer"

    assert handler(None, None) == "answer"
    assert said == ["cleaned up"]
    assert caplog.records == []


@pytest.mark.usefixtures("virtual_time")
def test_a_task_is_ended_after_an_exception_too(said: list[str], kept_alive: list[Any]) -> None:
    async def leave() -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            said.append("cleaned up")

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        kept_alive.append(asyncio.create_task(leave()))
        await asyncio.sleep(0)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        handler(None, None)
    assert said == ["cleaned up"]


@pytest.mark.usefixtures("virtual_time")
def test_a_task_that_another_left_when_it_was_cancelled_is_ended_as_well(
    said: list[str], kept_alive: list[Any]
) -> None:
    async def leave(name: str, then: Callable[[], Any] = lambda: None) -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            said.append(name)
            then()

    def start_second() -> None:
        kept_alive.append(asyncio.create_task(leave("second")))

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        kept_alive.append(asyncio.create_task(leave("first", start_second)))
        await asyncio.sleep(0)

    handler(None, None)
    assert said[0] == "first"
    assert all(task.done() for task in kept_alive)


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("remaining_ms", [4_000, 800])
def test_a_task_that_does_not_end_is_logged_and_does_not_go_on_in_the_next_call(
    remaining_ms: int, said: list[str], caplog: pytest.LogCaptureFixture, kept_alive: list[Any]
) -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                said.append("no")
            else:
                said.append("still here")

    @lambda_handler
    async def handler(event: None, context: Context) -> asyncio.AbstractEventLoop:
        kept_alive.append(asyncio.create_task(stubborn()))
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    started_at = nothing(None, None)
    loop = handler(None, Context(remaining_ms))
    assert loop.time() - started_at < remaining_ms / 1000, "it has waited for so long that Lambda gets no answer"
    assert "stubborn" in caplog.text
    assert "its event loop is given up" in caplog.text
    assert loop.is_closed()
    heard = list(said)
    assert "no" in heard
    nothing(None, None)
    assert said == heard
    kept_alive.clear()
    gc.collect()  # now, as asyncio has something to say about it


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(("remaining_ms", "seconds"), [(None, 6.0), (900_000, 6.0), (3_000, 1.5)])
def test_what_is_left_gets_some_seconds_and_at_most_half_of_the_time_that_lambda_leaves(
    remaining_ms: int | None, seconds: float, said: list[str], kept_alive: list[Any]
) -> None:
    async def leave() -> None:
        try:
            await asyncio.sleep(HOUR)
        finally:
            await asyncio.sleep(seconds - 0.01)
            said.append("in time")

    @lambda_handler
    async def handler(event: None, context: Context | None) -> None:
        kept_alive.append(asyncio.create_task(leave()))
        await asyncio.sleep(0)

    handler(None, None if remaining_ms is None else Context(remaining_ms))
    assert said == ["in time"]


# --- Claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
def test_a_call_that_nobody_awaits_gives_its_key_back_before_the_handler_returns(kept_alive: list[Any]) -> None:
    layer = PlannedLayer()

    @idempotent_function(persistence_store=layer)
    async def charge(order: int) -> int:
        await asyncio.sleep(HOUR)
        return order

    @lambda_handler
    async def handler(event: int, context: None) -> None:
        kept_alive.append(asyncio.create_task(charge(event)))
        await asyncio.sleep(1)

    handler(1, None)
    assert layer.calls[0] == "acquire"
    assert layer.calls[-1] == "release"


@pytest.mark.usefixtures("virtual_time")
def test_an_outcome_that_is_being_written_is_written(kept_alive: list[Any]) -> None:
    layer = PlannedLayer(latency_seconds=2.0)

    @idempotent_function(persistence_store=layer, key_prefix="charge")
    async def charge(order: int) -> int:
        return order * 10

    @lambda_handler
    async def handler(event: int, context: None) -> None:
        kept_alive.append(asyncio.create_task(charge(event)))
        await asyncio.sleep(3)
        assert layer.calls == ["acquire", "complete"]

    @idempotent_function(persistence_store=layer, key_prefix="charge")
    async def look(order: int) -> int:
        raise AssertionError("it has run before")

    @lambda_handler
    async def other_handler(event: int, context: None) -> int:
        return await look(event)

    handler(1, None)
    assert other_handler(1, None) == 10


def test_no_claim_is_renewed_between_two_calls() -> None:
    layer = PlannedLayer(inner=MemoryPersistenceLayer(), clock=time.time)
    held = asyncio.Event()

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(lease_seconds=0.9))
    async def charge(order: int) -> None:
        while layer.calls.count("renew") < 2:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.01)

    @lambda_handler
    async def handler(event: int, context: None) -> None:
        await charge(event)
        held.set()

    handler(1, None)
    assert held.is_set()
    calls = list(layer.calls)
    time.sleep(0.5)  # the environment is not even frozen
    assert layer.calls == calls
    nothing(None, None)
    assert layer.calls == calls


def test_a_timer_of_one_call_does_not_fire_before_the_next(said: list[str]) -> None:
    @lambda_handler
    async def handler(event: None, context: None) -> None:
        asyncio.get_running_loop().call_later(0.01, said.append, "fired")

    handler(None, None)
    time.sleep(0.05)
    assert said == []


# --- Async generators -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("virtual_time")
def test_an_async_generator_that_was_dropped_is_closed_and_its_clean_up_not_cut_short(said: list[str]) -> None:
    async def rows() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(1)
            said.append("closed")

    @lambda_handler
    async def handler(event: None, context: None) -> int:
        async for row in rows():
            return row
        raise AssertionError

    assert handler(None, None) == 1
    assert said == ["closed"]


@pytest.mark.usefixtures("virtual_time")
def test_a_task_that_waits_for_the_next_item_of_an_async_generator_is_cancelled_like_others(
    said: list[str], caplog: pytest.LogCaptureFixture, kept_alive: list[Any]
) -> None:
    async def rows() -> AsyncGenerator[int]:
        try:
            await asyncio.sleep(HOUR)
            yield 1
        finally:
            said.append("closed")

    @lambda_handler
    async def handler(event: None, context: None) -> asyncio.AbstractEventLoop:
        kept_alive.append(asyncio.ensure_future(anext(rows())))
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    loop = handler(None, None)
    assert said == ["closed"]
    assert caplog.records == []
    assert not loop.is_closed()


@pytest.mark.usefixtures("virtual_time")
def test_an_async_generator_that_is_held_stays_open_until_its_loop_is_closed(said: list[str]) -> None:
    async def client() -> AsyncGenerator[int]:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(1)
            said.append("closed")

    held = client()

    @lambda_handler
    async def handler(event: None, context: None) -> int:
        return await anext(held)

    assert [handler(None, None), handler(None, None)] == [1, 1]
    assert said == []
    lambda_loop.close()
    assert said == ["closed"]


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_work_in_a_thread_is_waited_for(
    said: list[str], kept_alive: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        said.append("done")

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        kept_alive.append(asyncio.get_running_loop().run_in_executor(None, work))
        begun.wait()

    handler(None, None)
    assert said == ["done"]
    assert caplog.records == []


def test_work_that_has_not_begun_is_dropped(said: list[str], kept_alive: list[Any]) -> None:
    go_on = threading.Event()

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        loop = asyncio.get_running_loop()
        kept_alive.extend(loop.run_in_executor(None, go_on.wait) for _ in range(100))  # more than there are threads
        dropped = loop.run_in_executor(None, said.append, "begun")
        dropped.add_done_callback(lambda _: go_on.set())

    handler(None, None)
    assert said == []


@pytest.mark.usefixtures("virtual_time")
def test_a_thread_that_does_not_end_is_logged_and_the_loop_goes_on(
    caplog: pytest.LogCaptureFixture, kept_alive: list[Any]
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()

    @lambda_handler
    async def handler(event: None, context: None) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        kept_alive.append(loop.run_in_executor(None, work))
        begun.wait()
        return loop

    @lambda_handler
    async def later_handler(event: None, context: None) -> None:
        pass

    try:
        loop = handler(None, None)
        ended_at = loop.time()
        later_handler(None, None)
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (logging.WARNING, "1 threads go on although their call has ended")
        ]
        assert loop.time() == pytest.approx(ended_at), "later calls do not wait for it again"
        assert not loop.is_closed()
    finally:
        go_on.set()
