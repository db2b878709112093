"""What a layer under test is made of, and how a test is set up."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, ClassVar

import pytest

from aidem.testing._clock import FakeClock
from aidem.testing._trial import Trial

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer


class LayerTests:
    """The part of the conformance suite that its subclasses may change.

    Attributes:
        adds_clock_skew: Whether the layer judges by its callers' clocks, and so adds `max_clock_skew_seconds`.
        clock_tolerance_seconds: 0 for a layer that is judged by `clock`. For a store whose own clock goes on during a
            test: how far that may stray from `clock`, at least 1 and less than 2; `advance` must then let real time
            pass too.
    """

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.anyio]

    adds_clock_skew: ClassVar[bool] = False
    clock_tolerance_seconds: ClassVar[float] = 0.0

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        """Return a layer that judges by the clock where it can; the suite closes it."""
        raise NotImplementedError(f"{type(self).__name__} must say how its layer is made: async def make_layer")

    async def advance(self, clock: FakeClock, seconds: float) -> None:
        """Let time pass, for the clock and for the store."""
        clock.advance(seconds)

    async def store_ownerless(self, layer: PersistenceLayer, claim: DataRecord, *, now: float) -> None:
        """Store a claim without an owner, as another library does; override it where `acquire` refuses to."""
        await layer.acquire(claim, now=now)

    # --- Fixtures ---------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="session")  # the widest, so that async fixtures of any scope may be asked for
    @classmethod
    def anyio_backend(cls) -> str:
        """Run on asyncio."""
        return "asyncio"

    @pytest.fixture
    async def trial(self) -> AsyncGenerator[Trial]:
        """Set a test up."""
        async with self.make_trial() as trial:
            yield trial

    @contextlib.asynccontextmanager
    async def make_trial(self) -> AsyncGenerator[Trial]:
        """Make a layer, a key and a clock, and close the layer in the end."""
        clock = FakeClock()
        layer = await self.make_layer(clock)

        async def wait(seconds: float) -> None:
            await self.advance(clock, seconds)

        try:
            yield Trial(
                layer=layer,
                key=f"conformance#{secrets.token_hex(16)}",
                clock=clock,
                wait=wait,
                tolerance_seconds=self.clock_tolerance_seconds,
            )
        finally:
            await layer.aclose()
