"""The memory layer, and the local cache, against Powertools on a dict: what the engine itself costs; and growth."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools.utilities import idempotency as powertools

from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence import Claimed
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import claim_of, completed_of
from benchmarks._measure import Lap, Stopwatch, fresh_keys, race
from benchmarks._powertools import DictPersistenceLayer
from benchmarks._rows import A_THOUSAND, at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Effort, Race
    from benchmarks._rows import Row

POWERTOOLS = "Powertools on a dict"
SIZES = (10_000, 100_000, 1_000_000)

warnings.filterwarnings("ignore", message="Couldn't determine the remaining time left")


def rows(effort: Effort) -> Iterator[Row]:
    result = _against_powertools(effort, uses_cache=False)
    yield result.times("first call", lap="first", against=POWERTOOLS, by="cpu", target=at_most(0.8))
    yield result.times("replay", lap="replay", against=POWERTOOLS, by="cpu", target=at_most(0.55))
    result = _against_powertools(effort, uses_cache=True)
    yield result.times("local-cache hit", lap="replay", against=POWERTOOLS, by="cpu", target=at_most(0.3))
    for size in map(effort.calls, SIZES):
        result = _growth(effort, size)
        for lap, what in (("first", "first call"), ("replay", "replay")):
            grown = f"{what} among {size:,} records"
            yield result.times(grown, lap=lap, against=A_THOUSAND, by="cpu", target=at_most(1.3))


# --- Against Powertools -----------------------------------------------------------------------------------------------


def _against_powertools(effort: Effort, *, uses_cache: bool) -> Race:
    calls = effort.calls(1000)
    options: dict[str, Any] = {"use_local_cache": True, "local_cache_max_items": calls} if uses_cache else {}

    def theirs(stopwatch: Stopwatch) -> None:
        layer, config = DictPersistenceLayer(), powertools.IdempotencyConfig(**options)

        @powertools.idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)
        def pay(*, order: dict[str, Any]) -> dict[str, str]:
            return {"receipt": order["id"]}

        orders = _orders(calls)
        for lap in ("first", "replay"):
            with stopwatch.lap(lap, calls=calls):
                for order in orders:
                    pay(order=order)

    with asyncio.Runner() as runner:

        def ours(stopwatch: Stopwatch) -> None:
            layer, config = MemoryPersistenceLayer(), IdempotencyConfig(**options)
            runner.run(_laps(stopwatch, layer, config, calls))

        return race({"aidem": ours, POWERTOOLS: theirs}, rounds=effort.rounds(31))


async def _laps(stopwatch: Stopwatch, layer: MemoryPersistenceLayer, config: IdempotencyConfig, calls: int) -> None:
    @idempotent_function(data_keyword_argument="order", persistence_store=layer, config=config)
    async def pay(*, order: dict[str, Any]) -> dict[str, str]:
        return {"receipt": order["id"]}

    orders = _orders(calls)
    for lap in ("first", "replay"):
        with stopwatch.lap(lap, calls=calls):
            for order in orders:
                await pay(order=order)


def _orders(count: int) -> list[dict[str, Any]]:
    return [{"id": key, "amount": 10} for key in fresh_keys(count)]


# --- Growth -----------------------------------------------------------------------------------------------------------


def _growth(effort: Effort, large: int) -> Race:
    """Measure in two processes, since a large heap slows the garbage collection of everything beside it."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:

        def contender(size: int) -> Callable[[Stopwatch], None]:
            process = ProcessPoolExecutor(1, mp_context=context, initializer=_Filled.make, initargs=(size,))
            stack.enter_context(process)
            return lambda stopwatch: stopwatch.laps.update(process.submit(_Filled.laps, effort.calls(1000)).result())

        return race({"aidem": contender(large), A_THOUSAND: contender(1000)}, rounds=effort.rounds(15))


class _Filled:
    """The layer of one process."""

    layer: MemoryPersistenceLayer

    @classmethod
    def make(cls, size: int) -> None:
        """Keep so many completed records."""
        cls.layer = MemoryPersistenceLayer()
        asyncio.run(cls._fill(size))

    @classmethod
    async def _fill(cls, size: int) -> None:
        for number in range(size):
            now = time.time()
            answer = await cls.layer.acquire(claim_of(f"old-{number}", now=now, kept_seconds=7200), now=now)
            assert isinstance(answer, Claimed)
            await cls.layer.complete(completed_of(answer.record, now=now, kept_seconds=7200), now=now)

    @classmethod
    def laps(cls, calls: int) -> dict[str, Lap]:
        """Take one round."""
        stopwatch = Stopwatch()
        asyncio.run(_laps(stopwatch, cls.layer, IdempotencyConfig(expires_after_seconds=7200), calls))
        return stopwatch.laps
