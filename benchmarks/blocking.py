"""`aidem.sync` against Powertools: on records in memory, and on Redis."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import redis
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency.persistence.redis import CachePersistenceLayer

from aidem import sync
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.redis import RedisPersistenceLayer
from benchmarks._measure import one_after_another, race
from benchmarks._powertools import DictPersistenceLayer
from benchmarks._rows import at_most
from benchmarks._servers import redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort
    from benchmarks._rows import Row

ON_DICT, ON_REDIS = "Powertools on a dict", "Powertools on Redis"

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")


def rows(effort: Effort) -> Iterator[Row]:
    calls, rounds = effort.calls(2000), effort.rounds(15)
    with redis_server() as server:
        on_redis = race(
            {
                "aidem": one_after_another(_ours(RedisPersistenceLayer(server.url)), calls=calls),
                ON_REDIS: one_after_another(
                    _theirs(CachePersistenceLayer(client=redis.Redis.from_url(server.url))), calls=calls
                ),
            },
            rounds=rounds,
        )
        sync.close()
    yield on_redis.times("Redis, first call", lap="first/1", against=ON_REDIS, by="wall", target=at_most(1.2))
    yield on_redis.times("Redis, replay", lap="replay/1", against=ON_REDIS, by="wall", target=at_most(0.6))
    on_dict = race(
        {
            "aidem": one_after_another(_ours(MemoryPersistenceLayer()), calls=calls),
            ON_DICT: one_after_another(_theirs(DictPersistenceLayer()), calls=calls),
        },
        rounds=rounds,
    )
    sync.close()
    yield on_dict.times("memory, first call", lap="first/1", against=ON_DICT, by="wall")
    yield on_dict.times("memory, replay", lap="replay/1", against=ON_DICT, by="wall")


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
