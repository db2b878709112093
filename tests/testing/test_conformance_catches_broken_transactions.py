"""Negative controls for completion together with the caller's own writes, in the manner of the other ones."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord, RecordStatus
from aidem._runtime.cancellation import Immediate
from aidem.exceptions import IdempotencyPersistenceConnectionError
from aidem.persistence import PersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import (
    CompletionInTransactionConformance,
    CompletionItemConformance,
    FakeClock,
    OpenTransaction,
    PersistenceLayerConformance,
)
from tests.support.controls import fails
from tests.support.transactional import ItemLayer, MemoryTransaction, TransactionalLayer

CONTROLS: dict[type[MemoryPersistenceLayer], set[str]] = {}

Layer = TypeVar("Layer", bound=MemoryPersistenceLayer)


def breaks(test: str, *tests: str) -> Callable[[type[Layer]], type[Layer]]:
    """Say which tests of the suite must fail for this layer, all others pass."""

    def register(layer_class: type[Layer]) -> type[Layer]:
        CONTROLS[layer_class] = {test, *tests}
        return layer_class

    return register


# --- check_transaction ----------------------------------------------------------------------------------------------


@breaks("an_open_transaction_is_accepted")
class RefusesEverything(TransactionalLayer):
    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        super().check_transaction(None, blocking=blocking)


@breaks("what_is_no_transaction_is_refused")
class TakesWhatIsNoTransaction(TransactionalLayer):
    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        if isinstance(transaction, MemoryTransaction):
            super().check_transaction(transaction, blocking=blocking)


@breaks("a_transaction_that_has_ended_is_refused")
class TakesTransactionsThatHaveEnded(TransactionalLayer):
    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        if not isinstance(transaction, MemoryTransaction):
            super().check_transaction(transaction, blocking=blocking)


# --- complete_in ----------------------------------------------------------------------------------------------------


@breaks(
    "a_record_that_a_transaction_holds_blocks_though_its_lease_has_passed",
    "a_record_that_a_transaction_holds_is_not_released",
    "a_record_that_a_transaction_holds_is_not_renewed",
    "an_outcome_is_stored_with_the_commit",
    "an_outcome_that_is_rolled_back_leaves_the_claim_as_it_was",
    "our_claim_is_free_unless_a_transaction_holds_it",
)
class CompletesBesideTheTransaction(TransactionalLayer):
    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        is_ours = lifecycle.is_held_by(self._records.get(record.idempotency_key), record.owner)
        return self.complete(record, now=now) if is_ours else Immediate(False)


class ChangesTheOutcome(TransactionalLayer):
    """Stores an outcome as `changed` pretends it to be."""

    def changed(self, record: DataRecord) -> DataRecord:
        raise NotImplementedError

    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        answer = super().complete_in(transaction, record, now=now)
        for key, outcome in transaction.outcomes.items():
            transaction.outcomes[key] = self.changed(outcome)
        return answer


@breaks("an_outcome_is_stored_with_the_commit")
class DropsTheFence(ChangesTheOutcome):
    def changed(self, record: DataRecord) -> DataRecord:
        return record.replace(fence=0)


@breaks("an_outcome_is_stored_with_the_commit")
class LeavesTheLease(ChangesTheOutcome):
    def changed(self, record: DataRecord) -> DataRecord:
        return record.replace(in_progress_expiry_timestamp=self._records[record.idempotency_key].expiry_timestamp)


@breaks("every_text_is_stored_as_it_is_in_a_transaction")
class RebuildsTheText(ChangesTheOutcome):
    def changed(self, record: DataRecord) -> DataRecord:
        return record.replace(response_data=(record.response_data or "").replace("  ", " "))


@breaks("the_kind_of_the_outcome_is_stored_in_a_transaction")
class DropsTheKind(ChangesTheOutcome):
    def changed(self, record: DataRecord) -> DataRecord:
        return record.replace(outcome=None)


@breaks("the_window_of_an_outcome_counts_by_the_clock_that_judges")
class KeepsTheCallersWindow(TransactionalLayer):
    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        return super().complete_in(transaction, record, now=self.clock())


class CompletesMore(TransactionalLayer):
    """Stores an outcome also where `takes` says so."""

    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        raise NotImplementedError

    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        if self.takes(self._records.get(record.idempotency_key), record):
            transaction.outcomes[record.idempotency_key] = record
            return Immediate(True)
        return super().complete_in(transaction, record, now=now)


@breaks("nothing_is_stored_in_a_transaction_where_no_record_is")
class CompletesWhatIsGone(CompletesMore):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is None


@breaks("nothing_is_stored_in_a_transaction_over_a_claim_that_took_ours_over")
class CompletesAForeignClaim(CompletesMore):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        is_claim = found is not None and found.status is RecordStatus.INPROGRESS
        return is_claim and found is not None and found.owner not in {None, record.owner}


@breaks("nothing_is_stored_in_a_transaction_over_a_claim_without_owner")
class CompletesAClaimWithoutOwner(CompletesMore):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is not None and found.owner is record.owner is None


@breaks("nothing_is_stored_in_a_transaction_over_an_outcome")
class CompletesTwice(CompletesMore):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is not None and found.status is RecordStatus.COMPLETED and found.owner == record.owner


@breaks("an_outcome_is_stored_over_a_lapsed_claim_that_nobody_took")
class CompletesOnlyWhileTheLeaseLasts(TransactionalLayer):
    def complete_in(self, transaction: MemoryTransaction, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and lifecycle.is_lapsed(found, now=self.clock()):
            return Immediate(False)
        return super().complete_in(transaction, record, now=now)


# --- While a transaction holds the record ---------------------------------------------------------------------------


@breaks("a_record_that_a_transaction_holds_blocks_though_its_lease_has_passed")
class TakesOverWhatIsHeld(TransactionalLayer):
    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        return super(TransactionalLayer, self).acquire(record, now=now, **options)


@breaks("a_record_that_a_transaction_holds_blocks_though_its_lease_has_passed")
class FailsWhereARecordIsHeld(TransactionalLayer):
    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        if self.is_held(record.idempotency_key):
            raise IdempotencyPersistenceConnectionError("locked")
        return super().acquire(record, now=now, **options)


@breaks("a_record_that_a_transaction_holds_is_not_renewed")
class RenewsWhatIsHeld(TransactionalLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        return super(TransactionalLayer, self).renew(record, now=now)


@breaks("a_record_that_a_transaction_holds_is_not_renewed")
class SaysLostOfWhatIsHeld(TransactionalLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        return Immediate(None) if self.is_held(record.idempotency_key) else super().renew(record, now=now)


@breaks("a_record_that_a_transaction_holds_is_not_released")
class ReleasesWhatIsHeld(TransactionalLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        return super(TransactionalLayer, self).release(record)


@breaks("a_record_that_a_transaction_holds_is_kept_though_it_expires")
class PurgesWhatIsHeld(TransactionalLayer):
    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        for key, found in list(self._records.items()):
            if lifecycle.is_expired(found, now=self.clock()):
                del self._records[key]
        return super().acquire(record, now=now, **options)

    def apply(self, outcomes: dict[str, DataRecord]) -> None:
        super().apply({key: outcome for key, outcome in outcomes.items() if key in self._records})


# --- is_free --------------------------------------------------------------------------------------------------------


@breaks("our_claim_is_free_unless_a_transaction_holds_it")
class SaysFreeOfWhatIsHeld(TransactionalLayer):
    def is_free(self, record: DataRecord) -> Immediate[bool]:
        return Immediate(lifecycle.is_held_by(self._records.get(record.idempotency_key), record.owner))


@breaks("only_our_claim_is_free")
class SaysFreeOfAnything(TransactionalLayer):
    def is_free(self, record: DataRecord) -> Immediate[bool]:
        return Immediate(not self.is_held(record.idempotency_key))


# --- completion_item ------------------------------------------------------------------------------------------------


@breaks(
    "a_request_fails_where_no_record_is",
    "an_item_stores_the_kind_of_the_outcome",
    "an_item_stores_the_outcome_over_a_lapsed_claim_that_nobody_took",
    "an_item_stores_the_outcome_when_it_is_sent",
)
class CompletesBeforeTheItemIsSent(ItemLayer):
    def completion_item(self, record: DataRecord, *, now: float) -> dict[str, Any]:
        _ = self.complete(record, now=now)
        return super().completion_item(record, now=now)


@breaks("an_item_stores_the_kind_of_the_outcome")
class LeavesTheKindOutOfTheItem(ItemLayer):
    def completion_item(self, record: DataRecord, *, now: float) -> dict[str, Any]:
        return super().completion_item(record.replace(outcome=None), now=now)


@breaks("an_item_stores_the_outcome_over_a_lapsed_claim_that_nobody_took")
class SendsItemsOnlyWhileTheLeaseLasts(ItemLayer):
    async def send(self, item: dict[str, Any]) -> bool:
        found = self._records.get(item["outcome"].idempotency_key)
        is_lapsed = found is not None and lifecycle.is_lapsed(found, now=self.clock())
        return not is_lapsed and await super().send(item)


class AppliesMoreItems(ItemLayer):
    """Stores an outcome also where `takes` says so."""

    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        raise NotImplementedError

    async def send(self, item: dict[str, Any]) -> bool:
        record = item["outcome"]
        if self.takes(self._records.get(record.idempotency_key), record):
            self._records[record.idempotency_key] = record
            return True
        return await super().send(item)


@breaks("a_request_fails_where_no_record_is")
class AppliesItemsOfWhatIsGone(AppliesMoreItems):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is None


@breaks("a_request_fails_where_another_claim_took_ours_over")
class AppliesItemsOverAForeignClaim(AppliesMoreItems):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is not None and found.owner != record.owner


@breaks("a_request_fails_where_an_outcome_is")
class AppliesItemsTwice(AppliesMoreItems):
    def takes(self, found: DataRecord | None, record: DataRecord) -> bool:
        return found is not None and found.status is RecordStatus.COMPLETED


# --- The runner -----------------------------------------------------------------------------------------------------


class TestTheUnbrokenLayerInTransactions(CompletionInTransactionConformance):
    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return TransactionalLayer(clock=clock)

    async def begin(self, layer: PersistenceLayer) -> OpenTransaction:
        assert isinstance(layer, TransactionalLayer)
        return layer.begin()


class TestTheUnbrokenLayerByItems(CompletionItemConformance):
    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return ItemLayer(clock=clock)

    async def send(self, layer: PersistenceLayer, item: dict[str, Any]) -> bool:
        assert isinstance(layer, ItemLayer)
        return await layer.send(item)


SUITES: dict[type[MemoryPersistenceLayer], type[PersistenceLayerConformance]] = {
    TransactionalLayer: TestTheUnbrokenLayerInTransactions,
    ItemLayer: TestTheUnbrokenLayerByItems,
}


@pytest.mark.parametrize("broken", CONTROLS, ids=lambda broken: broken.__name__)
def test_exactly_the_tests_of_the_broken_promise_fail(broken: type[MemoryPersistenceLayer]) -> None:
    assert failures_of(broken) == CONTROLS[broken]


@pytest.mark.parametrize("layer", SUITES)
def test_the_unbroken_layer_passes(layer: type[MemoryPersistenceLayer]) -> None:
    assert failures_of(layer) == set()


def test_every_test_of_the_suites_is_seen_to_fail() -> None:
    assert set().union(*CONTROLS.values()) == set().union(*(promises_of(suite) for suite in SUITES.values()))


@pytest.mark.parametrize(
    ("suite", "hook"), [(CompletionInTransactionConformance, "begin"), (CompletionItemConformance, "send")]
)
async def test_a_suite_that_does_not_say_how_its_store_is_used_is_told_so(
    suite: type[PersistenceLayerConformance], hook: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"{suite.__name__} must say how .* async def {hook}"):
        await getattr(suite(), hook)(*[None] * (len(inspect.signature(getattr(suite, hook)).parameters) - 1))


def promises_of(suite: type[PersistenceLayerConformance]) -> dict[str, Callable[..., Awaitable[None]]]:
    """Return the tests that a suite adds to that of every layer, by their names without `test_`."""
    return {
        name.removeprefix("test_"): test
        for name, test in inspect.getmembers(suite, inspect.isfunction)
        if name.startswith("test_") and not hasattr(PersistenceLayerConformance, name)
    }


def failures_of(layer_class: type[MemoryPersistenceLayer]) -> set[str]:
    """Run the tests that the suite of the layer adds, and return the names of those that failed."""
    (suite,) = (suite for base, suite in SUITES.items() if issubclass(layer_class, base))

    class Suite(suite):  # type: ignore[valid-type, misc] # it is one
        async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
            return layer_class(clock=clock)

    return {name for name, test in promises_of(suite).items() if fails(Suite(), test)}
