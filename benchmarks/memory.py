"""The memory layer, and the local cache, against Powertools on a dict: what the engine itself costs."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools.utilities import idempotency as powertools

from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer
from benchmarks._measure import race
from benchmarks._powertools import DictPersistenceLayer
from benchmarks._rows import at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks._measure import Effort, Stopwatch
    from benchmarks._rows import Row

POWERTOOLS = "Powertools on a dict"

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")


def rows(effort: Effort) -> Iterator[Row]:
    with asyncio.Runner() as runner:
        for uses_cache in (False, True):
            sides = _Sides(runner, calls=effort.calls(1000), uses_cache=uses_cache)
            result = race({"aidem": sides.ours, POWERTOOLS: sides.theirs}, rounds=effort.rounds(31))
            if uses_cache:
                yield result.times("local-cache hit", lap="replay", against=POWERTOOLS, by="cpu", target=at_most(0.5))
            else:
                yield result.times("first call", lap="first", against=POWERTOOLS, by="cpu", target=at_most(1.0))
                yield result.times("replay", lap="replay", against=POWERTOOLS, by="cpu", target=at_most(0.6))


class _Sides:
    """The same function, made idempotent by either library, called in turn with the same orders."""

    def __init__(self, runner: asyncio.Runner, *, calls: int, uses_cache: bool) -> None:
        self._runner = runner
        self._orders = [{"id": number, "amount": 10} for number in range(calls)]
        self._options: dict[str, Any] = {"use_local_cache": True, "local_cache_max_items": calls} if uses_cache else {}

    def ours(self, stopwatch: Stopwatch) -> None:
        layer, config = MemoryPersistenceLayer(), IdempotencyConfig(**self._options)

        @idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)
        async def pay(*, order: dict[str, int]) -> dict[str, int]:
            return {"receipt": order["id"]}

        async def both() -> None:
            for lap in ("first", "replay"):
                with stopwatch.lap(lap, calls=len(self._orders)):
                    for order in self._orders:
                        await pay(order=order)

        self._runner.run(both())

    def theirs(self, stopwatch: Stopwatch) -> None:
        layer, config = DictPersistenceLayer(), powertools.IdempotencyConfig(**self._options)

        @powertools.idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)
        def pay(*, order: dict[str, int]) -> dict[str, int]:
            return {"receipt": order["id"]}

        for lap in ("first", "replay"):
            with stopwatch.lap(lap, calls=len(self._orders)):
                for order in self._orders:
                    pay(order=order)
