"""What is promised when the server, the network and processes fail; each test first makes sure that they do."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import IdempotencyError, IdempotencyPersistenceConnectionError
from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.postgres import PostgresServer, acquired, claimed, completed, connected, started, until
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.log import (
    check_late_owners_changed_nothing,
    check_no_body_starts_under_a_live_lease,
    check_nothing_was_stuck,
    check_one_outcome_per_key,
)
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]
LEASE_SECONDS = 1.0
SLOW_MACHINE_SECONDS = 15.0
TIMEOUT_SECONDS = 3.0


def through(proxy: Proxy, server: PostgresServer) -> str:
    return server.url.replace(f":{server.port}", f":{proxy.port}")


@pytest.fixture
async def proxy(server: PostgresServer, client: Any) -> AsyncGenerator[Proxy]:
    async with Proxy.to(server.port) as proxy:
        yield proxy


@pytest.fixture
async def cut_off(proxy: Proxy, server: PostgresServer) -> AsyncGenerator[PostgresPersistenceLayer]:
    """A layer behind the proxy, warm: its statements are prepared."""
    layer = PostgresPersistenceLayer(through(proxy, server), timeout_seconds=TIMEOUT_SECONDS, max_connections=1)
    claim = await claimed(layer, "warm")
    await layer.renew(claim, now=time.time())
    await completed(layer, claim)
    await layer.release(claim)
    yield layer
    proxy.heal()
    await layer.aclose()


def counted(layer: PostgresPersistenceLayer, **config: Any) -> tuple[Any, list[int]]:
    """Return a function whose executions are counted."""
    calls = list[int]()

    @idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=IdempotencyConfig(**config), key_prefix="count"
    )
    async def count(order: int) -> int:
        calls.append(order)
        return len(calls)

    return count, calls


# --- The network ------------------------------------------------------------------------------------------------------


async def test_w3_a_claim_whose_reply_was_lost_is_given_back_by_the_caller_that_failed(
    cut_off: PostgresPersistenceLayer, proxy: Proxy, client: Any
) -> None:
    count, calls = counted(cut_off)
    proxy.cut_after_reply_is_dropped()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="the function was not run"):
        await count(order=1)
    assert proxy.dropped.replies
    assert calls == []
    # It was applied, and released as soon as there was a connection.
    assert await client.fetchval("SELECT status FROM aidem_records WHERE id LIKE 'count#%'") == "RELEASED"
    assert await count(order=1) == 1


async def test_w4_a_completion_whose_reply_was_lost_is_repeated_and_accepted(
    cut_off: PostgresPersistenceLayer, proxy: Proxy
) -> None:
    calls = list[int]()

    @idempotent_function(data_keyword_argument="order", persistence_store=cut_off, key_prefix="count")
    async def count(order: int) -> int:
        calls.append(order)
        proxy.cut_after_reply_is_dropped()
        return len(calls)

    assert await count(order=1) == 1
    assert proxy.dropped.replies
    assert await count(order=1) == 1
    assert calls == [1]


async def test_a_connection_that_breaks_before_the_server_has_said_what_it_is_is_an_outage(
    proxy: Proxy, server: PostgresServer
) -> None:
    layer = PostgresPersistenceLayer(through(proxy, server), timeout_seconds=10, max_connections=1)
    proxy.delay(0.03)

    async def cut_at_the_first_question() -> None:
        while not any(b"pg_is_in_recovery" in request for request in proxy.requests):  # noqa: ASYNC110 on the wire
            await asyncio.sleep(0.001)
        proxy.refuse()

    cutting = asyncio.create_task(cut_at_the_first_question())
    with pytest.raises(IdempotencyPersistenceConnectionError):
        await layer.get("key")
    await cutting
    proxy.heal()
    assert await layer.get("key") is None
    await layer.aclose()


@pytest.mark.parametrize("side", ["requests", "replies"])
async def test_a_network_that_swallows_everything_is_an_outage_in_time_and_a_retry_afterwards_succeeds(
    cut_off: PostgresPersistenceLayer, proxy: Proxy, side: str
) -> None:
    proxy.drop(**{side: True})
    started_at = time.monotonic()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer within 3 s") as failed:
        await acquired(cut_off)
    assert time.monotonic() - started_at < TIMEOUT_SECONDS + SLOW_MACHINE_SECONDS
    assert failed.value.may_be_applied
    assert getattr(proxy.dropped, side)
    proxy.heal()
    assert (await claimed(cut_off)).owner == "ours"  # found again, or claimed now


async def test_a_slow_network_delays_calls_and_runs_each_once(cut_off: PostgresPersistenceLayer, proxy: Proxy) -> None:
    count, calls = counted(cut_off)
    proxy.delay(0.05)
    started_at = time.monotonic()
    assert await count(order=1) == 1
    assert time.monotonic() - started_at > 0.15
    assert calls == [1]


async def test_w2_an_owner_that_was_cut_off_past_its_lease_returns_what_the_winner_recorded(
    cut_off: PostgresPersistenceLayer, proxy: Proxy, layer: PostgresPersistenceLayer
) -> None:
    bodies = list[str]()
    config = IdempotencyConfig(lease_seconds=1.0, renew_lease=False, wait_timeout_seconds=30)
    options: dict[str, Any] = {"data_keyword_argument": "order", "key_prefix": "cut off", "config": config}

    @idempotent_function(persistence_store=layer, **options)
    async def winner(order: int) -> str:
        bodies.append("winner")
        return "winner"

    @idempotent_function(persistence_store=cut_off, **options)
    async def loser(order: int) -> str:
        bodies.append("loser")
        proxy.hold()
        assert await winner(order=1) == "winner"
        proxy.heal()
        return "loser"

    assert await loser(order=1) == "winner"
    assert bodies == ["loser", "winner"]


async def test_calls_through_a_network_that_breaks_again_and_again_have_one_outcome_each(
    server: PostgresServer, proxy: Proxy, client: Any
) -> None:
    layer = PostgresPersistenceLayer(through(proxy, server), timeout_seconds=TIMEOUT_SECONDS, max_connections=4)
    config = IdempotencyConfig(lease_seconds=LEASE_SECONDS, wait_timeout_seconds=30)
    outcomes = defaultdict[int, set[int]](set)
    effects, calls = count(), count()

    @idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="breaks")
    async def effect(order: int) -> int:
        await asyncio.sleep(0.01)
        return next(effects)

    async def call_on() -> None:
        while not breaking.done():
            order = next(calls) // 3  # each order comes three times
            with suppress(IdempotencyError):  # unless a further try goes well
                outcome = await effect(order=order)
                outcomes[order].add(outcome)

    async def break_connections() -> None:
        for _ in range(10):
            dropped = proxy.dropped.replies
            proxy.cut_after_reply_is_dropped()
            while proxy.dropped.replies == dropped:  # noqa: ASYNC110 - the proxy counts, and tells nobody
                await asyncio.sleep(0.005)
            proxy.cut()
            await asyncio.sleep(0.05)
        proxy.heal()

    breaking = asyncio.create_task(break_connections())
    await asyncio.gather(breaking, *(call_on() for _ in range(12)))
    assert proxy.connections > 4
    assert {len(results) for results in outcomes.values()} == {1}
    assert {order: {await effect(order=order)} for order in outcomes} == outcomes
    await layer.aclose()


# --- The server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(started_once: PostgresServer) -> PostgresServer:
    """A server that may be ended."""
    if started_once.process is None or started_once.process.poll() is not None:
        started_once.start()
    return started_once


@pytest.fixture(scope="module")
def started_once() -> Iterator[PostgresServer]:
    """A server that writes to its disk what it has acknowledged."""
    with started("fsync=on", "full_page_writes=on") as server:

        async def prepare() -> None:
            layer = PostgresPersistenceLayer(server.url)
            await layer.create_table()
            await layer.aclose()

        asyncio.run(prepare())
        yield server


@pytest.mark.parametrize("end", ["crash", "stop"])
async def test_a_server_that_is_ended_and_started_again_has_kept_what_it_acknowledged(
    mortal: PostgresServer, end: str
) -> None:
    layer = PostgresPersistenceLayer(mortal.url, timeout_seconds=TIMEOUT_SECONDS)
    acknowledged = list[str]()
    failures = list[BaseException]()

    async def work(worker: int) -> None:
        for number in range(10_000):
            key = f"{end} {worker} {number}"
            try:
                await completed(layer, await claimed(layer, key))
            except IdempotencyPersistenceConnectionError as failure:
                failures.append(failure)
                return
            acknowledged.append(key)

    workers = [asyncio.ensure_future(work(worker)) for worker in range(8)]

    async def is_busy() -> bool:
        return len(acknowledged) > 100

    await until(is_busy)
    await asyncio.to_thread(getattr(mortal, end))
    await asyncio.gather(*workers)
    assert len(failures) == 8
    with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached"):
        await acquired(layer)
    await asyncio.to_thread(mortal.start)
    async with connected(mortal.url) as client:
        statement = "SELECT count(*) FROM aidem_records WHERE id = ANY($1) AND status = 'COMPLETED'"
        assert await client.fetchval(statement, acknowledged) == len(acknowledged)
    await claimed(layer, f"{end} afterwards")
    await layer.aclose()


async def test_calls_outlive_a_crash_of_the_server_with_one_outcome_each(mortal: PostgresServer) -> None:
    """A completion is tried again while the lease is held, so their callers do not notice a restart within it."""
    layer = PostgresPersistenceLayer(mortal.url, timeout_seconds=TIMEOUT_SECONDS)
    bodies = list[int]()
    running = asyncio.Event()

    @idempotent_function(
        data_keyword_argument="order",
        persistence_store=layer,
        config=IdempotencyConfig(lease_seconds=60),
        key_prefix="outlives",
    )
    async def effect(order: int) -> int:
        bodies.append(order)
        if len(bodies) == 20:
            running.set()
        await crashed.wait()
        return order

    crashed = asyncio.Event()
    calls = [asyncio.ensure_future(effect(order=order)) for order in range(20)]
    await running.wait()
    await asyncio.to_thread(mortal.crash)
    crashed.set()
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in calls)
    await asyncio.to_thread(mortal.start)
    assert await asyncio.gather(*calls) == list(range(20))
    assert [await effect(order=order) for order in range(20)] == list(range(20))
    assert sorted(bodies) == list(range(20))
    await layer.aclose()


# --- Processes --------------------------------------------------------------------------------------------------------


def test_workers_that_are_killed_or_stopped_in_a_body_leave_one_outcome_per_key(
    server: PostgresServer, tmp_path: Path
) -> None:
    orders = Orders(
        argument=server.url,
        log=f"{tmp_path}/log",
        keys=[f"{tmp_path.name}-{number}" for number in range(200)],
        lease_seconds=LEASE_SECONDS,
        body_seconds=(0.005, 0.05),
        tasks=1,  # who is stopped in a body is then not about to begin another one
        shuffled=True,
    )
    with Fleet(orders, 5, kills=2, stops=2) as fleet:
        fleet.go()
        fleet.wait_for_ends()
        killed, stopped = fleet.killed, fleet.stopped
        fleet.wait_until(lambda log: stopped <= {body.pid for body in log.taken_over()})
        fleet.resume()
        fleet.join(60)
        log = fleet.log()
    assert {body.pid for body in log.taken_over()} >= stopped | killed
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
    check_nothing_was_stuck(
        log, seconds_per_lease=LEASE_SECONDS + 1.25, slack_seconds=SLOW_MACHINE_SECONDS, stopped=stopped
    )
    assert sorted(log.results()) == sorted(orders.keys)


def test_workers_outlive_a_crash_of_the_server(mortal: PostgresServer, tmp_path: Path) -> None:
    orders = Orders(
        argument=mortal.url,
        log=f"{tmp_path}/log",
        keys=[f"{tmp_path.name}-{number}" for number in range(300)],
        lease_seconds=4 * LEASE_SECONDS,
        body_seconds=(0.08, 0.12),  # so that they are far from done when the server ends
    )
    with Fleet(replace(orders, shuffled=True), 3) as fleet:
        fleet.go()
        fleet.wait_until(lambda log: len(log.results()) > 5)
        mortal.crash()
        fleet.wait_until(lambda log: log.counts()["IdempotencyPersistenceConnectionError"] > 0)
        mortal.start()
        fleet.join(60)
        log = fleet.log()
    assert len(log.results()) > 5
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
