"""What is promised when servers, networks and processes fail; each test first makes sure that they do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from aidem import IdempotencyConfig, current_execution, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import IdempotencyLeaseLostError, IdempotencyPersistenceConnectionError
from aidem.persistence.redis import RedisPersistenceLayer
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.log import (
    check_late_owners_changed_nothing,
    check_no_body_starts_under_a_live_lease,
    check_nothing_was_stuck,
    check_one_outcome_per_key,
)
from tests.support.proxy import Proxy
from tests.support.redis import acquired, claimed, client_of, completed, until
from tests.support.servers import RedisServer, started

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]
IMPATIENT_SECONDS = 1.5


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with started(request.param) as server:
        yield server


@pytest.fixture
async def client(server: RedisServer) -> AsyncGenerator[Any]:
    async with client_of(server) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def proxy(server: RedisServer, client: Any) -> AsyncGenerator[Proxy]:
    async with Proxy.to(server.port) as proxy:
        yield proxy


@pytest.fixture
async def layer(proxy: Proxy) -> AsyncGenerator[RedisPersistenceLayer]:
    """A layer behind the proxy, warm."""
    async for layer in warm(RedisPersistenceLayer(f"redis://127.0.0.1:{proxy.port}")):
        yield layer
        proxy.heal()


@pytest.fixture
async def impatient(server: RedisServer, client: Any) -> AsyncGenerator[RedisPersistenceLayer]:
    """A layer whose time-outs are short, but not so short that they pass by themselves; warm."""
    async for layer in warm(RedisPersistenceLayer(server.url, timeout_seconds=IMPATIENT_SECONDS)):
        yield layer


async def warm(layer: RedisPersistenceLayer) -> AsyncGenerator[RedisPersistenceLayer]:
    """Let the server know the scripts, and close the layer in the end."""
    claim = await claimed(layer, "warm")
    await layer.renew(claim, now=time.time())
    await completed(layer, claim)
    await layer.release(claim)
    yield layer
    await layer.aclose()


def counted(layer: RedisPersistenceLayer, **config: Any) -> tuple[Any, list[int]]:
    """Return a function whose executions are counted."""
    calls = list[int]()

    @idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=IdempotencyConfig(**config), key_prefix="count"
    )
    async def count(order: int) -> int:
        calls.append(order)
        return len(calls)

    return count, calls


async def test_w3_a_claim_whose_reply_was_lost_is_given_back_by_the_caller_that_failed(
    layer: RedisPersistenceLayer, proxy: Proxy, client: Any
) -> None:
    count, calls = counted(layer)
    proxy.cut_after_reply_is_dropped()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="the function was not run"):
        await count(order=1)
    assert proxy.dropped.replies
    assert calls == []
    assert await client.keys("count#*") == []  # it was applied, and released as soon as there was a connection
    assert await count(order=1) == 1


async def test_w4_a_completion_whose_reply_was_lost_is_repeated_and_accepted(
    layer: RedisPersistenceLayer, proxy: Proxy
) -> None:
    calls = list[int]()

    @idempotent_function(data_keyword_argument="order", persistence_store=layer, key_prefix="count")
    async def count(order: int) -> int:
        calls.append(order)
        proxy.cut_after_reply_is_dropped()
        return len(calls)

    assert await count(order=1) == 1
    assert proxy.dropped.replies
    assert await count(order=1) == 1
    assert calls == [1]


async def test_a_server_that_is_paused_delays_a_call_and_runs_it_once(
    layer: RedisPersistenceLayer, client: Any, server: RedisServer
) -> None:
    count, calls = counted(layer)
    started_at = time.monotonic()
    await client.execute_command("CLIENT", "PAUSE", "300", "ALL")
    assert await count(order=1) == 1
    assert time.monotonic() - started_at > 0.2
    assert calls == [1]


async def test_a_claim_that_was_given_up_while_the_server_was_paused_is_never_applied(
    impatient: RedisPersistenceLayer, client: Any
) -> None:
    await client.execute_command("CLIENT", "PAUSE", f"{3000 * IMPATIENT_SECONDS:.0f}", "ALL")
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"did not answer within 1\.5 s"):
        await claimed(impatient, "paused")
    assert await client.exists("paused") == 0  # answered once the pause has ended
    assert (await claimed(impatient, "paused", "another")).owner == "another"


async def test_a_claim_that_was_given_up_while_the_server_was_busy_may_be_applied_later_and_is_ours(
    impatient: RedisPersistenceLayer, client: Any, server: RedisServer
) -> None:
    server.pause()
    try:
        with pytest.raises(IdempotencyPersistenceConnectionError, match=r"did not answer within 1\.5 s"):
            await claimed(impatient, "busy")
    finally:
        server.resume()

    async def is_applied() -> bool:
        return bool(await client.exists("busy"))

    await until(is_applied)
    assert isinstance(await acquired(impatient, "busy", "another"), Blocked)
    assert (await claimed(impatient, "busy")).owner == "ours"


async def test_w2_an_owner_that_was_cut_off_past_its_lease_returns_what_the_winner_recorded(
    layer: RedisPersistenceLayer, proxy: Proxy, server: RedisServer
) -> None:
    direct = RedisPersistenceLayer(server.url)
    bodies = list[str]()
    config = IdempotencyConfig(lease_seconds=1.0, renew_lease=False)
    options: dict[str, Any] = {"data_keyword_argument": "order", "key_prefix": "cut off", "config": config}

    @idempotent_function(persistence_store=direct, **options)
    async def winner(order: int) -> str:
        bodies.append("winner")
        return "winner"

    @idempotent_function(persistence_store=layer, **options)
    async def loser(order: int) -> str:
        bodies.append("loser")
        proxy.refuse()
        record = current_execution().record
        assert record is not None
        key = record.idempotency_key

        async def has_lapsed() -> bool:
            answer = await acquired(direct, key, "probe")
            return isinstance(answer, Claimed) and await direct.release(answer.record)

        await until(has_lapsed)
        assert await winner(order=order) == "winner"
        proxy.heal()
        return "loser"

    assert await asyncio.wait_for(loser(order=1), 60) == "winner"
    assert bodies == ["loser", "winner"]
    await direct.aclose()


async def test_a_lease_that_was_lost_to_a_caller_that_failed_is_said_to_be_lost(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    @idempotent_function(data_keyword_argument="order", persistence_store=layer, key_prefix="lost")
    async def lose(order: int) -> str:
        (key,) = await client.keys("lost#*")
        await client.set(key, '{"status": "INPROGRESS", "owner": "another", "fence": 9999999999999}')
        return "lost"

    with pytest.raises(IdempotencyLeaseLostError):
        await lose(order=1)


async def test_w7_what_a_server_forgets_when_it_is_killed_may_run_twice_and_what_its_log_keeps_does_not(
    tmp_path: Path,
) -> None:
    for options, executions in ((("--appendonly", "yes", "--appendfsync", "always"), 1), ((), 2)):
        with started("redis", *options) as server:
            layer = RedisPersistenceLayer(server.url)
            count, calls = counted(layer)
            await count(order=1)
            server.kill()
            server.start()
            await until_loaded(layer)
            await count(order=1)
            assert len(calls) == executions
            await layer.aclose()


async def until_loaded(layer: RedisPersistenceLayer) -> None:
    async def is_loaded() -> bool:
        try:
            await layer.get("key")
        except IdempotencyPersistenceConnectionError:
            return False
        return True

    await until(is_loaded)


# --- Processes ------------------------------------------------------------------------------------------------------


def test_processes_that_are_killed_and_stopped_leave_one_outcome_for_each_key(
    server: RedisServer, tmp_path: Path
) -> None:
    orders = Orders(
        argument=server.url,
        log=str(tmp_path / "log"),
        keys=[f"{server.port}-{number}" for number in range(40)],
        lease_seconds=1.0,
        wait_timeout_seconds=30.0,
        body_seconds=(0.01, 0.05),
        tasks=1,  # who is stopped in a body is then not about to begin another one
        shuffled=True,
    )
    with Fleet(orders, 4, kills=1, stops=1) as fleet:
        fleet.go()
        fleet.wait_for_ends()
        killed, stopped = fleet.killed, fleet.stopped
        fleet.wait_until(lambda log: stopped <= {body.pid for body in log.taken_over()})
        fleet.resume()
        fleet.join(60)
        log = fleet.log()
    assert {body.pid for body in log.taken_over()} >= stopped | killed
    assert set(log.results()) == set(orders.keys)
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
    check_nothing_was_stuck(log, seconds_per_lease=orders.lease_seconds, slack_seconds=20, stopped=stopped)
