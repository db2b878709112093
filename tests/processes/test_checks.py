"""A key in doubt, five callers in each of two processes: the check is asked once, and all get what it has found."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidem import IdempotencyConfig, idempotent_function
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.worker import layer_of
from tests.support.servers import started

CALLERS = 5


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.server)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/records.sqlite3"
    else:
        with started("redis") as redis:
            yield redis.url


async def leave_in_doubt(orders: Orders) -> None:
    """Claim the key as a worker would, and be cancelled in the body."""

    async def cancelled(order: dict[str, str]) -> None:
        raise asyncio.CancelledError(order)

    async with layer_of(orders.factory, orders.argument) as layer:
        effect = idempotent_function(
            data_keyword_argument="order",
            persistence_store=layer,
            config=IdempotencyConfig(event_key_jmespath="key", on_abandoned="raise"),
            key_prefix="fleet",
        )(cancelled)
        with pytest.raises(asyncio.CancelledError):
            await effect({"key": orders.keys[0]})


def test_callers_in_two_processes_ask_one_check_and_get_its_result(url: str, tmp_path: Path) -> None:
    orders = Orders(
        argument=url, log=f"{tmp_path}/log", keys=["key"] * CALLERS, tasks=CALLERS, asks_after_calls=2 * CALLERS
    )
    asyncio.run(leave_in_doubt(orders))
    with Fleet(orders, 2) as fleet:
        fleet.go()
        fleet.join(30)
        log = fleet.log()
        pids = sorted(worker.pid for worker in fleet.workers)
    assert log.counts() == {"call": 2 * CALLERS, "asked": 1, "result": 2 * CALLERS}
    results = log.results()["key"]
    assert sorted(result["pid"] for result in results) == sorted(pids * CALLERS)
    assert {result["effect"] for result in results} == {"found"}
