"""Time that freezegun has stopped decides: `python -m tests.support.frozen LAYER`, `LAYER` being `memory` or a path.

A process of its own, for freezegun looks at every module that is loaded, and some of another test's do not bear that.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import freezegun

from aidem import IdempotencyConfig, idempotent_function, sync
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

CONFIG = IdempotencyConfig(expires_after_seconds=3600)


class LayerWithoutClock:
    """Somebody's layer: it is judged by the clock of the engine."""

    def __init__(self) -> None:
        self.inner = MemoryPersistenceLayer()

    def __getattr__(self, name: str) -> Any:
        if name == "clock":
            raise AttributeError(name)
        return getattr(self.inner, name)


def layer_of(name: str) -> Any:
    if name == "without-clock":
        return LayerWithoutClock()
    return MemoryPersistenceLayer() if name == "memory" else SQLitePersistenceLayer(name)


async def in_async_code(layer: Any) -> None:
    calls: list[str] = []

    @idempotent_function(persistence_store=layer, config=CONFIG)
    async def charge(order: str) -> int:
        calls.append(order)
        return len(calls)

    with freezegun.freeze_time("2030-01-01", real_asyncio=True) as frozen:
        assert [await charge("o-1"), await charge("o-1")] == [1, 1]
        frozen.tick(3599)
        assert await charge("o-1") == 1
        frozen.tick(2)
        assert await charge("o-1") == 2
    await layer.aclose()


def in_blocking_code(layer: Any) -> None:
    calls: list[str] = []

    @sync.idempotent_function(persistence_store=layer, config=CONFIG)
    def charge(order: str) -> int:
        calls.append(order)
        return len(calls)

    with freezegun.freeze_time("2031-01-01", real_asyncio=True) as frozen:
        assert [charge("o-1"), charge("o-1")] == [1, 1]
        frozen.tick(3601)
        assert charge("o-1") == 2
    sync.close()


if __name__ == "__main__":
    asyncio.run(in_async_code(layer_of(sys.argv[1])))
    in_blocking_code(layer_of(sys.argv[1]))
