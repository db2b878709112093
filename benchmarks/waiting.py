"""A thousand callers of one key in one process: what they ask of the store while they wait.

These are counts, not times, so they are taken on an event loop whose time jumps to the next timer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aidem import IdempotencyConfig, idempotent_function
from benchmarks._rows import Row, at_most, exactly
from tests.support.planned import PlannedLayer, VirtualTimeLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from benchmarks._measure import Effort

CONFIG = IdempotencyConfig(wait_timeout_seconds=100, lease_seconds=100)  # no renewal while it is counted
FIRST_SECONDS, LATER_SECONDS = 5, 20


def rows(effort: Effort) -> Iterator[Row]:
    callers = effort.calls(1000)
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        executions, requests = runner.run(_owner_here(callers))
        first, later = runner.run(_owner_elsewhere(callers))
    who = f"{callers:,} callers of one key"
    yield Row(what=f"{who}: executions", ours=executions, unit="executions", target=exactly(1))
    yield Row(what=f"{who}, owner in this process", ours=requests, unit="requests", target=exactly(0))
    elsewhere = f"{who}, owner elsewhere"
    yield Row(what=f"{elsewhere}, first {FIRST_SECONDS} s", ours=first, unit="requests", target=at_most(20))
    yield Row(what=f"{elsewhere}, then", ours=later, unit="requests/s", target=at_most(1))


async def _owner_here(callers: int) -> tuple[int, int]:
    """Return how often the function ran, and what was asked of the store beside the owner's claim."""
    layer, body = PlannedLayer(), _Body()
    calls = asyncio.gather(*(body.bound_to(layer)() for _ in range(callers)))
    await asyncio.sleep(FIRST_SECONDS + LATER_SECONDS)
    requests = len(layer.calls) - 1
    body.may_end.set()
    await calls
    return body.executions, requests


async def _owner_elsewhere(callers: int) -> tuple[int, float]:
    """Return how often the store was asked in the first seconds, and how often in each second after that."""
    owners, body = PlannedLayer(), _Body()
    layer = PlannedLayer(inner=owners.inner)  # nothing but the records is shared
    owner = asyncio.ensure_future(body.bound_to(owners)())
    await asyncio.sleep(0)
    calls = asyncio.gather(*(body.bound_to(layer)() for _ in range(callers)))
    await asyncio.sleep(FIRST_SECONDS)
    first = len(layer.calls)
    await asyncio.sleep(LATER_SECONDS)
    later = (len(layer.calls) - first) / LATER_SECONDS
    body.may_end.set()
    await asyncio.gather(owner, calls)
    return first, later


class _Body:
    """A function that ends when it may, and counts its executions."""

    def __init__(self) -> None:
        self.executions = 0
        self.may_end = asyncio.Event()

    def bound_to(self, layer: PlannedLayer) -> Callable[[], Awaitable[None]]:
        return idempotent_function(persistence_store=layer, config=CONFIG)(self.run)

    async def run(self) -> None:
        self.executions += 1
        await self.may_end.wait()
