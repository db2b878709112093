"""Time that a test has stopped by other means than a clock of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import freezegun
import pytest

from aidem import IdempotencyConfig, idempotent_function, sync
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

if TYPE_CHECKING:
    from pathlib import Path


class LayerWithoutClock:
    """Somebody's layer: it is judged by the clock of the engine."""

    def __init__(self) -> None:
        self.inner = MemoryPersistenceLayer()

    def __getattr__(self, name: str) -> Any:
        if name == "clock":
            raise AttributeError(name)
        return getattr(self.inner, name)


@pytest.fixture(params=["memory", "sqlite", "without a clock"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "sqlite":
        return SQLitePersistenceLayer(tmp_path / "records")
    return MemoryPersistenceLayer() if request.param == "memory" else LayerWithoutClock()


async def test_time_that_freezegun_stops_and_moves_decides(layer: Any) -> None:
    calls: list[str] = []

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(expires_after_seconds=3600))
    async def charge(order: str) -> int:
        calls.append(order)
        return len(calls)

    with freezegun.freeze_time("2030-01-01", real_asyncio=True) as frozen:
        assert [await charge("o-1"), await charge("o-1")] == [1, 1]
        frozen.tick(3599)
        assert await charge("o-1") == 1
        frozen.tick(2)
        assert await charge("o-1") == 2
    if isinstance(layer, SQLitePersistenceLayer):
        await layer.aclose()


def test_it_decides_for_blocking_code_too(layer: Any) -> None:
    calls: list[str] = []

    @sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(expires_after_seconds=3600))
    def charge(order: str) -> int:
        calls.append(order)
        return len(calls)

    with freezegun.freeze_time("2030-01-01", real_asyncio=True) as frozen:
        assert [charge("o-1"), charge("o-1")] == [1, 1]
        frozen.tick(3601)
        assert charge("o-1") == 2
    sync.close()
