"""One process of a fleet: calls one function for every key, and writes what happens to a log that all share.

`python -m tests.support.processes.worker ORDERS`, where ORDERS are `harness.Orders` as JSON. It says `ready`, waits
for a line, works, and leaves. Every event is one `write` to a file opened with O_APPEND, so
what a killed process wrote is there.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from aidem import AbandonedExecution, Happened, IdempotencyConfig, current_execution, idempotent_function
from aidem.exceptions import IdempotencyError


class Log:
    """Appends events; monotonic time is the same clock in all processes of the machine."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, kind: str, key: str, **facts: Any) -> None:
        event = {"kind": kind, "key": key, "pid": os.getpid(), "at": time.monotonic(), "wall": time.time()} | facts
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def count(self, kind: str, key: str) -> int:
        """Return how many events of a kind all processes have written about a key."""
        start = json.dumps({"kind": kind, "key": key}).encode().rstrip(b"}") + b","
        return sum(line.startswith(start) for line in self._path.read_bytes().splitlines())


def layer_of(factory: str, argument: str) -> Any:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)(argument)


def check_of(orders: dict[str, Any], log: Log) -> Any:
    if not orders["asks_after_calls"]:
        return "run_again"

    async def find_out(abandoned: AbandonedExecution) -> Happened:
        key = abandoned.payload["key"]
        log.write("asked", key)
        while log.count("call", key) < orders["asks_after_calls"]:  # noqa: ASYNC110 - other processes write it
            await asyncio.sleep(0.01)
        return Happened({"effect": "found"})

    return find_out


def keys_of(orders: dict[str, Any], chance: random.Random) -> list[str]:
    """Return the keys in the order in which this worker calls them; last those at which others end."""
    keys = list(orders["keys"])
    if orders["shuffled"]:
        chance.shuffle(keys)
    return sorted(keys, key=lambda key: key in orders["ends"] and not is_own(key, orders))


def is_own(key: str, orders: dict[str, Any]) -> bool:
    """Whether it is the key in whose body this worker ends."""
    return key in orders["ends"] and list(orders["ends"]).index(key) == orders["seed"]


async def until_begun(key: str, orders: dict[str, Any], log: Log) -> None:
    """Wait for the body in which another worker ends."""
    while key in orders["ends"] and not is_own(key, orders) and not log.count("start", key):  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.01)


async def act(key: str, orders: dict[str, Any], log: Log) -> None:
    """End in the body, if this is the key for it; and wait for as many calls as there are to be."""
    if is_own(key, orders):
        os.kill(os.getpid(), orders["ends"][key])
    while orders["together"] and log.count("call", key) < orders["together"]:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.01)


async def work(orders: dict[str, Any]) -> None:
    log = Log(orders["log"])
    chance = random.Random(f"{orders['seed']}")
    config = IdempotencyConfig(
        event_key_jmespath="key",
        lease_seconds=orders["lease_seconds"],
        wait_timeout_seconds=orders["wait_timeout_seconds"],
        on_abandoned=check_of(orders, log),
    )
    left = keys_of(orders, chance)[::-1]

    async with layer_of(orders["factory"], orders["argument"]) as layer:

        @idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config, key_prefix="fleet")
        async def effect(order: dict[str, str]) -> dict[str, Any]:
            record = current_execution().record
            assert record is not None
            facts = {"fence": record.fence, "effect": os.urandom(8).hex()}
            key = order["key"]
            log.write("start", key, **facts, lease_end=record.in_progress_expiry_timestamp)
            await asyncio.sleep(chance.uniform(*orders["body_seconds"]))
            await act(key, orders, log)
            log.write("end", key, **facts)
            return facts

        async def call(key: str) -> None:
            await until_begun(key, orders, log)
            log.write("call", key)
            try:
                result = await effect({"key": key})
            except IdempotencyError as error:
                log.write("error", key, error=type(error).__name__)
            else:
                log.write("result", key, **result)

        async def call_some() -> None:
            while left:
                await call(left.pop())

        os.write(1, b"ready\n")
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.gather(*(call_some() for _ in range(orders["tasks"])))


if __name__ == "__main__":
    asyncio.run(work(json.loads(sys.argv[1])))
