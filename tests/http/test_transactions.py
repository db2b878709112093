"""The outcome of a request is its response: the app cannot complete it in a transaction."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aidem import current_execution
from aidem.asgi import IdempotencyMiddleware
from aidem.exceptions import IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer


@pytest.mark.parametrize("is_disabled", [False, True])
async def test_an_app_that_completes_its_request_is_told_what_to_do_instead(
    is_disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_disabled:
        monkeypatch.setenv("AIDEM_IDEMPOTENCY_DISABLED", "true")

    async def pay(_: Request) -> Response:
        for completion in (
            current_execution().complete({}, transaction=object()),
            current_execution().completion_item({}),
        ):
            with pytest.raises(
                IdempotencyUsageError, match="the outcome of a request is its response, which is recorded"
            ):
                await completion
        return JSONResponse({"paid": True})

    app: Any = Starlette(routes=[Route("/", pay, methods=["POST"])])
    app = IdempotencyMiddleware(app, persistence_store=MemoryPersistenceLayer(), key_prefix="pay", scope=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        if is_disabled:
            with pytest.warns(UserWarning, match="without idempotency"):
                response = await client.post("/", headers={"Idempotency-Key": '"key"'})
        else:
            response = await client.post("/", headers={"Idempotency-Key": '"key"'})
    assert response.json() == {"paid": True}
