"""What is promised when a replica takes the place of its primary, and what is not (W7)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.crc import key_slot

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence.redis import RedisPersistenceLayer
from tests.support.redis import claimed, completed, until
from tests.support.redis_clusters import SLOTS, Pair, pair, told

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

# Keys of this tag are in the first third of the slots of a cluster, and so at the node that is lost.
PREFIX = next(tag for tag in (f"{{{number}}}" for number in range(100)) if key_slot(tag.encode()) < SLOTS // 3)


class Payments:
    """A function whose first body for each order waits to be let go."""

    def __init__(self, layer: RedisPersistenceLayer) -> None:
        self.bodies = list[str]()
        self.leave = asyncio.Event()
        self.pay: Any = idempotent_function(
            data_keyword_argument="order",
            persistence_store=layer,
            config=IdempotencyConfig(lease_seconds=60),
            key_prefix=PREFIX,
        )(self._pay)

    async def _pay(self, order: str) -> str:
        self.bodies.append(order)
        number = self.bodies.count(order)
        if number == 1 and order != "done":
            await self.leave.wait()
        return f"{order} {number}"

    async def start(self, *orders: str) -> list[asyncio.Future[str]]:
        """Start calls; return when their bodies run."""
        calls = [asyncio.ensure_future(self.pay(order=order)) for order in orders]

        async def are_running() -> bool:
            return set(orders) <= set(self.bodies)

        await until(are_running)
        return calls


async def until_served(layer: RedisPersistenceLayer) -> None:
    """Wait for the layer to find out that its connection is gone."""

    async def is_served() -> bool:
        try:
            await layer.get(PREFIX)
        except IdempotencyPersistenceConnectionError:
            return False
        return True

    await until(is_served)


async def until_in_step(servers: Pair) -> None:
    async def is_in_step() -> bool:
        return servers.is_in_step()

    await until(is_in_step)


@pytest.mark.parametrize(
    ("mode", "kind", "loss"),
    [
        ("cluster", "redis", "killed"),
        ("cluster", "valkey", "hung"),
        ("sentinel", "valkey", "killed"),
        ("sentinel", "redis", "hung"),
    ],
)
async def test_calls_that_run_while_a_primary_is_lost_are_recorded_at_its_replica(
    mode: str, kind: str, loss: str
) -> None:
    with pair(mode, kind) as servers:
        async with RedisPersistenceLayer(servers.url, timeout_seconds=3) as layer:
            payments = Payments(layer)
            orders = [f"order {number}" for number in range(5)]
            calls = await payments.start(*orders)
            await until_in_step(servers)
            servers.lose(loss)
            payments.leave.set()  # they complete while nobody takes their records
            assert await asyncio.gather(*calls) == [f"{order} 1" for order in orders]
            assert await asyncio.gather(*(payments.pay(order=order) for order in orders)) == [
                f"{order} 1" for order in orders
            ]
            assert sorted(payments.bodies) == orders
            assert await payments.pay(order="done") == "done 1"  # new keys are taken, too
            servers.await_failover()
            if loss == "hung":
                servers.primary.resume()


@pytest.mark.parametrize(("mode", "kind"), [("cluster", "valkey"), ("sentinel", "redis")])
async def test_w7_what_a_failover_loses_runs_again_and_still_has_one_outcome_and_no_key_is_stuck(
    mode: str, kind: str
) -> None:
    with pair(mode, kind) as servers:
        async with RedisPersistenceLayer(servers.url, timeout_seconds=10) as layer:
            payments = Payments(layer)
            await completed(layer, await claimed(layer, PREFIX))
            await until_in_step(servers)
            servers.cut_replication()
            assert await payments.pay(order="done") == "done 1"  # the primary has acknowledged it
            alone, overtaken = await payments.start("alone", "overtaken")
            assert told(servers.replica, "DBSIZE") == 1  # it knows of none of them
            servers.lose()
            servers.await_failover()
            await until_served(layer)

            # Not promised: what the old primary alone knew is gone, an outcome (P1) and a claim that was held (P2).
            assert await payments.pay(order="done") == "done 2"
            assert await payments.pay(order="overtaken") == "overtaken 2"

            # Promised: a late owner records its outcome where nobody else has, and else hands out the winner's.
            payments.leave.set()
            assert await alone == "alone 1"
            assert await overtaken == "overtaken 2"
            outcomes = [await payments.pay(order=order) for order in ("done", "alone", "overtaken", "new")]
            assert outcomes == ["done 2", "alone 1", "overtaken 2", "new 1"]
            assert payments.bodies == ["done", "alone", "overtaken", "done", "overtaken", "new"]


@pytest.mark.parametrize(("mode", "kind"), [("cluster", "redis"), ("sentinel", "valkey")])
async def test_a_waiter_hears_of_changes_at_the_replica_that_took_over(mode: str, kind: str) -> None:
    with pair(mode, kind) as servers:
        async with (
            RedisPersistenceLayer(servers.url) as layer,
            RedisPersistenceLayer(servers.url) as elsewhere,
        ):
            payments, there = Payments(layer), Payments(elsewhere)
            there.pay = idempotent_function(
                data_keyword_argument="order",
                persistence_store=elsewhere,
                config=IdempotencyConfig(wait_timeout_seconds=40),
                key_prefix=PREFIX,
            )(there._pay)
            (call,) = await payments.start("order")
            await until_in_step(servers)
            await there.pay(order="done")
            servers.lose()
            servers.await_failover()
            await until_served(layer)
            await until_served(elsewhere)
            waiter = asyncio.ensure_future(there.pay(order="order"))

            async def is_subscribed() -> bool:
                return bool(servers.subscriptions())

            await until(is_subscribed)
            payments.leave.set()
            assert await call == await waiter == "order 1"
            assert there.bodies == ["done"]
