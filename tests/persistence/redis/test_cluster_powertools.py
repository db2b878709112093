"""Two fleets on one cluster: functions on AWS Powertools, and the same functions on aidem."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig as TheirConfig
from aws_lambda_powertools.utilities.idempotency import exceptions as theirs
from aws_lambda_powertools.utilities.idempotency import idempotent_function as their_idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer as TheirLayer

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import IdempotencyAlreadyInProgressError
from aidem.persistence.redis import RedisPersistenceLayer
from tests.support.redis import claimed, until
from tests.support.redis_clusters import cluster, told
from tests.support.servers import RedisServer

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:Redis.* will be removed in v4:DeprecationWarning"),
]

CONFLICTS = (theirs.IdempotencyAlreadyInProgressError, IdempotencyAlreadyInProgressError)
ORDERS = range(9)  # their keys are on all nodes
Call = Callable[[int], Any]


class Lease:
    """The part of a Lambda context that Powertools asks."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(self._seconds * 1000)


def powertools(nodes: list[RedisServer], body: Callable[[int], Any], *, lease_seconds: float = 30) -> Call:
    layer = TheirLayer(host="127.0.0.1", port=nodes[0].port, mode="cluster", ssl=False)

    @their_idempotent_function(
        data_keyword_argument="order",
        persistence_store=layer,
        config=TheirConfig(lambda_context=Lease(lease_seconds)),  # type: ignore[arg-type]
        key_prefix="pay",
    )
    def pay(order: int) -> Any:
        return body(order)

    return lambda order: pay(order=order)


def aidem(nodes: list[RedisServer], body: Callable[[int], Any], *, lease_seconds: float = 30) -> Call:
    layer = RedisPersistenceLayer(f"redis+cluster://127.0.0.1:{nodes[0].port}")

    @idempotent_function(
        data_keyword_argument="order",
        persistence_store=layer,
        config=IdempotencyConfig(hash_function="md5", lease_seconds=lease_seconds, renew_lease=False),
        key_prefix="pay",
    )
    async def pay(order: int) -> Any:
        return await asyncio.to_thread(body, order)

    return lambda order: asyncio.run(pay(order=order))


both_directions = pytest.mark.parametrize(
    ("first", "second"), [(powertools, aidem), (aidem, powertools)], ids=["they-first", "we-first"]
)


@pytest.fixture(scope="module")
def running() -> Iterator[list[RedisServer]]:
    with cluster("redis") as nodes:
        yield nodes


@pytest.fixture
def nodes(running: list[RedisServer]) -> list[RedisServer]:
    for node in running:
        told(node, "FLUSHALL")
    return running


def never(order: int) -> None:
    raise AssertionError(f"order {order} ran again")


@both_directions
def test_each_replays_what_the_other_completed(first: Any, second: Any, nodes: list[RedisServer]) -> None:
    here, there = first(nodes, lambda order: {"order": order, "list": []}), second(nodes, never)
    for order in ORDERS:
        assert here(order) == {"order": order, "list": []}
        assert there(order) == {"order": order, "list": []}
    assert all(told(node, "DBSIZE") for node in nodes)


@both_directions
async def test_each_respects_what_the_other_runs(first: Any, second: Any, nodes: list[RedisServer]) -> None:
    for order in ORDERS[1:4]:  # Powertools replays 0 as None
        entered, leave = threading.Event(), threading.Event()

        def hold(order: int, entered: threading.Event = entered, leave: threading.Event = leave) -> int:
            entered.set()
            assert leave.wait(30)
            return order

        call = asyncio.ensure_future(asyncio.to_thread(first(nodes, hold), order))
        assert await asyncio.to_thread(entered.wait, 30)
        with pytest.raises(CONFLICTS):
            await asyncio.to_thread(second(nodes, never), order)
        leave.set()
        assert await call == order
        assert await asyncio.to_thread(second(nodes, never), order) == order


class Killed(BaseException):
    """The process dies: Powertools gives the key back for `Exception` alone."""


async def abandoned(nodes: list[RedisServer]) -> str:
    """Let Powertools leave a claim behind that lapses; return its key."""

    def die(order: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        await asyncio.to_thread(powertools(nodes, die, lease_seconds=0.02), 1)
    ((node, key),) = [(node, key) for node in nodes for key in told(node, "KEYS", "pay#*")]

    async def has_lapsed() -> bool:
        seconds, microseconds = told(node, "TIME")
        now = int(seconds) * 1000 + int(microseconds) // 1000
        return bool(json.loads(told(node, "GET", key))["in_progress_expiration"] < now)

    await until(has_lapsed)
    return str(key)


async def test_we_take_over_what_powertools_abandoned(nodes: list[RedisServer]) -> None:
    await abandoned(nodes)
    assert await asyncio.to_thread(aidem(nodes, lambda _order: "ours"), 1) == "ours"
    assert await asyncio.to_thread(powertools(nodes, never), 1) == "ours"


async def test_powertools_takes_over_what_we_abandoned(nodes: list[RedisServer]) -> None:
    key = await abandoned(nodes)
    async with RedisPersistenceLayer(f"redis+cluster://127.0.0.1:{nodes[0].port}") as layer:
        assert (await claimed(layer, key, lease_seconds=-1)).owner == "ours"
    assert await asyncio.to_thread(powertools(nodes, lambda _order: "theirs"), 1) == "theirs"
    assert await asyncio.to_thread(aidem(nodes, never), 1) == "theirs"
