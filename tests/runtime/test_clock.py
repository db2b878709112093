"""Time that a test has stopped by other means than a clock of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import freezegun
import pytest

from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

if TYPE_CHECKING:
    from pathlib import Path

    from aidem.persistence import PersistenceLayer


@pytest.fixture(params=["memory", "sqlite"])
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> PersistenceLayer:
    return MemoryPersistenceLayer() if request.param == "memory" else SQLitePersistenceLayer(tmp_path / "records")


async def test_time_that_freezegun_stops_and_moves_decides(layer: PersistenceLayer) -> None:
    calls: list[str] = []

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(expires_after_seconds=3600))
    async def charge(order: str) -> int:
        calls.append(order)
        return len(calls)

    async with layer:
        with freezegun.freeze_time("2030-01-01", real_asyncio=True) as frozen:
            assert [await charge("o-1"), await charge("o-1")] == [1, 1]
            frozen.tick(3599)
            assert await charge("o-1") == 1
            frozen.tick(2)
            assert await charge("o-1") == 2
