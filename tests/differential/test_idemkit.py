"""What the comparison in the README says of idemkit, seen on idemkit: a new version of it may change rows."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from idemkit import HttpConfig, IdempotencyMiddleware, InMemoryBackend, ManualClock, MethodConfig, PayloadMismatch
from idemkit import idempotent as _idempotent
from idemkit import idempotent_sync as _idempotent_sync
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:idemkit:UserWarning"),  # no scope: there is one tenant here
]

idempotent: Any = _idempotent
idempotent_sync: Any = _idempotent_sync
Middleware: Any = IdempotencyMiddleware


def by_order(**options: Any) -> MethodConfig:
    return MethodConfig(key_fields=["order"], **options)


@dataclass
class Order:
    number: int


@dataclass
class Receipt:
    order: Order


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def test_ordinary_functions_can_be_decorated() -> None:
    runs: list[int] = []

    @idempotent_sync(backend=InMemoryBackend(), config=by_order())
    def charge(order: int) -> dict[str, int]:
        runs.append(order)
        return {"charged": order}

    assert charge(order=1) == charge(order=1) == {"charged": 1}
    assert runs == [1]


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}], ids=repr)
async def test_results_that_are_false_replay_as_themselves(value: Any) -> None:
    runs: list[int] = []

    @idempotent(backend=InMemoryBackend(), config=by_order())
    async def charge(order: int) -> Any:
        runs.append(order)
        return value

    assert [await charge(order=1), await charge(order=1)] == [value, value]
    assert runs == [1]


async def test_nested_dataclasses_replay_as_dicts() -> None:
    @idempotent(backend=InMemoryBackend(), config=by_order(result_codec="dataclass"))
    async def charge(order: int) -> Receipt:
        return Receipt(Order(order))

    assert await charge(order=1) == Receipt(Order(1))
    replayed = await charge(order=1)
    assert replayed.order == {"number": 1}


def cents_of(arguments: Mapping[str, Any]) -> bytes:
    return str(arguments["cents"]).encode()


async def test_payloads_are_validated() -> None:
    @idempotent(
        backend=InMemoryBackend(),
        config=by_order(validation_fingerprint=cents_of),
    )
    async def charge(order: int, cents: int) -> int:
        return order + cents

    assert await charge(order=1, cents=2) == await charge(order=1, cents=2) == 3
    with pytest.raises(PayloadMismatch):
        await charge(order=1, cents=3)


class KilledBackend(InMemoryBackend):
    """Stands for a process that is killed: nothing is given back."""

    async def release(self, effective_key: str, claim_token: str) -> bool:
        return False


async def test_what_a_vanished_execution_did_is_done_again() -> None:
    clock = ManualClock()
    backend = KilledBackend(clock=clock)
    started = asyncio.Event()

    @idempotent(backend=backend, config=by_order(lease_ttl_seconds=5))
    async def charge(order: int) -> str:
        if started.is_set():
            return f"{order} again"
        started.set()
        await asyncio.sleep(3600)
        raise AssertionError("not to be reached")

    vanished = asyncio.create_task(charge(order=1))
    await started.wait()
    vanished.cancel()
    await asyncio.wait([vanished])
    clock.advance(6)
    assert await charge(order=1) == "1 again"


async def test_a_function_whose_result_cannot_be_stored_runs_again() -> None:
    clock = ManualClock()
    runs: list[int] = []

    @idempotent(backend=InMemoryBackend(clock=clock), config=by_order(lease_ttl_seconds=5))
    async def charge(order: int) -> object:
        runs.append(order)
        return object()

    for _ in range(2):
        with pytest.raises(TypeError, match="not JSON-serializable"):
            await charge(order=1)
        clock.advance(6)
    assert runs == [1, 1]


async def test_a_function_that_is_cancelled_gives_its_key_back() -> None:
    started = asyncio.Event()

    @idempotent(backend=InMemoryBackend(), config=by_order())
    async def charge(order: int) -> int:
        if not started.is_set():
            started.set()
            await asyncio.sleep(3600)
        return order

    task = asyncio.create_task(charge(order=1))
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert await charge(order=1) == 1


# --- Over HTTP --------------------------------------------------------------------------------------------------------


class Service:
    """An app whose first request may be slow or fail, behind the middleware of idemkit."""

    def __init__(self, **options: Any) -> None:
        self.runs: Counter[str] = Counter()
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        handlers = (self.stream, self.no_content, self.big, self.background, self.slow, self.failing)
        routes = [Route(f"/{handler.__name__}", handler, methods=["POST"]) for handler in handlers]
        self.app = Middleware(
            Starlette(routes=routes),
            backend=InMemoryBackend(),
            config=HttpConfig(scope_mode="single_tenant", **options),
        )

    async def post(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.post(f"/{path}", headers={"idempotency-key": "1"})

    async def stream(self, _request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"part"
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    async def no_content(self, _request: Request) -> Response:
        self.runs["no_content"] += 1
        return Response(status_code=204)

    async def big(self, _request: Request) -> Response:
        self.runs["big"] += 1
        return Response(b"x" * (1024 * 1024 + 1))

    async def background(self, _request: Request) -> Response:
        async def fail() -> None:
            raise ValueError("no mail today")

        self.runs["background"] += 1
        return JSONResponse({}, background=BackgroundTask(fail))

    async def slow(self, _request: Request) -> Response:
        self.runs["slow"] += 1
        if self.runs["slow"] == 1:
            self.started.set()
            await self.go_on.wait()
        return JSONResponse(self.runs["slow"])

    async def failing(self, _request: Request) -> Response:
        self.runs["failing"] += 1
        self.started.set()
        await self.go_on.wait()
        raise ValueError("no money")


@pytest.mark.parametrize("path", ["no_content", "big", "background"])
async def test_responses_that_are_not_recorded_make_the_request_run_again(path: str) -> None:
    service = Service()
    for _ in range(2):
        await service.post(path)
    assert service.runs[path] == 2


async def test_a_streamed_response_is_cut_off() -> None:
    with pytest.raises(AssertionError):  # of httpx: the response has no end
        await Service().post("stream")


async def test_a_request_that_outlives_its_lease_has_a_second_owner() -> None:
    service = Service(lease_ttl_seconds=0.05, wait_timeout_seconds=0.1)
    first = asyncio.create_task(service.post("slow"))
    await service.started.wait()
    await asyncio.sleep(0.1)  # idemkit judges the lease by its own clock
    assert (await service.post("slow")).json() == 2
    service.go_on.set()
    assert (await first).status_code == 200


async def test_a_request_that_is_cancelled_keeps_its_key() -> None:
    service = Service(wait_timeout_seconds=0.05)
    first = asyncio.create_task(service.post("slow"))
    await service.started.wait()
    first.cancel()
    await asyncio.wait([first])
    assert (await service.post("slow")).status_code == 423


async def test_who_waited_for_a_request_that_failed_is_refused() -> None:
    service = Service()
    first = asyncio.create_task(service.post("failing"))
    await service.started.wait()
    second = asyncio.create_task(service.post("failing"))
    await asyncio.sleep(0.05)  # it waits
    service.go_on.set()
    assert [(await first).status_code, (await second).status_code] == [500, 423]
    assert service.runs["failing"] == 1
