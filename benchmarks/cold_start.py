"""A Lambda function that starts: what its imports and layer cost, and its first call, in a fresh interpreter.

Each side is the program that one would deploy. The servers answer at once and are warm, so what is compared is what the
process itself does. On Lambda the first part is the init, and the second one what the first invocation waits for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

from benchmarks._measure import Lap, race
from benchmarks._servers import directory_on_disk, instant_dynamodb, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks._measure import Effort, Stopwatch
    from benchmarks._rows import Row

BOTO3, REDIS_PY, ON_DICT = "Powertools with boto3", "Powertools with redis-py", "Powertools on a dict"

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
import json
print(json.dumps([init, call]), flush=True)
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
    with instant_dynamodb():
        for what, ours in (("DynamoDB", OURS), ("DynamoDB, lambda_handler", OURS_ASYNC)):
            yield from _compared(what, {"aidem": ours.format(layer=DYNAMODB), BOTO3: _theirs(THEIR_DYNAMODB)}, rounds)
    with redis_server() as server:
        layer, their_layer = REDIS.format(url=server.url), THEIR_REDIS.format(url=server.url)
        for what, ours in (("Redis", OURS), ("Redis, lambda_handler", OURS_ASYNC)):
            yield from _compared(what, {"aidem": ours.format(layer=layer), REDIS_PY: _theirs(their_layer)}, rounds)
    with directory_on_disk() as directory:
        sqlite = SQLITE.format(path=directory / "records.sqlite3")
        for what, layer in (("SQLite", sqlite), ("memory", MEMORY)):
            yield from _compared(what, {"aidem": OURS.format(layer=layer), ON_DICT: _theirs(THEIR_DICT)}, rounds)


def _compared(what: str, programs: Mapping[str, str], rounds: int) -> Iterator[Row]:
    _, against = programs
    result = race({name: partial(_start, init) for name, init in programs.items()}, rounds=rounds)
    for lap in ("init", "first call", "both"):
        yield result.times(f"{what}: {lap}", lap=lap, against=against, by="cpu")


def _theirs(layer: str) -> str:
    return THEIRS.format(layer=layer)


def _start(init: str, stopwatch: Stopwatch) -> None:
    """Run a program where nothing but Python itself has been started."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(init=init, hidden=HIDDEN)]
    laps = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    init_lap, call = (Lap(*lap) for lap in laps)
    stopwatch.laps |= {
        "init": init_lap,
        "first call": call,
        "both": Lap(init_lap.wall + call.wall, init_lap.cpu + call.cpu),
    }
