"""A Lambda function that starts: what its imports and layer cost, and its first call, in a fresh interpreter.

Each side is the program that one would deploy, with compiled modules. The servers answer at once and are warm, so the
times are those of the process itself. On Lambda the first part is the init, and the second part is what the first
invocation waits for. DynamoDB is reached by TLS, as on AWS, so both clients load the certificates of all authorities.
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from benchmarks._fresh import result_of
from benchmarks._measure import Lap, race
from benchmarks._rows import at_most
from benchmarks._servers import directory_on_disk, instant_dynamodb_with_tls, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks._measure import Effort, Stopwatch
    from benchmarks._rows import Row, Target

BOTO3, REDIS_PY, ON_DICT = "Powertools with boto3", "Powertools with redis-py", "Powertools on a dict"
CLIENT = "aiobotocore alone"

HIDDEN = ("httpx", "opentelemetry")
"""Clients load these where they are installed: here they are, for tests, and in a Lambda function they are not."""

PROGRAM = """
import sys, time
sys.modules |= dict.fromkeys({hidden})
wall, cpu = time.perf_counter(), time.process_time()
{init}
init = time.perf_counter() - wall, time.process_time() - cpu
wall, cpu = time.perf_counter(), time.process_time()
handler({{"id": time.time_ns()}}, None)
call = time.perf_counter() - wall, time.process_time() - cpu
result = init, call
"""
OURS = """
from aidem import IdempotencyConfig, sync
{layer}
@sync.idempotent(persistence_store=layer, config=IdempotencyConfig(event_key_jmespath="id"))
def handler(event, context):
    return {{"statusCode": 200}}
"""
OURS_ASYNC = """
from aidem import IdempotencyConfig, idempotent
from aidem.awslambda import lambda_handler
{layer}
@lambda_handler(warm=[layer])
@idempotent(persistence_store=layer, config=IdempotencyConfig(event_key_jmespath="id"))
async def handler(event, context):
    return {{"statusCode": 200}}
"""
THEIRS = """
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent
{layer}
@idempotent(persistence_store=layer, config=IdempotencyConfig(event_key_jmespath="id"))
def handler(event, context):
    return {{"statusCode": 200}}
"""

DYNAMODB = """
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
layer = DynamoDBPersistenceLayer("benchmark")
"""
THEIR_DYNAMODB = """
from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer
layer = DynamoDBPersistenceLayer("benchmark")
"""
CLIENT_ALONE = """
import asyncio
from aiobotocore.session import get_session
update = dict(
    UpdateExpression="SET #a = :a", ExpressionAttributeNames={"#a": "a"}, ExpressionAttributeValues={":a": {"S": "a"}}
)
async def update_twice(key):
    async with get_session().create_client("dynamodb") as client:
        for _ in range(2):
            await client.update_item(TableName="benchmark", Key={"id": {"S": key}}, **update)
def handler(event, context):
    asyncio.run(update_twice(str(event["id"])))
"""
REDIS = """
from aidem.persistence.redis import RedisPersistenceLayer
layer = RedisPersistenceLayer("{url}")
"""
THEIR_REDIS = """
from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer
layer = CachePersistenceLayer(url="{url}")
"""
SQLITE = """
from aidem.persistence.sqlite import SQLitePersistenceLayer
layer = SQLitePersistenceLayer("{path}")
"""
MEMORY = """
from aidem.persistence.memory import MemoryPersistenceLayer
layer = MemoryPersistenceLayer()
"""
THEIR_DICT = """
from benchmarks._powertools import DictPersistenceLayer
layer = DictPersistenceLayer()
"""


def rows(effort: Effort) -> Iterator[Row]:
    rounds = effort.rounds(9)
    with instant_dynamodb_with_tls():
        for what, ours in (("DynamoDB", OURS), ("DynamoDB, lambda_handler", OURS_ASYNC)):
            programs = {"aidem": ours.format(layer=DYNAMODB), BOTO3: _theirs(THEIR_DYNAMODB), CLIENT: CLIENT_ALONE}
            yield from _compared(what, programs, rounds, targets={BOTO3: at_most(1.5), CLIENT: at_most(1.1)})
    with redis_server() as server:
        layer, their_layer = REDIS.format(url=server.url), THEIR_REDIS.format(url=server.url)
        for what, ours in (("Redis", OURS), ("Redis, lambda_handler", OURS_ASYNC)):
            yield from _compared(what, {"aidem": ours.format(layer=layer), REDIS_PY: _theirs(their_layer)}, rounds)
    with directory_on_disk() as directory:
        sqlite = SQLITE.format(path=directory / "records.sqlite3")
        for what, layer in (("SQLite", sqlite), ("memory", MEMORY)):
            yield from _compared(what, {"aidem": OURS.format(layer=layer), ON_DICT: _theirs(THEIR_DICT)}, rounds)


def _compared(
    what: str, programs: Mapping[str, str], rounds: int, targets: Mapping[str, Target] = MappingProxyType({})
) -> Iterator[Row]:
    result = race({name: partial(_start, init) for name, init in programs.items()}, rounds=rounds)
    for against in [name for name in programs if name != "aidem"]:
        for lap in ("init", "first call", "both"):
            target = targets.get(against) if lap == "both" else None
            yield result.times(f"{what}: {lap}", lap=lap, against=against, by="cpu", target=target)


def _theirs(layer: str) -> str:
    return THEIRS.format(layer=layer)


def _start(init: str, stopwatch: Stopwatch) -> None:
    """Run a program where nothing but Python itself has been started."""
    init_lap, call = (Lap(*lap) for lap in result_of(PROGRAM.format(init=init, hidden=HIDDEN)))
    stopwatch.laps |= {
        "init": init_lap,
        "first call": call,
        "both": Lap(init_lap.wall + call.wall, init_lap.cpu + call.cpu),
    }
