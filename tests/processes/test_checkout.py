"""The checkout in docs/examples, run as it is: two clicks, a worker killed in the middle, one charge."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.checkout import checkout

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
ORDER = {"order_id": "O-1", "cents": 4200}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with checkout(tmp_path) as url:
        yield url


async def ask(url: str, path: str) -> Any:
    """Get an answer from a worker that is alive."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient(base_url=url) as client:
                return (await client.get(path)).json()


async def pay(url: str) -> tuple[httpx.Response, int]:
    """Pay for the order as the page does; return the answer, and how often there was none."""
    lost = 0
    while True:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            try:
                response = await client.post("/payments", json=ORDER, headers={"Idempotency-Key": '"1"'})
            except httpx.TransportError:
                lost += 1
                continue
        if response.status_code not in {409, 503}:
            return response, lost
        await asyncio.sleep(float(response.headers.get("Retry-After", 0.1)))


async def test_a_worker_killed_while_it_waits_for_the_bank_leads_to_one_charge(url: str) -> None:
    first = asyncio.create_task(pay(url))
    while not (state := await ask(url, "/state"))["charges"]:  # noqa: ASYNC110 it is asked over HTTP
        await asyncio.sleep(0.01)
    [record] = state["records"]
    assert record["state"] == "running"
    second = asyncio.create_task(pay(url))  # the second click
    async with httpx.AsyncClient(base_url=url) as client:
        with contextlib.suppress(httpx.TransportError):  # it may have been asked to kill itself
            assert (await client.post("/kill")).json()["killed"] == int(record["note"].removeprefix("worker "))

    answers = [await first, await second]
    assert sum(lost for _, lost in answers) > 0, "nobody noticed that a worker was killed"
    [charge] = (await ask(url, "/state"))["charges"]
    assert [(response.status_code, response.json()) for response, _ in answers] == [(201, charge)] * 2
    [record] = (await ask(url, "/state"))["records"]
    assert record["state"] == "completed"


async def test_nothing_is_killed_while_nothing_is_paid(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/kill")).status_code == 409
        assert "<h1>Checkout</h1>" in (await client.get("/")).text
