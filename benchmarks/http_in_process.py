"""A FastAPI app called in process, with records in memory: against the bare app. What aidem itself costs a request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aidem.asgi import IdempotencyMiddleware, by_header
from aidem.persistence.memory import MemoryPersistenceLayer
from benchmarks._http_service import bare, route
from benchmarks._measure import OURS, Race, fresh_keys, race
from benchmarks._rows import at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Stopwatch
    from benchmarks._rows import Row

BARE, MIDDLEWARE = "the bare app", "the middleware"
BODY = b'{"order_id": "o-1", "cents": 4200, "currency": "EUR"}'


def rows(effort: Effort) -> Iterator[Row]:
    calls = effort.calls(500)
    with asyncio.Runner() as runner:
        sides = {OURS: _with_route, MIDDLEWARE: _with_middleware, BARE: bare}
        result = race(
            {name: _contender(runner, make_app, calls=calls) for name, make_app in sides.items()},
            rounds=effort.rounds(31),
        )
    of_middleware = Race({OURS: result.rounds[MIDDLEWARE], BARE: result.rounds[BARE]})
    for what, lap, target in (("fresh", "first", at_most(1.75)), ("replay", "replay", at_most(0.7))):
        yield result.times(f"IdempotentRoute, {what}", lap=lap, against=BARE, by="cpu", target=target)
        yield of_middleware.times(f"IdempotencyMiddleware, {what}", lap=lap, against=BARE, by="cpu")


def _with_route() -> Any:
    return route(MemoryPersistenceLayer())


def _with_middleware() -> Any:
    layer, scope = MemoryPersistenceLayer(), by_header("authorization")
    return IdempotencyMiddleware(bare(), key_prefix="payments", scope=scope, persistence_store=layer)


def _contender(runner: asyncio.Runner, make_app: Callable[[], Any], *, calls: int) -> Callable[[Stopwatch], None]:
    app = make_app()  # the first round builds what FastAPI and the layer build once

    def contender(stopwatch: Stopwatch) -> None:
        runner.run(_laps(stopwatch, app, calls))

    return contender


async def _laps(stopwatch: Stopwatch, app: Any, calls: int) -> None:
    keys = fresh_keys(calls)
    for lap in ("first", "replay"):
        statuses: set[int] = set()
        with stopwatch.lap(lap, calls=calls):
            for key in keys:
                await _post(app, key, statuses)
        assert statuses == {201}, statuses


async def _post(app: Any, key: str, statuses: set[int]) -> None:
    """Send a request as a server would."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/payments",
        "raw_path": b"/payments",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"authorization", b"Bearer ann"),
            (b"idempotency-key", f'"{key}"'.encode()),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(BODY)),
        ],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.add(message["status"])

    await app(scope, receive, send)
