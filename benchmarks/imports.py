"""`import aidem` in a fresh interpreter, and what it leaves unloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks._fresh import result_of
from benchmarks._measure import Lap, race
from benchmarks._rows import Row, at_most, exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Stopwatch

POWERTOOLS = "Powertools' idempotency"
OPTIONAL = {
    "aioboto3",
    "aiobotocore",
    "anyio",
    "boto3",
    "botocore",
    "fastapi",
    "opentelemetry",
    "pydantic",
    "redis",
    "sqlite3",
    "starlette",
}

IMPORT = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
result = wall, cpu, sorted({{name.partition(".")[0] for name in sys.modules}})
"""


def rows(effort: Effort) -> Iterator[Row]:
    result = race(
        {"aidem": _import("aidem"), POWERTOOLS: _import("aws_lambda_powertools.utilities.idempotency")},
        rounds=effort.rounds(21),
    )
    yield result.times("import", lap="import", against=POWERTOOLS, by="cpu", target=at_most(0.45))
    _, loaded = _imported("aidem")
    yield Row(what="optional modules loaded", ours=len(loaded & OPTIONAL), unit="modules", target=exactly(0))


def _import(module: str) -> Callable[[Stopwatch], None]:
    def contender(stopwatch: Stopwatch) -> None:
        stopwatch.laps["import"], _ = _imported(module)

    return contender


def _imported(module: str) -> tuple[Lap, set[str]]:
    """Import a module where nothing but Python itself has been imported."""
    wall, cpu, loaded = result_of(IMPORT.format(module=module))
    return Lap(wall, cpu), set(loaded)
