"""Real processes on one persistence layer, some of them killed or stopped in the middle of a body."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.log import (
    FleetLog,
    check_late_owners_changed_nothing,
    check_no_body_starts_under_a_live_lease,
    check_nothing_was_stuck,
    check_one_outcome_per_key,
)
from tests.support.processes.worker import layer_of

LEASE_SECONDS = 1.0
POLL_SECONDS = 1.25
SLOW_MACHINE_SECONDS = 15.0
KILLS = 3
STOPS = 2


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    return Orders(
        argument=f"sqlite:///{tmp_path}/records.sqlite3",
        log=f"{tmp_path}/log",
        keys=[f"key-{number}" for number in range(100)],
    )


def test_two_processes_at_once_are_one_execution_per_key_with_the_same_results(orders: Orders) -> None:
    with Fleet(replace(orders, together=2), 2) as fleet:
        fleet.go()
        fleet.join(30)
        log = fleet.log()
        pids = {worker.pid for worker in fleet.workers}
    assert len(log.all_bodies()) == len(orders.keys) == 100
    results = log.results()
    assert sorted(results) == sorted(orders.keys)
    assert all({result["pid"] for result in results[key]} == pids for key in orders.keys)
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    assert log.contended_keys() == len(orders.keys), "they did not meet, and nothing is shown"


def test_processes_that_share_nothing_are_found_out(orders: Orders) -> None:
    orders = replace(orders, argument="memory://", keys=orders.keys[:10], body_seconds=(0.3, 0.4), together=2)
    with Fleet(orders, 2) as fleet:
        fleet.go()
        fleet.join(30)
        log = fleet.log()
    with pytest.raises(AssertionError, match="key-"):
        check_one_outcome_per_key(log)
    with pytest.raises(AssertionError, match=r"two bodies under a live lease|beside its successor"):
        check_no_body_starts_under_a_live_lease(log)


def test_workers_that_are_killed_or_stopped_in_a_body_leave_one_outcome_per_key(orders: Orders) -> None:
    orders = replace(
        orders,
        keys=[f"key-{number}" for number in range(200)],
        lease_seconds=LEASE_SECONDS,
        body_seconds=(0.005, 0.05),
        tasks=1,  # who is stopped in a body then holds no lock of the store
        shuffled=True,
    )
    with Fleet(orders, 8, kills=KILLS, stops=STOPS) as fleet:
        fleet.go()
        fleet.wait_for_ends()
        killed, stopped = fleet.killed, fleet.stopped
        # Stopped until each is late: its lease has passed, and another runs in its place.
        fleet.wait_until(lambda log: stopped <= {body.pid for body in log.taken_over()})
        fleet.resume()
        fleet.join(40)
        log = fleet.log()
    late = [body for body in log.taken_over() if body.pid in stopped]
    abandoned = [body for body in log.taken_over() if body.pid in killed]
    counts = log.counts()
    # What a run was like is worth seeing with `pytest -s`.
    print(f"kills {len(killed)}, stops {len(stopped)}, late {len(late)}, abandoned {len(abandoned)}, {dict(counts)}")  # noqa: T201

    assert {body.pid for body in late} == stopped
    assert len(stopped) == STOPS
    assert {body.pid for body in abandoned} == killed
    assert len(killed) == KILLS
    assert counts["call"] > 5 * len(orders.keys)
    assert set(counts) <= {"call", "start", "end", "result", "IdempotencyLeaseLostError"}
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
    check_nothing_was_stuck(
        log, seconds_per_lease=LEASE_SECONDS + POLL_SECONDS, slack_seconds=SLOW_MACHINE_SECONDS, stopped=stopped
    )
    _check_the_store_says_the_same(orders, log)


def _check_the_store_says_the_same(orders: Orders, log: FleetLog) -> None:
    """After everything a fresh call finds at once, for every key, the outcome that everyone got."""

    async def never(order: dict[str, str]) -> dict[str, Any]:
        raise AssertionError(f"{order} has no outcome")

    async def find_all() -> None:
        async with layer_of(orders.factory, orders.argument) as layer:
            find = idempotent_function(
                data_keyword_argument="order",
                persistence_store=layer,
                config=IdempotencyConfig(event_key_jmespath="key"),
                key_prefix="fleet",
            )(never)
            for key, results in log.results().items():
                found = await find({"key": key})
                assert found == {"fence": results[0]["fence"], "effect": results[0]["effect"]}

    asyncio.run(find_all())
    assert sorted(log.results()) == sorted(orders.keys)
