"""DynamoDB: against aioboto3's put and update with default settings, against Powertools, and against idemkit.

The server is the stub of `_instant_dynamodb`, in a process of its own: what is compared is what clients cost.
"""

from __future__ import annotations

import asyncio
import warnings
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

import aioboto3
import idemkit
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency.persistence.dynamodb import (
    DynamoDBPersistenceLayer as PowertoolsLayer,
)

from aidem import idempotent_function
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from benchmarks._measure import Call, first_and_replay, fresh_keys, one_after_another, race, spread
from benchmarks._rows import Row, at_least, exactly
from benchmarks._servers import instant_dynamodb, requests_so_far

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Stopwatch

TABLE = "benchmark"
RAW = "aioboto3 put + update"
POWERTOOLS = "Powertools, one thread"
IDEMKIT = "idemkit"
COUNTED_CALLS = 100
NEVER = {"N": "99999999999999"}

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")
warnings.filterwarnings("ignore", message=".* has no scope")


def rows(effort: Effort) -> Iterator[Row]:
    with instant_dynamodb() as url, asyncio.Runner() as runner, ExitStack() as cleanup:
        stack = AsyncExitStack()
        cleanup.callback(lambda: runner.run(stack.aclose()))
        ours, calls = runner.run(_ours(stack)), effort.calls(400)

        def contender(call: Call, *tasks: int) -> Callable[[Stopwatch], None]:
            return lambda stopwatch: runner.run(first_and_replay(stopwatch, call, calls=calls, tasks=tasks))

        result = race(
            {
                "aidem": contender(ours, 32, 1),
                RAW: contender(runner.run(_raw(stack)), 32),
                IDEMKIT: contender(runner.run(_idemkit(url, stack)), 32),
                POWERTOOLS: one_after_another(_powertools(), calls=calls),
            },
            rounds=effort.rounds(11),
        )
        for what, lap in (("first calls", "first"), ("replays", "replay")):
            many, target = f"{what}, 32 tasks", at_least(1.1) if lap == "first" else None
            yield result.rates(many, lap=f"{lap}/32", against=RAW, by="wall", target=target)
            yield result.rates(many, lap=f"{lap}/32", against=IDEMKIT, by="wall")
            yield result.times(f"{what}, one task", lap=f"{lap}/1", against=POWERTOOLS, by="wall")
        first, replay = runner.run(_requests(url, ours))
        yield Row(what="requests of a first call", ours=first, unit="requests", target=exactly(2))
        yield Row(what="requests of a replay", ours=replay, unit="requests", target=exactly(1))


async def _ours(stack: AsyncExitStack) -> Call:
    layer = await stack.enter_async_context(DynamoDBPersistenceLayer(TABLE))

    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


async def _raw(stack: AsyncExitStack) -> Call:
    """Do what Powertools asks of DynamoDB, without a library."""
    client = await stack.enter_async_context(aioboto3.Session().client("dynamodb"))

    async def pay(order: str) -> None:
        key = {"id": {"S": f"test-func.benchmarks.dynamodb.pay#{order:0>64}"}}
        try:
            await client.put_item(
                TableName=TABLE,
                Item=key | {"expiration": NEVER, "in_progress_expiration": NEVER, "status": {"S": "INPROGRESS"}},
                ConditionExpression="attribute_not_exists(#id) OR #expiry < :now OR (#status = :inprogress AND "
                "attribute_exists(#in_progress_expiry) AND #in_progress_expiry < :now_in_millis)",
                ExpressionAttributeNames={
                    "#id": "id",
                    "#expiry": "expiration",
                    "#in_progress_expiry": "in_progress_expiration",
                    "#status": "status",
                },
                ExpressionAttributeValues={
                    ":now": {"N": "1"},
                    ":now_in_millis": {"N": "1"},
                    ":inprogress": {"S": "INPROGRESS"},
                },
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except client.exceptions.ConditionalCheckFailedException:
            return
        await client.update_item(
            TableName=TABLE,
            Key=key,
            UpdateExpression="SET #data = :data, #expiry = :expiry, #status = :status",
            ExpressionAttributeNames={"#data": "data", "#expiry": "expiration", "#status": "status"},
            ExpressionAttributeValues={
                ":expiry": NEVER,
                ":data": {"S": '{"paid": true}'},
                ":status": {"S": "COMPLETED"},
            },
        )

    return pay


async def _idemkit(url: str, stack: AsyncExitStack) -> Call:
    backend = idemkit.DynamoBackend.from_url(url, table=TABLE, create_table=False)
    stack.push_async_callback(backend.aclose)

    @idemkit.idempotent(backend=backend, config=idemkit.MethodConfig(key_fields=["order"]))
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


def _powertools() -> Callable[[str], object]:
    config = powertools.IdempotencyConfig()

    @powertools.idempotent_function(
        data_keyword_argument="order", persistence_store=PowertoolsLayer(TABLE), config=config
    )
    def pay(*, order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return lambda key: pay(order=key)


async def _requests(url: str, call: Call) -> list[float]:
    """Return how many requests the server had for a first call, and for a replay."""
    keys, counts = fresh_keys(COUNTED_CALLS), []
    for _ in ("first", "replay"):
        before = requests_so_far(url)
        await spread(call, keys, tasks=32)
        counts.append((requests_so_far(url) - before).total() / COUNTED_CALLS)
    return counts
