"""`lambda_handler`: the plain function, its loop, its context, and layers that are opened early."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest

from aidem import IdempotencyConfig, current_execution, idempotent, idempotent_function
from aidem._runtime import lambda_loop
from aidem._runtime.lambda_lifecycle import WARM_SECONDS
from aidem.awslambda import lambda_handler
from aidem.config import current_lambda_context
from aidem.exceptions import IdempotencyConfigError, IdempotencyPersistenceConnectionError, IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import PlannedLayer

CONFIG = IdempotencyConfig()


@dataclass
class Context:
    """As much of Lambda's context as is read."""

    remaining_ms: int = 60_000

    def get_remaining_time_in_millis(self) -> int:
        return self.remaining_ms


@pytest.fixture(autouse=True)
def _fresh_loops() -> Iterator[None]:
    yield
    lambda_loop.close()


# --- The function -----------------------------------------------------------------------------------------------------


@lambda_handler
async def echo(event: dict[str, int], context: Context | None) -> list[Any]:
    """Say what it got."""
    await asyncio.sleep(0)
    return [event, context]


def test_an_async_handler_becomes_a_plain_function() -> None:
    context = Context()
    assert echo({"a": 1}, context) == [{"a": 1}, context]
    assert not inspect.iscoroutinefunction(echo)


def test_name_docstring_and_signature_survive() -> None:
    assert (echo.__name__, echo.__qualname__, echo.__module__) == ("echo", "echo", __name__)
    assert echo.__doc__ == "Say what it got."
    assert list(inspect.signature(echo).parameters) == ["event", "context"]
    assert inspect.iscoroutinefunction(inspect.unwrap(echo))


def test_callable_objects_and_partials_may_be_handlers() -> None:
    class Handler:
        async def __call__(self, event: int, context: None) -> int:
            return event + 1

    async def add(more: int, event: int, context: None) -> int:
        return event + more

    assert lambda_handler(Handler())(1, None) == 2
    assert lambda_handler(functools.partial(add, 5))(1, None) == 6


def test_an_idempotent_handler_runs_once() -> None:
    layer, effects = MemoryPersistenceLayer(), []

    @lambda_handler
    @idempotent(persistence_store=layer)
    async def handler(event: dict[str, int], context: None) -> int:
        effects.append(event)
        return len(effects)

    assert [handler({"a": 1}, None), handler({"a": 1}, None), handler({"a": 2}, None)] == [1, 1, 2]


def test_an_exception_of_the_handler_is_raised_as_it_is() -> None:
    error = ValueError("no")

    @lambda_handler
    async def handler(event: None, context: None) -> None:
        raise error

    with pytest.raises(ValueError, match=r"^no$") as caught:
        handler(None, None)
    assert caught.value is error


@pytest.mark.parametrize("handler", [len, lambda event, context: None, 3, pytest.param(dict, id="class")])
def test_a_plain_handler_is_refused_by_naming_what_is_for_it(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"is not an async function.*aidem\.sync\.idempotent"):
        lambda_handler(handler)


def test_an_async_generator_is_refused() -> None:
    async def handler(event: None, context: None) -> Any:
        yield event

    with pytest.raises(TypeError, match="handler is not an async function"):
        lambda_handler(handler)


async def test_a_call_on_a_thread_that_runs_a_loop_is_refused() -> None:
    with pytest.raises(IdempotencyUsageError, match=r"await the async function instead: echo\.__wrapped__"):
        echo({}, None)
    assert await inspect.unwrap(echo)({}, None) == [{}, None]


# --- The loop ---------------------------------------------------------------------------------------------------------


@lambda_handler
async def loop_of_call(event: None, context: None) -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


@lambda_handler
async def loop_of_other_handler(event: None, context: None) -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_all_calls_of_all_handlers_run_on_one_loop_which_stands_still_in_between() -> None:
    loop = loop_of_call(None, None)
    assert loop_of_call(None, None) is loop
    assert loop_of_other_handler(None, None) is loop
    assert not loop.is_running()
    assert not loop.is_closed()


def test_closing_closes_the_loop_and_the_next_call_makes_another() -> None:
    loop = loop_of_call(None, None)
    lambda_loop.close()
    assert loop.is_closed()
    assert loop_of_call(None, None) is not loop


def test_a_handler_may_call_another_in_a_thread() -> None:
    @lambda_handler
    async def dispatch(event: None, context: None) -> list[Any]:
        return [asyncio.get_running_loop(), await asyncio.to_thread(loop_of_call, None, None)]

    outer, inner = dispatch(None, None)
    assert outer is not inner
    assert loop_of_call(None, None) in {outer, inner}


def test_threads_that_call_at_once_get_a_loop_each() -> None:
    together = threading.Barrier(4)

    @lambda_handler
    async def handler(event: int, context: None) -> asyncio.AbstractEventLoop:
        together.wait()
        return asyncio.get_running_loop()

    with ThreadPoolExecutor(4) as threads:
        loops = list(threads.map(handler, range(4), [None] * 4))
    assert len(set(loops)) == 4


def test_a_connection_is_kept_from_call_to_call() -> None:
    ours, peer = socket.socketpair()
    kept: list[Any] = []

    @lambda_handler
    async def handler(event: bytes, context: None) -> None:
        if not kept:
            kept.append(await asyncio.open_connection(sock=ours))
        _, writer = kept[0]
        writer.write(event)
        await writer.drain()

    with peer:
        handler(b"first ", None)
        handler(b"second", None)
        assert peer.recv(100) == b"first second"
        kept[0][1].close()
        loop_of_call(None, None)


