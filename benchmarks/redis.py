"""Redis: against one EVALSHA per await on redis.asyncio, against Powertools, and against idemkit."""

from __future__ import annotations

import asyncio
import json
import warnings
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

import idemkit
import redis
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency.persistence.redis import CachePersistenceLayer
from redis.asyncio import Redis

from aidem import idempotent_function
from aidem.persistence.redis import RedisPersistenceLayer
from benchmarks._measure import first_and_replay, fresh_keys, one_after_another, race, spread
from benchmarks._rows import Row, at_least, at_most, exactly
from benchmarks._servers import redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis.asyncio.client import Monitor

    from benchmarks._measure import Call, Effort, Stopwatch
    from tests.support.servers import RedisServer

RAW = "one EVALSHA per await"
POWERTOOLS = "Powertools, one thread"
IDEMKIT = "idemkit"
COUNTED_CALLS = 100

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")
warnings.filterwarnings("ignore", message=".* has no scope")

# About what our own scripts do, as one would write them by hand.
CLAIM = """
local found = redis.call('GET', KEYS[1])
if found and cjson.decode(found).expiration >= tonumber(redis.call('TIME')[1]) then return found end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
COMPLETE = """
local found = redis.call('GET', KEYS[1])
if found and cjson.decode(found).owner ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
OWNER = "0123456789abcdef0123456789abcdef"
CLAIMED = {"status": "INPROGRESS", "expiration": 99999999999, "owner": OWNER}
COMPLETED = CLAIMED | {"status": "COMPLETED", "data": '{"paid": true}'}
KEPT_MILLISECONDS = 3_600_000


def rows(effort: Effort) -> Iterator[Row]:
    with redis_server() as server, asyncio.Runner() as runner, ExitStack() as cleanup:
        stack = AsyncExitStack()
        cleanup.callback(lambda: runner.run(stack.aclose()))
        ours, calls = runner.run(_ours(server, stack)), effort.calls(2000)

        def contender(call: Call, *tasks: int) -> Callable[[Stopwatch], None]:
            return lambda stopwatch: runner.run(first_and_replay(stopwatch, call, calls=calls, tasks=tasks))

        result = race(
            {
                "aidem": contender(ours, 32, 1),
                RAW: contender(runner.run(_raw(server, stack)), 32, 1),
                IDEMKIT: contender(runner.run(_idemkit(server, stack)), 32),
                POWERTOOLS: one_after_another(_powertools(server), calls=calls),
            },
            rounds=effort.rounds(15),
        )
        for what, lap in (("first calls", "first"), ("replays", "replay")):
            many, one = f"{what}, 32 tasks", f"{what}, one task"
            yield result.rates(many, lap=f"{lap}/32", against=RAW, by="wall", target=at_least(1.8))
            yield result.rates(many, lap=f"{lap}/32", against=IDEMKIT, by="wall")
            yield result.times(one, lap=f"{lap}/1", against=RAW, by="wall", target=at_most(1.25))
            yield result.times(one, lap=f"{lap}/1", against=POWERTOOLS, by="wall")
        first, replay = runner.run(_commands(server, ours))
        yield Row(what="commands of a first call", ours=first, unit="commands", target=exactly(2))
        yield Row(what="commands of a replay", ours=replay, unit="commands", target=exactly(1))


async def _ours(server: RedisServer, stack: AsyncExitStack) -> Call:
    layer = await stack.enter_async_context(RedisPersistenceLayer(server.url))

    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


async def _raw(server: RedisServer, stack: AsyncExitStack) -> Call:
    client = await stack.enter_async_context(Redis.from_url(server.url))
    claim, complete = [await client.script_load(script) for script in (CLAIM, COMPLETE)]

    async def pay(order: str) -> object:
        key = f"test-func.benchmarks.redis.pay#{order:0>64}"
        found = await client.evalsha(claim, 1, key, json.dumps(CLAIMED), KEPT_MILLISECONDS)
        if found is not None:
            return json.loads(json.loads(found)["data"])
        result = {"paid": True}
        text = json.dumps(COMPLETED | {"data": json.dumps(result)})
        await client.evalsha(complete, 1, key, text, KEPT_MILLISECONDS, OWNER)
        return result

    return pay


async def _idemkit(server: RedisServer, stack: AsyncExitStack) -> Call:
    backend = idemkit.RedisBackend(await stack.enter_async_context(Redis.from_url(server.url)))

    @idemkit.idempotent(backend=backend, config=idemkit.MethodConfig(key_fields=["order"]))
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


def _powertools(server: RedisServer) -> Callable[[str], object]:
    layer = CachePersistenceLayer(client=redis.Redis.from_url(server.url))
    config = powertools.IdempotencyConfig()

    @powertools.idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)
    def pay(*, order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return lambda key: pay(order=key)


async def _commands(server: RedisServer, call: Call) -> list[float]:
    """Return how many commands came over the wire for a first call, and for a replay; what scripts call does not."""
    keys, counts = fresh_keys(COUNTED_CALLS), []
    async with Redis.from_url(server.url) as watcher, Redis.from_url(server.url) as other:
        await other.ping()  # connects
        async with watcher.monitor() as monitor:
            for _ in ("first", "replay"):
                await spread(call, keys, tasks=32)
                await other.echo("end")
                counts.append(await _count_until(monitor, "ECHO end") / COUNTED_CALLS)
    return counts


async def _count_until(monitor: Monitor, end: str) -> int:
    count = 0
    while (command := await monitor.next_command())["command"] != end:
        count += command["client_type"] != "lua"
    return count
