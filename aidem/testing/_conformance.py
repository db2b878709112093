"""The contract of `aidem.persistence.PersistenceLayer` as tests, sentence by sentence."""

from __future__ import annotations

from aidem.testing._acquire import AcquireTests
from aidem.testing._blocked import BlockedTests
from aidem.testing._complete import CompleteTests
from aidem.testing._holding import HoldingTests
from aidem.testing._layer import ObjectTests


class PersistenceLayerConformance(AcquireTests, BlockedTests, CompleteTests, HoldingTests, ObjectTests):
    """Proves that a layer keeps the contract: subclass it in a test module, and say how your layer is made.

        class TestMyLayer(PersistenceLayerConformance):
            async def make_layer(self, clock):
                return MyLayer(clock=clock)

    It runs with pytest and the pytest plugin that anyio brings. Every test uses a key of its own, so the store may be
    shared. To have the assertions explained, call `pytest.register_assert_rewrite("aidem.testing")` in `conftest.py`.
    """
