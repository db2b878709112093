"""SnapStart: nothing is connected while the snapshot is taken, and every restored copy connects anew."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import snapshot_restore_py

from aidem import sync
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import PlannedLayer


class ClientLayer(PlannedLayer):
    """Keeps a client per event loop in an async generator, as layers do, and takes note of what happens to them."""

    def __init__(self) -> None:
        super().__init__(inner=MemoryPersistenceLayer(), clock=time.time)
        self.clients: dict[asyncio.AbstractEventLoop, AsyncGenerator[None]] = {}
        self.said: list[str] = []

    @property
    def connected(self) -> int:
        return len(self.clients)

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        if loop not in self.clients:
            self.clients[loop] = self._client(loop)
            await anext(self.clients[loop])

    async def _client(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        self.said.append("connected")
        try:
            yield
        finally:
            del self.clients[loop]
            await asyncio.sleep(0)
            self.said.append("closed")

    async def _do(self, operation: str, apply: Any) -> Any:
        await self.open()
        return await super()._do(operation, apply)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Begin and end without loops, and without hooks of other tests."""
    close_all()
    yield
    close_all()


def close_all() -> None:
    lambda_loop.close()
    sync.close()
    take_snapshot()  # of nothing: what was armed before is not any more
    snapshot_restore_py.get_after_restore().clear()


def take_snapshot() -> None:
    """Do what Lambda's runtime does before it reports that it is ready for one."""
    hooks: list[Any] = snapshot_restore_py.get_before_snapshot()
    while hooks:
        function, args, kwargs = hooks.pop()
        function(*args, **kwargs)


def restore() -> None:
    hooks: list[Any] = snapshot_restore_py.get_after_restore()
    for function, args, kwargs in hooks:
        function(*args, **kwargs)


@pytest.fixture
def layer() -> ClientLayer:
    return ClientLayer()


def test_clients_of_warm_layers_are_closed_before_the_snapshot_and_made_anew_after_it(layer: ClientLayer) -> None:
    @lambda_handler(warm=[layer])
    async def handler(event: None, context: None) -> int:
        return layer.connected

    assert layer.said == ["connected"]
    take_snapshot()
    assert layer.said == ["connected", "closed"]
    assert layer.connected == 0
    restore()
    assert layer.said == ["connected", "closed", "connected"]
    assert handler(None, None) == 1


def test_clients_of_layers_that_blocking_code_warms_are_treated_in_the_same_way(layer: ClientLayer) -> None:
    sync.warm(layer)
    assert layer.said == ["connected"]
    take_snapshot()
    assert layer.connected == 0
    restore()
    assert layer.connected == 1
    call_blocking(layer)()
    assert layer.said == ["connected", "closed", "connected"]


def test_a_loop_is_made_anew_after_the_snapshot() -> None:
    @lambda_handler
    async def handler(event: None, context: None) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop = handler(None, None)
    take_snapshot()
    assert loop.is_closed()
    restored = handler(None, None)
    assert restored is not loop
    assert not restored.is_closed()


def call_async(layer: ClientLayer) -> Callable[[], object]:
    @lambda_handler
    async def handler(event: None, context: None) -> None:
        await layer.open()

    return lambda: handler(None, None)


def call_blocking(layer: ClientLayer) -> Callable[[], object]:
    return sync.idempotent_function(persistence_store=layer, key_prefix="charge")(lambda: None)


@pytest.mark.parametrize("prepared", [call_async, call_blocking])
def test_a_client_of_a_call_made_before_the_snapshot_is_closed(
    prepared: Callable[[ClientLayer], Callable[[], object]], layer: ClientLayer
) -> None:
    call = prepared(layer)
    call()
    assert layer.said == ["connected"]
    take_snapshot()
    assert layer.said == ["connected", "closed"]
    call()
    assert layer.said == ["connected", "closed", "connected"]


@pytest.mark.parametrize("prepared", [call_async, call_blocking])
@pytest.mark.parametrize("is_registered_first", [True, False])
def test_a_hook_that_makes_a_call_leaves_no_client_either(
    is_registered_first: bool, prepared: Callable[[ClientLayer], Callable[[], object]], layer: ClientLayer
) -> None:
    call = prepared(layer)
    if is_registered_first:  # it then runs last
        snapshot_restore_py.register_before_snapshot(call)
    call()
    if not is_registered_first:
        snapshot_restore_py.register_before_snapshot(call)
    take_snapshot()
    assert "connected" in layer.said
    assert layer.said[-1] == "closed"
    assert layer.connected == 0


def test_the_thread_of_blocking_calls_is_ended_before_the_snapshot(layer: ClientLayer) -> None:
    call_blocking(layer)()
    assert "aidem.sync" in {thread.name for thread in threading.enumerate()}
    take_snapshot()
    assert "aidem.sync" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("prepared", [call_async, call_blocking])
def test_hooks_do_not_pile_up(prepared: Callable[[ClientLayer], Callable[[], object]], layer: ClientLayer) -> None:
    call = prepared(layer)
    for _ in range(3):
        call()
        lambda_loop.close()
        sync.close()
    assert len(snapshot_restore_py.get_before_snapshot()) == 1
