"""Ctrl-C and SIGTERM during a handler: it is cancelled and gives its key back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from aidem import idempotent, idempotent_function
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler, process_batch
from tests.support.planned import PlannedLayer

HOUR = 3600.0
SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Let SIGTERM do what it does by default: tools that measure this process may handle it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)
    lambda_loop.close()


@pytest.fixture
def layer() -> PlannedLayer:
    return PlannedLayer()


def handler_that_is_interrupted(layer: PlannedLayer, *numbers: signal.Signals) -> Any:
    @lambda_handler
    @idempotent(persistence_store=layer, key_prefix="handler")
    async def handler(event: int, context: None) -> None:
        for number in numbers:
            signal.raise_signal(number)
        await asyncio.sleep(HOUR)

    return handler


@lambda_handler
async def nothing(event: None, context: None) -> None:
    pass


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_an_interrupt_cancels_the_handler_which_gives_its_key_back(
    number: signal.Signals, error: type[BaseException], layer: PlannedLayer
) -> None:
    with pytest.raises(error):
        handler_that_is_interrupted(layer, number)(1, None)
    assert layer.calls == ["acquire", "release"]
    assert nothing(None, None) is None


@pytest.mark.parametrize("attempt", range(30))  # there is a moment in which a signal wakes nobody by itself
def test_an_interrupt_wakes_a_handler_that_waits(attempt: int) -> None:
    is_about_to_wait = threading.Event()

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        asyncio.get_running_loop().call_soon(is_about_to_wait.set)
        await asyncio.sleep(30)  # what wakes it otherwise

    def interrupt() -> None:
        is_about_to_wait.wait()
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    thread = threading.Thread(target=interrupt)
    started_at = time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        handler(None, None)
    thread.join()
    assert time.monotonic() - started_at < 20


@pytest.mark.usefixtures("virtual_time")
def test_sigterm_leaves_with_the_code_that_shells_expect(layer: PlannedLayer) -> None:
    with pytest.raises(SystemExit) as caught:
        handler_that_is_interrupted(layer, signal.SIGTERM)(1, None)
    assert caught.value.code == 128 + signal.SIGTERM


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_a_second_interrupt_does_not_wait_and_the_key_is_given_back_too(
    number: signal.Signals, error: type[BaseException], layer: PlannedLayer
) -> None:
    loops = []

    @lambda_handler
    @idempotent(persistence_store=layer, key_prefix="handler")
    async def handler(event: int, context: None) -> None:
        loops.append(asyncio.get_running_loop())
        loops[0].call_later(1, signal.raise_signal, number)
        loops[0].call_later(2, signal.raise_signal, number)
        try:
            await asyncio.sleep(HOUR)
        finally:
            await asyncio.sleep(HOUR)

    with pytest.raises(error):
        handler(1, None)
    assert loops[0].time() < 1000 + HOUR
    assert layer.calls == ["acquire", "release"]
    assert nothing(None, None) is None


@pytest.mark.usefixtures("virtual_time")
def test_a_third_interrupt_does_not_wait_for_the_clean_up_and_the_loop_is_given_up(layer: PlannedLayer) -> None:
    loops = []

    @lambda_handler
    async def handler(event: int, context: None) -> None:
        loops.append(asyncio.get_running_loop())
        for at in (1.0, 2.0, 2.5):
            loops[0].call_later(at, signal.raise_signal, signal.SIGINT)
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3)

    with pytest.raises(KeyboardInterrupt):
        handler(1, None)
    assert loops[0].is_closed()
    assert nothing(None, None) is None


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_an_interrupt_that_the_handler_outlives_is_not_lost(number: signal.Signals, error: type[BaseException]) -> None:
    @lambda_handler
    async def handler(event: None, context: None) -> str:
        signal.raise_signal(number)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(HOUR)
        return "done all the same"

    with pytest.raises(error):
        handler(None, None)


@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_signals_mean_what_they_meant_before_once_the_call_is_over(
    number: signal.Signals, error: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    nothing(None, None)
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("virtual_time")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_somebody_else_handles_is_left_to_them(number: signal.Signals, layer: PlannedLayer) -> None:
    class Theirs(BaseException):
        pass

    def theirs(number: int, frame: Any) -> None:
        raise Theirs

    before = signal.signal(number, theirs)
    try:
        with pytest.raises(Theirs):
            handler_that_is_interrupted(layer, number)(1, None)
    finally:
        signal.signal(number, before)
    assert layer.calls == ["acquire", "release"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_handler_itself_begins_to_handle_is_left_to_it_from_then_on(number: signal.Signals) -> None:
    heard = list[int]()

    @lambda_handler
    async def handler(event: bool, context: None) -> None:
        if event:
            asyncio.get_running_loop().add_signal_handler(number, heard.append, number)
        signal.raise_signal(number)
        await asyncio.sleep(0.01)

    before = signal.getsignal(number)
    try:
        handler(True, None)
        handler(False, None)
    finally:
        lambda_loop.close()  # and with the loop what it handles
        signal.signal(number, before)
    assert heard == [number, number]


@pytest.mark.usefixtures("virtual_time")
def test_in_a_forked_child_an_interrupt_does_what_it_does_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = list[Any]()

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        tasks.append(asyncio.current_task())
        with monkeypatch.context() as child, pytest.raises(KeyboardInterrupt):
            child.setattr(os, "getpid", lambda: -1)
            signal.raise_signal(signal.SIGINT)

    handler(None, None)
    assert tasks[0].cancelling() == 0


@pytest.mark.usefixtures("virtual_time")
def test_an_exit_that_stops_the_loop_gives_the_key_back(layer: PlannedLayer) -> None:
    def leave() -> None:
        raise SystemExit(3)

    @lambda_handler
    @idempotent(persistence_store=layer, key_prefix="handler")
    async def handler(event: int, context: None) -> None:
        asyncio.get_running_loop().call_later(1, leave)  # as a handler of signals does while the loop waits
        await asyncio.sleep(HOUR)

    with pytest.raises(SystemExit):
        handler(1, None)
    assert layer.calls == ["acquire", "release"]
    assert nothing(None, None) is None


@pytest.mark.usefixtures("virtual_time")
def test_an_exit_in_the_handler_is_raised_and_asyncio_has_nothing_to_say(
    layer: PlannedLayer, caplog: pytest.LogCaptureFixture
) -> None:
    @lambda_handler
    @idempotent(persistence_store=layer, key_prefix="handler")
    async def handler(event: int, context: None) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        handler(1, None)
    assert layer.calls == ["acquire", "release"]
    del caught
    gc.collect()
    assert caplog.records == []


@pytest.mark.usefixtures("virtual_time")
def test_an_exit_in_a_record_of_a_batch_is_raised_and_asyncio_has_nothing_to_say(
    layer: PlannedLayer, caplog: pytest.LogCaptureFixture
) -> None:
    @idempotent_function(persistence_store=layer)
    async def charge(record: dict[str, Any]) -> None:
        raise SystemExit(3)

    @lambda_handler
    async def handler(event: Any, context: None) -> Any:
        return await process_batch(event, charge)

    record = {"eventSource": "aws:kinesis", "kinesis": {"sequenceNumber": "1"}}
    with pytest.raises(SystemExit) as caught:
        handler({"Records": [record]}, None)
    assert layer.calls == ["acquire", "release"]
    del caught
    gc.collect()
    assert caplog.records == []


@pytest.mark.usefixtures("virtual_time")
def test_other_threads_hear_of_no_signals_and_change_nothing() -> None:
    seen = []

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=handler, args=(None, None))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
