"""Negative controls: which tests of a conformance suite fail for a layer."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aidem.persistence import PersistenceLayer
from aidem.testing import FakeClock, PersistenceLayerConformance

Test = Callable[..., Awaitable[None]]
HANGING_SECONDS = 10.0


class Controls:
    """The broken layers of one suite: each breaks one promise, and exactly the tests of that promise notice.

    Attributes:
        layers: The names of the tests that must fail, without `test_`, by layer.
        tests: The tests that the suite itself defines.
    """

    def __init__(self, suite: type[PersistenceLayerConformance]) -> None:
        self.layers: dict[type[Any], set[str]] = {}
        self.tests: dict[str, Test] = {
            name.removeprefix("test_"): test
            for name, test in vars(suite).items()
            if name.startswith("test_") and inspect.isfunction(test)
        }
        self._suite = suite

    def breaks(self, test: str, *tests: str) -> Callable[[type[Any]], type[Any]]:
        """Say which tests of the suite must fail for this layer, all others pass."""

        def register(layer_class: type[Any]) -> type[Any]:
            self.layers[layer_class] = {test, *tests}
            return layer_class

        return register

    def failures_of(self, layer_class: Callable[..., PersistenceLayer]) -> set[str]:
        """Run the tests in this process, and return the names of those that failed, without `test_`."""

        class Suite(self._suite):  # type: ignore[name-defined,misc]
            async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
                return layer_class(clock=clock)

        return {name for name, test in self.tests.items() if fails(Suite(), test)}


def fails(suite: PersistenceLayerConformance, test: Test) -> bool:
    """Whether a test fails, or hangs: for so long that no machine is as slow."""
    return asyncio.run(_fails(suite, test))


async def _fails(suite: PersistenceLayerConformance, test: Test) -> bool:
    try:
        async with asyncio.timeout(HANGING_SECONDS), suite.make_trial() as trial:
            await test(suite, trial)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - whatever makes a test fail
        return True
    return False
