"""A service that has it its own way, under a real uvicorn: names, formats, callers, and middleware further out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aidem.asgi import IdempotencyMiddleware, Problem, RequestParts
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.served import until

CALLERS = {"token-1-of-ann": "ann", "token-2-of-ann": "ann"}


def caller(scope: Any) -> str | None:
    authorization = dict(scope["headers"]).get(b"authorization")
    if authorization is None:
        return None
    token = authorization.decode()
    if token not in CALLERS:
        raise HTTPException(401, "Invalid token", {"WWW-Authenticate": "Bearer"})
    return CALLERS[token]


def own_format(problem: Problem, scope: Any) -> tuple[bytes, str]:
    return json.dumps({"error": {"code": problem.name, "detail": problem.detail}}).encode(), "application/json"


def members_in_any_order(parts: RequestParts) -> bytes:
    return json.dumps(json.loads(parts.body), sort_keys=True).encode()


class Served:
    """The service, how often it ran, and what its log says."""

    def __init__(self) -> None:
        self.runs = 0
        self.answered = list[int]()
        self.layer = MemoryPersistenceLayer()
        self.app = Starlette(routes=[Route("/payments", self.pay, methods=["POST"])])
        self.app.add_middleware(
            IdempotencyMiddleware,
            persistence_store=self.layer,
            key_prefix="shop",
            scope=caller,
            required=True,
            header_name="X-Idempotency-Key",
            replayed_header="X-Replayed",
            problem_body=own_format,
            fingerprint=members_in_any_order,
        )
        self.app.add_middleware(BaseHTTPMiddleware, dispatch=self.logged)
        self.port = 0

    async def pay(self, _request: Request) -> Response:
        self.runs += 1
        return JSONResponse({"number": self.runs}, 201)

    async def logged(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        self.answered.append(response.status_code)
        return response


@pytest.fixture
async def served(caplog: pytest.LogCaptureFixture) -> AsyncGenerator[Served]:
    served = Served()
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started, "the server is there")
    served.port = server.servers[0].sockets[0].getsockname()[1]
    yield served
    server.should_exit = True
    await serving
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def post(served: Served, body: str = '{"id": 1, "cents": 2}', **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", timeout=30) as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.post("/payments", content=body, headers=named)


async def test_a_renewed_token_and_another_order_of_members_are_the_same_request(served: Served) -> None:
    first = await post(served, authorization="token-1-of-ann", x_idempotency_key="k")
    again = await post(served, '{"cents":2,"id":1}', authorization="token-2-of-ann", x_idempotency_key="k")
    assert (first.status_code, again.status_code, served.runs) == (201, 201, 1)
    assert first.content == again.content
    assert (first.headers.get("X-Replayed"), again.headers["X-Replayed"]) == (None, "true")
    assert "Idempotent-Replayed" not in again.headers


async def test_every_refusal_has_the_format_of_the_service(served: Served) -> None:
    await post(served, authorization="token-1-of-ann", x_idempotency_key="k")
    refusals = [
        await post(served, authorization="token-1-of-ann", idempotency_key="k"),
        await post(served, x_idempotency_key="k"),
        await post(served, authorization="forged", x_idempotency_key="k"),
        await post(served, '{"id": 2}', authorization="token-1-of-ann", x_idempotency_key="k"),
    ]
    assert [(each.status_code, each.json()["error"]["code"]) for each in refusals] == [
        (400, "key-missing"),
        (400, "caller-unknown"),
        (401, "refused"),
        (422, "key-reused"),
    ]
    assert {each.headers["Content-Type"] for each in refusals} == {"application/json"}
    assert "X-Idempotency-Key" in refusals[0].json()["error"]["detail"]
    assert refusals[2].json()["error"]["detail"] == "Invalid token"
    assert refusals[2].headers["WWW-Authenticate"] == "Bearer"
    assert served.runs == 1


async def test_a_body_that_breaks_off_runs_nothing_and_is_no_fault_of_middleware_further_out(served: Served) -> None:
    head = "POST /payments HTTP/1.1\r\nhost: shop\r\nauthorization: token-1-of-ann\r\nx-idempotency-key: k\r\n"
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(f'{head}content-length: 100\r\n\r\n{{"id": 1'.encode())
    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    await until(lambda: bool(served.answered), "the broken request was answered")
    assert (served.answered, served.runs) == ([400], 0)
    whole = await post(served, authorization="token-1-of-ann", x_idempotency_key="k")
    assert (whole.status_code, "X-Replayed" in whole.headers) == (201, False)
