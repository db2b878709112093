"""Negative controls of `take_over`: each layer breaks one promise, and exactly the tests of that promise notice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aidem._rules import lifecycle
from aidem._rules.lifecycle import lease_end, milliseconds
from aidem._rules.record import DataRecord, RecordStatus
from aidem._runtime.cancellation import Immediate
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import TakeOverConformance
from tests.support.controls import Controls

CONTROLS = Controls(TakeOverConformance)
breaks = CONTROLS.breaks


class ChangesTheRecordStored(MemoryPersistenceLayer):
    """Lets `take_over` see the record in the store as `seen` pretends it to be."""

    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        raise NotImplementedError

    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        key = record.idempotency_key
        stored = self._records.get(key)
        seen = None if stored is None else self.seen(stored, found, record)
        if seen is None:
            self._records.pop(key, None)
        else:
            self._records[key] = seen
        taken = super().take_over(found, record, **options)
        if taken.answer is None and stored is not None:
            self._records[key] = stored
        return taken


class ChangesWhatIsAsked(MemoryPersistenceLayer):
    """Takes over as `asked` pretends it to be asked."""

    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        raise NotImplementedError

    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        found, record = self.asked(found, record, options)
        return super().take_over(found, record, **options)


# --- Taken over wrongly ---------------------------------------------------------------------------------------------


@breaks(
    "force_takes_over_a_claim_whose_lease_has_not_passed",
    "a_renewal_that_arrives_before_take_over_keeps_the_claim",
    "take_over_leaves_a_claim_without_a_lease_alone",
    "take_over_takes_a_claim_without_owner",
    "take_over_waits_for_the_last_millisecond_of_the_lease",
)
class AlwaysForces(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        options["force"] = True
        return found, record


@breaks("force_can_put_a_claim_back_whose_lease_has_passed", "force_takes_over_a_claim_whose_lease_has_not_passed")
class NeverForces(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        options["force"] = False
        return found, record


@breaks("a_renewal_that_arrives_before_take_over_keeps_the_claim", "take_over_may_be_repeated")
class JudgesByTheLeaseFound(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(
            in_progress_expiry_timestamp=found.in_progress_expiry_timestamp,
            lease_expiry_timestamp=found.lease_expiry_timestamp,
        )


@breaks("take_over_waits_for_the_last_millisecond_of_the_lease")
class TakesOverInTheLastMillisecond(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        is_last = lease_end(stored) == milliseconds(self.clock())
        return stored.replace(in_progress_expiry_timestamp=1) if is_last else stored


@breaks("force_takes_over_a_claim_whose_lease_has_not_passed", "take_over_leaves_a_claim_without_a_lease_alone")
class TakesNoLeaseForOneThatHasPassed(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(lease_expiry_timestamp=0) if lease_end(stored) is None else stored


@breaks("take_over_leaves_a_record_that_has_expired_alone", "take_over_may_be_repeated")
class TakesOverWhatHasExpired(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(expiry_timestamp=None)


@breaks("take_over_takes_a_claim_in_the_last_second_before_it_expires")
class TakesTheLastSecondForExpired(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return None if stored.expiry_timestamp == int(self.clock()) else stored


@breaks("take_over_leaves_an_outcome_alone")
class TakesOverAnOutcome(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(status=RecordStatus.INPROGRESS)


@breaks("take_over_leaves_another_claim_than_the_one_found_alone")
class DoesNotCompareTheOwner(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored if stored.owner in {None, record.owner} else stored.replace(owner=found.owner)


@breaks("take_over_leaves_another_claim_than_the_one_found_alone")
class DoesNotCompareTheFence(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        stored = self._records.get(record.idempotency_key, found)
        return found.replace(fence=stored.fence), record


@breaks("a_take_over_that_arrives_late_takes_nothing", "take_over_leaves_another_claim_than_the_one_found_alone")
class TakesOverAnyClaim(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        stored = self._records.get(record.idempotency_key, found)
        return (found if stored.owner is None else stored), record


@breaks("take_over_takes_a_claim_without_owner")
class TakesAnyOwnerForNone(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        stored = self._records.get(record.idempotency_key, found)
        return (stored if stored.owner is None else found), record


@breaks(
    "a_take_over_that_arrives_late_takes_nothing",
    "take_over_stores_nothing_where_no_record_is",
)
class ClaimsAnAbsentKey(MemoryPersistenceLayer):
    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        self._records.setdefault(record.idempotency_key, found)
        return super().take_over(found, record, **options)


@breaks("one_of_many_concurrent_take_overs_is_granted")
class LooksAndStoresInTwoSteps(MemoryPersistenceLayer):
    async def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> DataRecord | None:  # type: ignore[override]
        stored = self._records.get(record.idempotency_key)
        await asyncio.sleep(0)
        if stored is not None:
            self._records[record.idempotency_key] = stored
        return await super().take_over(found, record, **options)


# --- Refused wrongly ------------------------------------------------------------------------------------------------


@breaks(
    "force_can_put_a_claim_back_whose_lease_has_passed",
    "one_of_many_concurrent_take_overs_is_granted",
    "take_over_adds_clock_skew_to_the_lease_where_callers_judge",
    "take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed",
    "take_over_takes_a_claim_in_the_last_second_before_it_expires",
    "take_over_takes_a_claim_that_was_given_up_at_once",
    "take_over_waits_for_the_last_millisecond_of_the_lease",
    "the_owner_of_a_claim_that_was_taken_over_finds_it_lost",
)
class TakesOverOnlyWhatMayRunAgain(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(lease_expiry_timestamp=None)


@breaks("force_can_put_a_claim_back_whose_lease_has_passed")
class RoundsTheExpiryUpToTheNextSecond(ChangesWhatIsAsked):
    def asked(self, found: DataRecord, record: DataRecord, options: dict[str, Any]) -> tuple[DataRecord, DataRecord]:
        delay = self.clock() - options["now"]
        return found, record.replace(expiry_timestamp=(record.expiry_timestamp or 0) + (delay > 0))


@breaks("take_over_takes_a_claim_that_was_given_up_at_once")
class TakesGivenUpForNoLease(ChangesTheRecordStored):
    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        return stored.replace(lease_expiry_timestamp=stored.lease_expiry_timestamp or None)


@breaks("take_over_may_be_repeated")
class TakesItsOwnClaimForAnother(MemoryPersistenceLayer):
    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        is_ours = lifecycle.is_held_by(self._records.get(record.idempotency_key), record.owner)
        return Immediate(None) if is_ours else super().take_over(found, record, **options)


@breaks("take_over_takes_a_claim_without_owner")
class LeavesClaimsWithoutOwnerAlone(MemoryPersistenceLayer):
    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        return Immediate(None) if found.owner is None else super().take_over(found, record, **options)


@breaks("take_over_adds_clock_skew_to_the_lease_where_callers_judge")
class AddsSkewToItsOwnClock(ChangesTheRecordStored):
    skew = 0.0

    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        self.skew = options.pop("max_clock_skew_seconds", 0.0)
        return super().take_over(found, record, **options)

    def seen(self, stored: DataRecord, found: DataRecord, record: DataRecord) -> DataRecord | None:
        end = lease_end(stored)
        return stored.replace(in_progress_expiry_timestamp=end + int(self.skew * 1000)) if end else stored


# --- Stored wrongly -------------------------------------------------------------------------------------------------


class ChangesTheClaimStored(MemoryPersistenceLayer):
    """Stores what takes a claim over as `changed` pretends it to be, and answers it so."""

    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        raise NotImplementedError

    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        stored = self._records.get(record.idempotency_key)
        taken = super().take_over(found, record, **options).answer
        if taken is not None and stored is not None and taken is not stored:
            taken = self._records[record.idempotency_key] = self.changed(taken, stored)
        return Immediate(taken)


@breaks("take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed")
class LeavesTheOldHash(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        return claim.replace(payload_hash=claim.payload_hash or stored.payload_hash)


@breaks("take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed")
class LeavesTheOldNote(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        return claim.replace(note=claim.note or stored.note)


@breaks(
    "force_takes_over_a_claim_whose_lease_has_not_passed",
    "take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed",
)
class KeepsTheFence(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        return claim.replace(fence=stored.fence)


@breaks("take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed")
class KeepsTheKindOfLease(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        if stored.in_progress_expiry_timestamp is None:
            return claim
        return claim.replace(in_progress_expiry_timestamp=lease_end(claim), lease_expiry_timestamp=None)


@breaks("take_over_counts_the_instants_from_the_clock_that_judges")
class KeepsTheCallersInstants(MemoryPersistenceLayer):
    def take_over(self, found: DataRecord, record: DataRecord, **options: Any) -> Immediate[DataRecord | None]:
        return super().take_over(found, record, **options | {"now": self.clock()})


@breaks(
    "force_takes_over_a_claim_whose_lease_has_not_passed",
    "take_over_may_be_repeated",
    "take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed",
    "the_owner_of_a_claim_that_was_taken_over_finds_it_lost",
)
class KeepsTheOwner(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, stored: DataRecord) -> DataRecord:
        return claim.replace(owner=stored.owner)


# --- The runner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", CONTROLS.layers, ids=lambda broken: broken.__name__)
def test_exactly_the_tests_of_the_broken_promise_fail(broken: type[MemoryPersistenceLayer]) -> None:
    assert CONTROLS.failures_of(broken) == CONTROLS.layers[broken]


def test_the_unbroken_layer_passes() -> None:
    assert CONTROLS.failures_of(MemoryPersistenceLayer) == set()


def test_every_test_of_the_suite_is_seen_to_fail() -> None:
    assert set().union(*CONTROLS.layers.values()) == set(CONTROLS.tests)
