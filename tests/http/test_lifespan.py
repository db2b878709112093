"""The layer is opened and closed with the lifespan of the app."""

from __future__ import annotations

from typing import Any

import pytest

import aidem
from aidem.asgi import IdempotencyMiddleware
from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceConnectionError
from tests.support.planned import PlannedLayer


class Noting(PlannedLayer):
    """A layer that notes when it is opened and closed."""

    def __init__(self, events: list[str], error: Exception | None = None) -> None:
        super().__init__()
        self.events, self.error = events, error

    __hash__ = object.__hash__

    async def open(self) -> None:
        self.events.append("open")
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.events.append("close")


def app_of(events: list[str], *, last: str = "lifespan.shutdown.complete") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append((await receive())["type"])
        await send({"type": "lifespan.startup.complete"})
        events.append((await receive())["type"])
        await send({"type": last})

    return app


async def live(app: Any, events: list[str], error: Exception | None = None) -> Any:
    layer = Noting(events, error)
    return await run(IdempotencyMiddleware(app, persistence_store=layer, key_prefix="shop", scope=None), events)


async def run(middleware: IdempotencyMiddleware, events: list[str]) -> Any:
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    told: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        events.append(message["type"])
        told.append(message)

    await middleware({"type": "lifespan"}, receive, send)
    return told


@pytest.mark.parametrize("last", ["lifespan.shutdown.complete", "lifespan.shutdown.failed"])
async def test_the_layer_opens_before_the_app_starts_and_closes_before_the_server_hears_that_it_has_ended(
    last: str,
) -> None:
    events: list[str] = []
    await live(app_of(events, last=last), events)
    assert events == [
        "open",
        "lifespan.startup",
        "lifespan.startup.complete",
        "lifespan.shutdown",
        "close",
        last,
    ]


async def test_an_app_that_fails_to_start_closes_the_layer() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed"})
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await live(app, events)
    assert events == ["open", "close", "lifespan.startup.failed"]


async def test_an_app_that_just_ends_closes_the_layer() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    await live(app, events)
    assert events == ["open", "close"]


async def test_an_app_without_a_lifespan_opens_nothing() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("only http")

    with pytest.raises(RuntimeError, match="only http"):
        await live(app, events)
    assert events == []


async def test_a_store_that_cannot_be_reached_does_not_keep_the_server_away(caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []
    await live(app_of(events), events, IdempotencyPersistenceConnectionError("no route"))
    assert events[:3] == ["open", "lifespan.startup", "lifespan.startup.complete"]
    assert "cannot be reached yet: no route" in caplog.text


async def test_a_store_whose_settings_cannot_work_stops_the_server() -> None:
    events: list[str] = []
    error = IdempotencyPersistenceConfigError("the table is missing")
    with pytest.raises(IdempotencyPersistenceConfigError, match="the table is missing"):
        await live(app_of(events), events, error)
    assert events == ["open", "close", "lifespan.startup.failed"]


async def test_the_layer_of_configure_is_left_to_whoever_called_it() -> None:
    events: list[str] = []
    aidem.configure(persistence_store=Noting(events))
    try:
        await run(IdempotencyMiddleware(app_of(events), key_prefix="shop", scope=None), events)
    finally:
        aidem.configure()
    assert {"open", "close"}.isdisjoint(events)
    assert len(events) == 4
