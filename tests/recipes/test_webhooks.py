"""Webhooks, as a sender delivers them over HTTP: again when it got no answer, or no 2xx."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import uvicorn

from aidem import idempotency_key, operations
from tests.support.recipes import Bank, load
from tests.support.served import until
from tests.support.servers import free_port

EVENT = {"id": "evt_1", "type": "order.placed", "order_id": "o-1", "cents": 4200}


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def program(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("webhooks.py", bank, monkeypatch, WEBHOOK_SECRET="secret")


@pytest.fixture
async def sender(program: Any, bank: Bank) -> AsyncGenerator[httpx.AsyncClient]:
    server = uvicorn.Server(uvicorn.Config(program.app, port=free_port(), log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started, "uvicorn is there")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.config.port}") as client:
        yield client
    bank.is_open.set()  # or a request would keep the server
    server.should_exit = True
    await serving


async def deliver(sender: httpx.AsyncClient, event: dict[str, Any], **options: Any) -> httpx.Response:
    body = json.dumps(event).encode()
    headers = {"signature": hmac.new(b"secret", body, hashlib.sha256).hexdigest()}
    return await sender.post("/webhooks", content=body, **{"headers": headers} | options)


async def test_an_event_that_is_delivered_again_charges_once(sender: httpx.AsyncClient, bank: Bank) -> None:
    first = await deliver(sender, EVENT)
    again = await deliver(sender, EVENT | {"attempt": 2})
    assert (first.status_code, again.status_code) == (204, 204)
    assert bank.charges == ["o-1"]


async def test_a_sender_that_gives_up_is_sent_away_until_its_first_delivery_is_done(
    sender: httpx.AsyncClient, program: Any, bank: Bank
) -> None:
    bank.is_open.clear()
    impatient = asyncio.create_task(deliver(sender, EVENT))
    await bank.has_charged.wait()
    impatient.cancel()  # and with the request goes its connection
    await asyncio.wait([impatient])
    assert bank.charges == ["o-1"]  # it is still there
    early = await deliver(sender, EVENT)
    assert (early.status_code, early.headers["retry-after"]) == (503, "10")
    bank.is_open.set()
    key = idempotency_key(program.handle, EVENT)
    await until(lambda: program.layer.records()[key].status == "COMPLETED", "the first delivery is done")
    assert (await deliver(sender, EVENT)).status_code == 204
    assert bank.charges == ["o-1"]


async def left_in_doubt(program: Any, bank: Bank) -> str:
    """Lose an execution in its body, and return its key."""
    await bank.lose(program.handle(EVENT))
    return idempotency_key(program.handle, EVENT)


async def test_an_event_in_doubt_waits_at_its_sender_until_somebody_says_that_it_happened(
    sender: httpx.AsyncClient, program: Any, bank: Bank
) -> None:
    key = await left_in_doubt(program, bank)
    parked = await deliver(sender, EVENT)
    assert (parked.status_code, parked.headers["retry-after"]) == (503, "3600")
    [found] = [found async for found in operations.find(program.layer, state=operations.RecordState.IN_DOUBT)]
    assert (found.record.idempotency_key, found.record.note) == (key, "evt_1")
    await operations.resolve(program.layer, key, result=None)
    assert (await deliver(sender, EVENT)).status_code == 204
    assert bank.charges == ["o-1"]


async def test_an_event_in_doubt_runs_when_somebody_says_that_it_did_not_happen(
    sender: httpx.AsyncClient, program: Any, bank: Bank
) -> None:
    key = await left_in_doubt(program, bank)
    bank.clear()  # the request was lost on its way
    await operations.release(program.layer, key)
    assert (await deliver(sender, EVENT)).status_code == 204
    assert bank.charges == ["o-1"]


async def test_requests_that_the_sender_did_not_sign_or_that_name_no_event_use_up_no_id(
    sender: httpx.AsyncClient, program: Any, bank: Bank
) -> None:
    forged = await deliver(sender, EVENT, headers={"signature": "0"})
    nameless = await deliver(sender, {"type": "order.placed", "order_id": "o-1", "cents": 4200})
    assert (forged.status_code, nameless.status_code) == (400, 400)
    assert program.layer.records() == {}
    assert bank.charges == []