def test_a_connection_that_was_closed_while_the_loop_stood_still_is_found_closed_by_the_next_call() -> None:
    ours, peer = socket.socketpair()
    kept: list[Any] = []

    @lambda_handler
    async def handler(event: None, context: None) -> bool:
        if not kept:
            kept.append(await asyncio.open_connection(sock=ours))
        return kept[0][0].at_eof()

    assert handler(None, None) is False
    peer.close()
    assert handler(None, None) is True
    kept[0][1].close()
    loop_of_call(None, None)


# --- The context ------------------------------------------------------------------------------------------------------

layer = MemoryPersistenceLayer()


@idempotent_function(persistence_store=layer, config=CONFIG)
async def lease_seconds(order: str) -> float:
    """Return how long the claim of this call holds."""
    record = current_execution().record
    assert record is not None
    assert record.in_progress_expiry_timestamp is not None
    return record.in_progress_expiry_timestamp / 1000 - layer.clock()


@lambda_handler
async def lease_of(event: str, context: Any) -> float:
    return await lease_seconds(event)


def test_the_context_is_registered_for_the_call_and_not_beyond() -> None:
    context = Context(remaining_ms=500_000)
    assert 400 < lease_of("with a context", context) < 501
    assert current_lambda_context(CONFIG) is None
    assert lease_of("without one", None) < 31


def test_the_context_is_not_registered_any_more_after_an_exception() -> None:
    @lambda_handler
    async def handler(event: None, context: Context) -> None:
        assert current_lambda_context(CONFIG) is context
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        handler(None, Context())
    assert current_lambda_context(CONFIG) is None


def test_the_lambda_context_inside_a_durable_one_is_registered() -> None:
    @dataclass
    class State:
        operations: list[str]

    @dataclass
    class DurableContext:
        state: State
        lambda_context: Context

    assert 400 < lease_of("durable", DurableContext(State([]), Context(remaining_ms=500_000))) < 501


caller_says: ContextVar[str] = ContextVar("caller_says", default="")


def test_a_handler_sees_the_context_variables_of_its_caller() -> None:
    @lambda_handler
    async def handler(event: None, context: None) -> str:
        said = caller_says.get()
        caller_says.set("the handler's")
        return said

    token = caller_says.set("the caller's")
    assert handler(None, None) == "the caller's"
    assert caller_says.get() == "the caller's"
    caller_says.reset(token)


# --- Warming ----------------------------------------------------------------------------------------------------------


class WarmLayer(PlannedLayer):
    """Takes note of where it was opened, and fails to as long as it is told to."""

    def __init__(self, *errors: Exception, hangs: bool = False) -> None:
        super().__init__(inner=MemoryPersistenceLayer(), clock=layer.clock)
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.errors = [*errors]
        self.hangs = hangs

    async def open(self) -> None:
        self.loops.append(asyncio.get_running_loop())
        if self.errors:
            raise self.errors.pop()
        if self.hangs:
            await asyncio.get_running_loop().create_future()


def test_warm_layers_are_opened_at_once_on_the_loop_of_later_calls() -> None:
    layers = [WarmLayer(), WarmLayer()]

    @lambda_handler(warm=layers)
    async def handler(event: None, context: None) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    opened_on = [layer.loops for layer in layers]
    loop = handler(None, None)
    assert opened_on == [[loop], [loop]]


def test_a_layer_that_cannot_be_opened_yet_is_logged_and_used_later(caplog: pytest.LogCaptureFixture) -> None:
    down = WarmLayer(IdempotencyPersistenceConnectionError("the store is down"))
    other = WarmLayer()

    @lambda_handler(warm=[down, other])
    @idempotent(persistence_store=down)
    async def handler(event: int, context: None) -> int:
        return event

    assert other.loops
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "WarmLayer could not be opened yet" in caplog.text
    assert "the store is down" in caplog.text
    assert handler(1, None) == 1
    assert down.calls == ["acquire", "complete"]


@pytest.mark.usefixtures("virtual_time")
def test_a_layer_that_hangs_holds_up_the_start_for_a_while_only(caplog: pytest.LogCaptureFixture) -> None:
    hanging = WarmLayer(hangs=True)

    @lambda_handler(warm=[hanging])
    async def handler(event: None, context: None) -> float:
        return asyncio.get_running_loop().time()

    assert "TimeoutError" in caplog.text
    assert handler(None, None) == pytest.approx(hanging.loops[0].time())
    assert hanging.loops[0].time() == pytest.approx(1000 + WARM_SECONDS)


async def test_a_module_that_is_imported_by_async_code_opens_nothing() -> None:
    unopened = WarmLayer()

    @lambda_handler(warm=[unopened])
    async def handler(event: None, context: None) -> None:
        pass

    assert unopened.loops == []


@pytest.mark.parametrize("warm", ["redis://localhost", [3], MemoryPersistenceLayer(), [MemoryPersistenceLayer]])
def test_only_layers_can_be_warm(warm: Any) -> None:
    with pytest.raises(IdempotencyConfigError, match=r"^warm=.*it must be a list of persistence layers"):
        lambda_handler(warm=warm)


def test_a_task_of_a_layer_that_was_opened_early_stays() -> None:
    class Resident(WarmLayer):
        async def open(self) -> None:
            self.task = asyncio.create_task(asyncio.sleep(3600))

    resident = Resident()

    @lambda_handler(warm=[resident])
    async def handler(event: None, context: None) -> bool:
        return resident.task.done()

    assert [handler(None, None), handler(None, None)] == [False, False]
    lambda_loop.close()
    assert resident.task.cancelled()
