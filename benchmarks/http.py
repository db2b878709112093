"""FastAPI under uvicorn, one worker, with records on Redis: against the bare app, and against idemkit."""

from __future__ import annotations

import os
import sys
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING

from benchmarks._http_load import Load
from benchmarks._measure import OURS, Race, fresh_keys, race
from benchmarks._rows import at_least
from benchmarks._servers import redis_server
from tests.support import aws_servers, servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Stopwatch
    from benchmarks._rows import Row

CONNECTIONS = 32
BARE, FUNCTION, IDEMKIT = "the bare app", "idempotent_function", "idemkit"
SIDES = {OURS: "route", BARE: "bare", FUNCTION: "function", IDEMKIT: "idemkit"}
REPLAYED = {"route": b"idempotent-replayed", "idemkit": b"idempotency-replayed"}
OPTIONS = ("--no-access-log", "--log-level", "error", "--timeout-keep-alive", "3600")
BODY = b'{"order_id": "o-1", "cents": 4200, "currency": "EUR"}'


def rows(effort: Effort) -> Iterator[Row]:
    calls = effort.calls(1000)
    with redis_server() as server, ExitStack() as stack:
        result = race(
            {name: _contender(stack, side, server.url, calls=calls) for name, side in SIDES.items()},
            rounds=effort.rounds(15),
        )
    of_functions = Race({OURS: result.rounds[FUNCTION], BARE: result.rounds[BARE]})
    for what, lap, target in (("fresh", "first", at_least(0.65)), ("replay", "replay", at_least(1.0))):
        yield result.rates(f"IdempotentRoute, {what}", lap=lap, against=BARE, by="wall", target=target)
        yield of_functions.rates(f"idempotent_function, {what}", lap=lap, against=BARE, by="wall")
        yield result.rates(f"IdempotentRoute, {what}", lap=lap, against=IDEMKIT, by="wall")


def _contender(stack: ExitStack, side: str, redis_url: str, *, calls: int) -> Callable[[Stopwatch], None]:
    """Start a service and return what sends requests to it."""
    port = servers.free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks._http_service:app", "--port", str(port), *OPTIONS]
    environment = {"SIDE": side, "REDIS_URL": redis_url, "PYTHONPATH": os.pathsep.join(sys.path)}
    url = stack.enter_context(aws_servers.started(command, port, environment))
    load = stack.enter_context(Load(port, connections=CONNECTIONS))

    def contender(stopwatch: Stopwatch) -> None:
        requests = [_request(key) for key in fresh_keys(calls)]
        for name, header in (("first", b""), ("replay", REPLAYED.get(side, b""))):
            before = _cpu_seconds(url)
            with stopwatch.lap(name, calls=calls):
                load.send(requests, status=b" 201 ", header=header)
            # The CPU time that counts is that of the service, and of nobody else.
            stopwatch.laps[name] = stopwatch.laps[name]._replace(cpu=(_cpu_seconds(url) - before) / calls)

    return contender


def _cpu_seconds(url: str) -> float:
    with urllib.request.urlopen(f"{url}/cpu") as answer:
        return float(answer.read())


def _request(key: str) -> bytes:
    head = (
        "POST /payments HTTP/1.1",
        "host: 127.0.0.1",
        "authorization: Bearer ann",
        f'idempotency-key: "{key}"',
        "content-type: application/json",
        f"content-length: {len(BODY)}",
        "",
        "",
    )
    return "\r\n".join(head).encode() + BODY
