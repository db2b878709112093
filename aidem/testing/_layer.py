"""What the contract says of `get`, `forget`, and of the layer as an object."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Final

import pytest
from anyio import to_thread

from aidem.testing._base import LayerTests
from aidem.testing._trial import claim_of

if TYPE_CHECKING:
    from aidem.persistence import PersistenceLayer
    from aidem.testing._trial import Trial


MAX_SECONDS_PER_OPERATION: Final = 10


class ObjectTests(LayerTests):
    """Made, opened, closed, shared."""

    async def test_get_finds_nothing_under_an_unknown_key(self, trial: Trial) -> None:
        """None: there is none."""
        assert await trial.stored() is None

    async def test_get_may_find_a_record_that_has_expired(self, trial: Trial) -> None:
        """As stored, or not at all where the store has purged it."""
        claimed = await trial.claimed(trial.claim())
        await trial.outlast_expiry()
        assert await trial.stored() in {claimed, None}

    async def test_forget_drops_any_record(self, trial: Trial) -> None:
        """A claim, an outcome, or none."""
        await trial.claimed(trial.claim("theirs"))
        await trial.layer.forget(trial.key)
        assert await trial.stored() is None
        await trial.completed(await trial.claimed(trial.claim()))
        await trial.layer.forget(trial.key)
        await trial.layer.forget(trial.key)
        assert await trial.stored() is None

    async def test_a_layer_may_be_opened_and_closed_repeatedly_and_used_afterwards(self, trial: Trial) -> None:
        """A later use opens anew, and finds what was stored."""
        await trial.layer.open()
        await trial.layer.open()
        claimed = await trial.claimed(trial.claim())
        await trial.layer.aclose()
        await trial.layer.aclose()
        assert await trial.stored() == claimed

    async def test_a_layer_is_an_async_context_manager(self, trial: Trial) -> None:
        """That gives itself, and does not hide an error."""
        async with trial.layer as layer:
            assert layer is trial.layer
            await trial.claimed(trial.claim())
        with pytest.raises(ZeroDivisionError):
            await _fail_within(trial.layer)

    async def test_another_event_loop_may_use_the_layer(self, trial: Trial) -> None:
        """Before and after this one."""
        claimed = await trial.claimed(trial.claim())
        for _loop in range(2):
            assert await to_thread.run_sync(lambda: asyncio.run(trial.stored())) == claimed
            assert await trial.stored() == claimed

    async def test_a_layer_is_hashable_and_weakly_referencable_by_identity(self, trial: Trial) -> None:
        """The engine keeps its calls in flight per layer."""
        other = await self.make_layer(trial.clock)
        assert weakref.WeakKeyDictionary({trial.layer: "this", other: "other"})[trial.layer] == "this"
        assert trial.layer != other
        await other.aclose()

    async def test_a_cancelled_operation_leaves_the_layer_usable(self, trial: Trial) -> None:
        """Wherever the cancellation struck; the claim was stored as a whole, or not at all."""
        for turns in range(6):
            trial_claim = claim_of(f"{trial.key}/{turns}", now=trial.clock())
            operation = asyncio.ensure_future(trial.acquire(trial_claim))
            for _ in range(turns):
                await asyncio.sleep(0)
            operation.cancel()
            await asyncio.wait([operation])
            async with asyncio.timeout(MAX_SECONDS_PER_OPERATION):
                again = await trial.claimed(trial_claim)
                assert await trial.layer.get(trial_claim.idempotency_key) == again
        await trial.claimed(trial.claim())


async def _fail_within(layer: PersistenceLayer) -> None:
    async with layer:
        raise ZeroDivisionError
