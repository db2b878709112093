"""The contracts of completion together with the caller's own writes, in addition to that of every layer."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from aidem._rules.lifecycle import Blocked, lease_end
from aidem._rules.record import OutcomeKind
from aidem.exceptions import IdempotencyHeldByTransactionError, IdempotencyUsageError
from aidem.persistence import SupportsCompletionInTransaction, SupportsCompletionItem
from aidem.testing._conformance import TEXTS, PersistenceLayerConformance
from aidem.testing._trial import KEPT_SECONDS, completed_of, timeless

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer
    from aidem.testing._trial import Trial


class OpenTransaction(Protocol):
    """A transaction that a test may complete in, and then ends in one of two ways.

    Attributes:
        transaction: What a user would pass as `transaction=`.
    """

    transaction: Any

    async def commit(self) -> None:
        """Commit it."""

    async def rollback(self) -> None:
        """Roll it back; does nothing once it has ended."""


class CompletionInTransactionConformance(PersistenceLayerConformance):
    """Proves that a layer keeps the contract of `SupportsCompletionInTransaction`, and that of every layer.

        class TestMyLayer(CompletionInTransactionConformance):
            async def make_layer(self, clock):
                return MyLayer(url, clock=clock)

            async def begin(self):
                return MyTransaction(await connect(url))

    Use it as `PersistenceLayerConformance`. A layer whose operations wait for a lock should do so briefly here.
    """

    async def begin(self, layer: PersistenceLayer) -> OpenTransaction:
        """Begin a transaction on the database that holds the records, on a connection of its own."""
        raise NotImplementedError(f"{type(self).__name__} must say how a transaction is begun: async def begin")

    @contextlib.asynccontextmanager
    async def begun(self, trial: Trial) -> AsyncGenerator[OpenTransaction]:
        """Begin a transaction, and roll it back in the end if the test has not ended it."""
        opened = await self.begin(trial.layer)
        try:
            yield opened
        finally:
            await opened.rollback()

    # --- check_transaction --------------------------------------------------------------------------------------------

    async def test_an_open_transaction_is_accepted(self, trial: Trial) -> None:
        """Nothing is written by looking at it."""
        async with self.begun(trial) as opened:
            _completing(trial).check_transaction(opened.transaction, blocking=False)

    async def test_what_is_no_transaction_is_refused(self, trial: Trial) -> None:
        """With an error that says what to pass."""
        for other in (None, "transaction", object()):
            with pytest.raises(IdempotencyUsageError):
                _completing(trial).check_transaction(other, blocking=False)

    async def test_a_transaction_that_has_ended_is_refused(self, trial: Trial) -> None:
        """Whether it was committed or rolled back."""
        for commits in (True, False):
            async with self.begun(trial) as opened:
                await (opened.commit() if commits else opened.rollback())
                with pytest.raises(IdempotencyUsageError):
                    _completing(trial).check_transaction(opened.transaction, blocking=False)

    # --- complete_in: over our claim, and nowhere else ----------------------------------------------------------------

    async def test_an_outcome_is_stored_with_the_commit(self, trial: Trial) -> None:
        """Not before; with the fence, the owner and the hash of the claim, and without its lease."""
        claimed = await trial.claimed(trial.claim(payload_hash="hash"))
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            assert await trial.stored() == claimed
            await opened.commit()
        stored = await trial.stored()
        assert timeless(stored) == timeless(completed_of(claimed, now=trial.clock()))
        assert stored is not None
        assert stored.fence == claimed.fence
        assert lease_end(stored) is None
        await trial.blocked(trial.claim("theirs"))

    async def test_an_outcome_that_is_rolled_back_leaves_the_claim_as_it_was(self, trial: Trial) -> None:
        """And may be stored in another transaction then."""
        claimed = await trial.claimed(trial.claim())
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            await opened.rollback()
        assert await trial.stored() == claimed
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            await opened.commit()
        assert await trial.stored() != claimed

    async def test_the_window_of_an_outcome_counts_by_the_clock_that_judges(self, trial: Trial) -> None:
        """A caller whose clock is ahead keeps its outcome no longer than others, unless callers judge."""
        claimed = await trial.claimed(trial.claim())
        ahead = trial.clock() + 3600
        async with self.begun(trial) as opened:
            record = completed_of(claimed, now=ahead)
            assert await _completing(trial).complete_in(opened.transaction, record, now=ahead)
            await opened.commit()
        stored = await trial.stored()
        assert stored is not None
        expected = (ahead if self.adds_clock_skew else trial.clock()) + KEPT_SECONDS
        assert abs((stored.expiry_timestamp or 0) - expected) <= 1 + trial.tolerance_seconds

    async def test_every_text_is_stored_as_it_is_in_a_transaction(self, trial: Trial) -> None:
        """Character by character."""
        for text in TEXTS:
            claimed = await trial.claimed(trial.claim())
            async with self.begun(trial) as opened:
                record = completed_of(claimed, now=trial.clock(), response_data=text)
                assert await _completing(trial).complete_in(opened.transaction, record, now=trial.clock())
                await opened.commit()
            stored = await trial.stored()
            assert stored is not None
            assert stored.response_data == text
            await trial.layer.forget(trial.key)

    async def test_the_kind_of_the_outcome_is_stored_in_a_transaction(self, trial: Trial) -> None:
        """Beside its text."""
        claimed = await trial.claimed(trial.claim())
        record = completed_of(
            claimed, now=trial.clock(), response_data="aidem:unavailable", outcome=OutcomeKind.UNAVAILABLE
        )
        async with self.begun(trial) as opened:
            assert await _completing(trial).complete_in(opened.transaction, record, now=trial.clock())
            await opened.commit()
        assert timeless(await trial.stored()) == timeless(record)

    async def test_an_outcome_is_stored_over_a_lapsed_claim_that_nobody_took(self, trial: Trial) -> None:
        """It is still ours."""
        claimed = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            await opened.commit()
        assert await trial.stored() != claimed

    async def test_nothing_is_stored_in_a_transaction_where_no_record_is(self, trial: Trial) -> None:
        """Unlike `complete` does: others would wait for a record that nobody sees."""
        claimed = await trial.claimed(trial.claim())
        await trial.layer.forget(trial.key)
        await self._refuses(trial, claimed, None)

    async def test_nothing_is_stored_in_a_transaction_over_a_claim_that_took_ours_over(self, trial: Trial) -> None:
        """Of two bodies that overlap one commits."""
        ours = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        await self._refuses(trial, ours, await trial.claimed(trial.claim("theirs")))

    async def test_nothing_is_stored_in_a_transaction_over_an_outcome(self, trial: Trial) -> None:
        """Also our own."""
        for owner in ("ours", "theirs"):
            stored = await trial.completed(await trial.claimed(trial.claim(owner)))
            await self._refuses(trial, trial.claim(), stored)
            await trial.layer.forget(trial.key)

    async def test_nothing_is_stored_in_a_transaction_over_a_claim_without_owner(self, trial: Trial) -> None:
        """Also for a caller without owner."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        for owner in ("ours", None):
            await self._refuses(trial, trial.claim(owner), await trial.stored())

    async def _refuses(self, trial: Trial, claimed: DataRecord, left: DataRecord | None) -> None:
        async with self.begun(trial) as opened:
            assert not await _complete(trial, opened, claimed)
            await opened.commit()
        assert await trial.stored() == left

    # --- While a transaction holds the record -------------------------------------------------------------------------

    async def test_a_record_that_a_transaction_holds_blocks_though_its_lease_has_passed(self, trial: Trial) -> None:
        """It counts as running, and nobody takes it over; once it is rolled back, somebody may."""
        claimed = await trial.claimed(trial.claim("theirs"))
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            for _ in range(2):
                # In another context: inside the transaction a layer may refuse a caller, who would wait for itself.
                answer = await asyncio.create_task(trial.acquire(trial.claim()), context=Context())
                assert isinstance(answer, Blocked)
                assert answer.record == claimed
                await trial.outlast_lease()
            await opened.rollback()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_a_record_that_a_transaction_holds_is_not_renewed(self, trial: Trial) -> None:
        """That is an answer of its own: the claim is not lost."""
        claimed = await trial.claimed(trial.claim())
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            with pytest.raises(IdempotencyHeldByTransactionError):
                await trial.renew(trial.claim(kept_seconds=2 * KEPT_SECONDS))
            await opened.rollback()
        assert await trial.stored() == claimed
        assert await trial.renew(trial.claim(kept_seconds=2 * KEPT_SECONDS)) not in {None, claimed}

    async def test_a_record_that_a_transaction_holds_is_not_released(self, trial: Trial) -> None:
        """A commit that is under way wins."""
        claimed = await trial.claimed(trial.claim())
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            with pytest.raises(IdempotencyHeldByTransactionError):
                await trial.release(claimed)
            await opened.commit()
        assert timeless(await trial.stored()) == timeless(completed_of(claimed, now=trial.clock()))

    async def test_a_record_that_a_transaction_holds_is_kept_though_it_expires(self, trial: Trial) -> None:
        """Nothing purges it meanwhile."""
        claimed = await trial.claimed(trial.claim())
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            await trial.outlast_expiry()
            with contextlib.suppress(Exception):  # where the transaction locks more than the record
                await trial.acquire(trial.claim("theirs").replace(idempotency_key=f"{trial.key}/other"))
            await opened.commit()
        assert timeless(await trial.stored()) == timeless(completed_of(claimed, now=trial.clock()))

    # --- is_free ------------------------------------------------------------------------------------------------------

    async def test_our_claim_is_free_unless_a_transaction_holds_it(self, trial: Trial) -> None:
        """Also one whose lease has passed."""
        claimed = await trial.claimed(trial.claim())
        assert await _completing(trial).is_free(claimed)
        async with self.begun(trial) as opened:
            assert await _complete(trial, opened, claimed)
            assert not await _completing(trial).is_free(claimed)
            await opened.rollback()
        await trial.outlast_lease()
        assert await _completing(trial).is_free(claimed)

    async def test_only_our_claim_is_free(self, trial: Trial) -> None:
        """Neither an outcome nor another's claim, nor what is gone."""
        claimed = await trial.claimed(trial.claim())
        assert not await _completing(trial).is_free(trial.claim("theirs"))
        await trial.completed(claimed)
        assert not await _completing(trial).is_free(claimed)
        await trial.layer.forget(trial.key)
        assert not await _completing(trial).is_free(claimed)


