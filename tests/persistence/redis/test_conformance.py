from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from redis.asyncio import Redis

from aidem.persistence import PersistenceLayer
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.testing import FakeClock, ScanConformance, TakeOverConformance
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server


class JudgedByAClock(TakeOverConformance, ScanConformance):
    """Judged by the clock that the layer was given."""

    kind: ClassVar[str]
    options: ClassVar[dict[str, bool]] = {}
    pytestmark: ClassVar = [*TakeOverConformance.pytestmark, pytest.mark.server]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls) -> Iterator[None]:
        with started(cls.kind) as cls.running:  # type: ignore[attr-defined]
            yield

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        url: str = self.running.url  # type: ignore[attr-defined]
        return RedisPersistenceLayer(url, clock=clock, **self.options)  # type: ignore[arg-type]


class TestRedis(JudgedByAClock):
    kind = "redis"


class TestValkey(JudgedByAClock):
    kind = "valkey"


class TestWithoutPowertools(JudgedByAClock):
    kind = "valkey"
    options: ClassVar[dict[str, bool]] = {"shared_with_powertools": False}


class TestServerClock(TakeOverConformance, ScanConformance):
    """Judged by the clock of the server, which stands about still until the test moves it."""

    running: ClassVar[RedisServer]
    clock_tolerance_seconds = 1.0
    pytestmark: ClassVar = [*TakeOverConformance.pytestmark, pytest.mark.server]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls) -> Iterator[None]:
        with started("valkey", movable_clock=FakeClock()()) as cls.running:
            yield

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        await self.advance(clock, 0)
        return RedisPersistenceLayer(self.running.url)

    async def advance(self, clock: FakeClock, seconds: float) -> None:
        clock.advance(seconds)
        self.running.set_clock(clock())
        # The server reads its clock once for all that arrives together: what follows must come later.
        async with Redis.from_url(self.running.url) as client:
            while (await client.time())[0] != int(clock()):
                pass
