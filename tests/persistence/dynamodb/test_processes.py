"""Real processes on one table, some of them killed or stopped in the middle of a body."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.log import (
    check_late_owners_changed_nothing,
    check_no_body_starts_under_a_live_lease,
    check_nothing_was_stuck,
    check_one_outcome_per_key,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(120, func_only=True)]

LEASE_SECONDS = 2.0
POLL_SECONDS = 1.25
SLOW_MACHINE_SECONDS = 15.0


@pytest.fixture
def orders(table: str, tmp_path: Path) -> Orders:
    return Orders(
        argument=f"dynamodb://{table}",
        log=f"{tmp_path}/log",
        keys=[f"key-{number}" for number in range(40)],
        body_seconds=(0.01, 0.1),
    )


def test_two_processes_at_once_are_one_execution_per_key_with_the_same_results(orders: Orders) -> None:
    with Fleet(replace(orders, tasks=4, together=2), 2) as fleet:
        fleet.go()
        fleet.join(60)
        log = fleet.log()
        pids = {worker.pid for worker in fleet.workers}
    assert len(log.all_bodies()) == len(orders.keys) == 40
    results = log.results()
    assert sorted(results) == sorted(orders.keys)
    assert all({result["pid"] for result in results[key]} == pids for key in orders.keys)
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    assert log.contended_keys() == len(orders.keys), "they did not meet, and nothing is shown"


def test_workers_that_are_killed_or_stopped_in_a_body_leave_one_outcome_per_key(orders: Orders) -> None:
    orders = replace(orders, lease_seconds=LEASE_SECONDS, tasks=1, shuffled=True)
    with Fleet(orders, 4, kills=1, stops=1) as fleet:
        fleet.go()
        fleet.wait_for_ends()
        killed, stopped = fleet.killed, fleet.stopped
        fleet.wait_until(lambda log: stopped <= {body.pid for body in log.taken_over()})
        fleet.resume()
        fleet.join(60)
        log = fleet.log()
    assert {body.pid for body in log.taken_over()} >= stopped | killed
    assert set(log.counts()) <= {"call", "start", "end", "result", "IdempotencyLeaseLostError"}
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
    check_nothing_was_stuck(
        log, seconds_per_lease=LEASE_SECONDS + POLL_SECONDS, slack_seconds=SLOW_MACHINE_SECONDS, stopped=stopped
    )
    asyncio.run(the_store_says_the_same(orders, log.results()))


async def the_store_says_the_same(orders: Orders, results: dict[str, list[dict[str, object]]]) -> None:
    """Find at once, for every key, the outcome that everyone got."""

    async def never(order: dict[str, str]) -> dict[str, object]:
        raise AssertionError(f"{order} has no outcome")

    async with DynamoDBPersistenceLayer(orders.argument.partition("://")[2]) as layer:
        find = idempotent_function(
            data_keyword_argument="order",
            persistence_store=layer,
            config=IdempotencyConfig(event_key_jmespath="key"),
            key_prefix="fleet",
        )(never)
        for key in orders.keys:
            assert await find({"key": key}) == {name: results[key][0][name] for name in ("fence", "effect")}