class CompletionItemConformance(PersistenceLayerConformance):
    """Proves that a layer keeps the contract of `SupportsCompletionItem`, and that of every layer.

        class TestMyLayer(CompletionItemConformance):
            async def make_layer(self, clock):
                return MyLayer(client, clock=clock)

            async def send(self, layer, item):
                return await client.write_all([item])

    Use it as `PersistenceLayerConformance`.
    """

    async def send(self, layer: PersistenceLayer, item: dict[str, Any]) -> bool:
        """Send a request that consists of the item; return whether it was applied."""
        raise NotImplementedError(f"{type(self).__name__} must say how a request is sent: async def send")

    async def test_an_item_stores_the_outcome_when_it_is_sent(self, trial: Trial) -> None:
        """Not before; with the fence, the owner and the hash of the claim, and without its lease."""
        claimed = await trial.claimed(trial.claim(payload_hash="hash"))
        item = _item(trial, completed_of(claimed, now=trial.clock()))
        assert await trial.stored() == claimed
        assert await self.send(trial.layer, item)
        stored = await trial.stored()
        assert timeless(stored) == timeless(completed_of(claimed, now=trial.clock()))
        assert stored is not None
        assert stored.fence == claimed.fence
        assert lease_end(stored) is None

    async def test_an_item_stores_the_kind_of_the_outcome(self, trial: Trial) -> None:
        """Beside its text."""
        claimed = await trial.claimed(trial.claim())
        record = completed_of(
            claimed, now=trial.clock(), response_data="aidem:unavailable", outcome=OutcomeKind.UNAVAILABLE
        )
        assert await self.send(trial.layer, _item(trial, record))
        assert timeless(await trial.stored()) == timeless(record)

    async def test_an_item_stores_the_outcome_over_a_lapsed_claim_that_nobody_took(self, trial: Trial) -> None:
        """It is still ours."""
        claimed = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        assert await self.send(trial.layer, _item(trial, completed_of(claimed, now=trial.clock())))

    async def test_a_request_fails_where_no_record_is(self, trial: Trial) -> None:
        """Unlike `complete`."""
        claimed = await trial.claimed(trial.claim())
        await trial.layer.forget(trial.key)
        await self._fails(trial, claimed, None)

    async def test_a_request_fails_where_another_claim_took_ours_over(self, trial: Trial) -> None:
        """Of two bodies that overlap one is applied."""
        ours = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        await self._fails(trial, ours, await trial.claimed(trial.claim("theirs")))

    async def test_a_request_fails_where_an_outcome_is(self, trial: Trial) -> None:
        """Also our own."""
        claimed = await trial.claimed(trial.claim())
        await self._fails(trial, claimed, await trial.completed(claimed))

    async def _fails(self, trial: Trial, claimed: DataRecord, left: DataRecord | None) -> None:
        assert not await self.send(trial.layer, _item(trial, completed_of(claimed, now=trial.clock())))
        assert await trial.stored() == left


def _item(trial: Trial, record: DataRecord) -> dict[str, Any]:
    assert isinstance(trial.layer, SupportsCompletionItem)
    return trial.layer.completion_item(record, now=trial.clock())


def _completing(trial: Trial) -> SupportsCompletionInTransaction:
    assert isinstance(trial.layer, SupportsCompletionInTransaction)
    return trial.layer


async def _complete(trial: Trial, opened: OpenTransaction, claimed: DataRecord) -> bool:
    now = trial.clock()
    return await _completing(trial).complete_in(opened.transaction, completed_of(claimed, now=now), now=now)
