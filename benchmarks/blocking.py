"""`aidem.sync` against Powertools: on Redis, on DynamoDB, and on records in memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import redis
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer as PowertoolsLayer
from aws_lambda_powertools.utilities.idempotency.persistence.redis import CachePersistenceLayer

from aidem import sync
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.redis import RedisPersistenceLayer
from benchmarks._measure import one_after_another, race
from benchmarks._powertools import DictPersistenceLayer
from benchmarks._rows import at_most
from benchmarks._servers import instant_dynamodb, redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Race
    from benchmarks._rows import Row

ON_DICT, ON_DYNAMODB, ON_REDIS = "Powertools on a dict", "Powertools on DynamoDB", "Powertools on Redis"

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")


def rows(effort: Effort) -> Iterator[Row]:
    calls, rounds = effort.calls(2000), effort.rounds(15)
    with redis_server() as server:
        theirs = CachePersistenceLayer(client=redis.Redis.from_url(server.url))
        on_redis = _race(RedisPersistenceLayer(server.url), ON_REDIS, theirs, calls=calls, rounds=rounds)
    yield on_redis.times("Redis, first call", lap="first/1", against=ON_REDIS, by="wall", target=at_most(1.5))
    yield on_redis.times("Redis, replay", lap="replay/1", against=ON_REDIS, by="wall", target=at_most(0.6))
    with instant_dynamodb():
        ours = DynamoDBPersistenceLayer("benchmark")
        on_dynamodb = _race(ours, ON_DYNAMODB, PowertoolsLayer("benchmark"), calls=calls // 2, rounds=rounds)
    yield on_dynamodb.times("DynamoDB, first call", lap="first/1", against=ON_DYNAMODB, by="wall", target=at_most(1.2))
    yield on_dynamodb.times("DynamoDB, replay", lap="replay/1", against=ON_DYNAMODB, by="wall", target=at_most(1.2))
    on_dict = _race(MemoryPersistenceLayer(), ON_DICT, DictPersistenceLayer(), calls=calls, rounds=rounds)
    yield on_dict.times("memory, first call", lap="first/1", against=ON_DICT, by="wall")
    yield on_dict.times("memory, replay", lap="replay/1", against=ON_DICT, by="wall")


def _race(ours: Any, name: str, theirs: Any, *, calls: int, rounds: int) -> Race:
    contenders = {
        "aidem": one_after_another(_ours(ours), calls=calls),
        name: one_after_another(_theirs(theirs), calls=calls),
    }
    try:
        return race(contenders, rounds=rounds)
    finally:
        sync.close()


def _ours(layer: Any) -> Callable[[str], object]:
    @sync.idempotent_function(data_keyword_argument="order", persistence_store=layer)
    def pay(*, order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return lambda key: pay(order=key)


def _theirs(layer: Any) -> Callable[[str], object]:
    @powertools.idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=powertools.IdempotencyConfig()
    )
    def pay(*, order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return lambda key: pay(order=key)
