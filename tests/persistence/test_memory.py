from __future__ import annotations

from aidem.persistence import PersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock, PersistenceLayerConformance


class TestConformance(PersistenceLayerConformance):
    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return MemoryPersistenceLayer(clock=clock)
