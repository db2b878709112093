"""Negative controls: each layer below breaks one promise, and exactly the tests of that promise notice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, milliseconds
from aidem._rules.record import DataRecord, RecordStatus
from aidem._runtime.cancellation import Immediate
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import PersistenceLayerConformance
from tests.support.controls import Controls

CONTROLS = Controls(PersistenceLayerConformance)
breaks = CONTROLS.breaks


# --- Claims that are granted or refused wrongly ---------------------------------------------------------------------


@breaks("one_of_many_claims_from_many_event_loops_is_granted", "one_of_many_concurrent_claims_is_granted")
class LooksAndStoresInTwoSteps(MemoryPersistenceLayer):
    async def acquire(self, record: DataRecord, **options: Any) -> Claimed | Blocked:  # type: ignore[override]
        found = self._records.get(record.idempotency_key)
        await asyncio.sleep(0)
        if found is None:
            self._records.pop(record.idempotency_key, None)
        return await super().acquire(record, **options)


class ChangesTheRecordFound(MemoryPersistenceLayer):
    """Lets `acquire` see the record found as `seen` pretends it to be."""

    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        raise NotImplementedError

    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        key = record.idempotency_key
        found = self._records.get(key)
        seen = None if found is None else self.seen(found, record, self.clock())
        if seen is None:
            self._records.pop(key, None)
        else:
            self._records[key] = seen
        answer = super().acquire(record, now=now, **options)
        if isinstance(answer.answer, Blocked) and found is not None:
            self._records[key] = found
            return Immediate(Blocked(found, answer.answer.now))
        return answer


@breaks("a_lease_holds_in_its_last_millisecond_and_lapses_after_it")
class LapsesInTheLastMillisecond(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        is_last = found.in_progress_expiry_timestamp == milliseconds(now)
        return found.replace(in_progress_expiry_timestamp=milliseconds(now) - 1) if is_last else found


@breaks(
    "a_claim_without_owner_is_never_ours",
    "a_lease_holds_in_its_last_millisecond_and_lapses_after_it",
    "acquire_finds_our_own_claim_again_as_it_was_stored",
    "clock_skew_is_added_to_a_foreign_lease_where_callers_judge",
    "complete_leaves_a_claim_that_took_ours_over_alone",
    "instants_are_moved_to_the_clock_that_judges",
    "release_leaves_a_foreign_claim_alone",
    "renew_leaves_a_foreign_claim_alone",
    "taking_over_leaves_nothing_of_the_record_found",
    "the_fence_grows_over_take_over",
)
class LapsesAMillisecondLate(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        end = found.in_progress_expiry_timestamp
        return found if end is None else found.replace(in_progress_expiry_timestamp=end + 1)


@breaks(
    "a_claim_counts_in_its_last_second_and_has_expired_after_it",
    "a_claim_that_must_not_be_taken_over_holds_until_it_expires",
    "a_completed_record_counts_in_its_last_second_and_has_expired_after_it",
)
class ExpiresInTheLastSecond(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return None if found.expiry_timestamp == int(now) else found


@breaks(
    "a_claim_counts_in_its_last_second_and_has_expired_after_it",
    "a_claim_that_has_expired_is_absent_even_while_its_lease_lasts",
    "a_claim_that_must_not_be_taken_over_holds_until_it_expires",
    "a_completed_record_counts_in_its_last_second_and_has_expired_after_it",
    "acquire_finds_our_own_claim_again_as_it_was_stored",
    "claiming_after_expiry_leaves_nothing_of_the_record_found",
    "the_fence_grows_over_expiry",
)
class ExpiresASecondLate(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return found.replace(expiry_timestamp=(found.expiry_timestamp or 0) + 1)


@breaks(
    "a_claim_counts_in_its_last_second_and_has_expired_after_it",
    "a_claim_that_has_expired_is_absent_even_while_its_lease_lasts",
    "a_claim_that_must_not_be_taken_over_holds_until_it_expires",
    "a_completed_record_counts_in_its_last_second_and_has_expired_after_it",
    "acquire_finds_our_own_claim_again_as_it_was_stored",
    "claiming_after_expiry_leaves_nothing_of_the_record_found",
    "the_fence_grows_over_expiry",
)
class LeavesExpiryToTheStore(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return found.replace(expiry_timestamp=None)


@breaks(
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "a_claim_that_must_not_be_taken_over_holds_until_it_expires",
)
class TakesOverWhatMustNotBeTakenOver(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return found.replace(in_progress_expiry_timestamp=lifecycle.lease_end(found))


@breaks(
    "a_cancelled_operation_leaves_the_layer_usable",
    "acquire_finds_our_own_claim_again_as_it_was_stored",
    "renew_can_turn_a_lease_into_doubt_and_back",
)
class BlocksItsOwnClaim(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return found.replace(owner="nobody")


@breaks("acquire_finds_our_own_claim_again_as_it_was_stored")
class GrantsItsOwnClaimAnew(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return None if lifecycle.is_held_by(found, record.owner) else found


@breaks("acquire_is_blocked_by_a_result")
class GrantsTheKeyOfItsOwnResult(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        is_our_result = found.owner == record.owner is not None and found.status is RecordStatus.COMPLETED
        return None if is_our_result else found


@breaks("a_claim_without_owner_is_never_ours")
class TakesNoOwnerForAnOwner(ChangesTheRecordFound):
    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        return None if found.owner is None and record.owner is None else found


@breaks("clock_skew_is_added_to_a_foreign_lease_where_callers_judge")
class AddsSkewToItsOwnClock(ChangesTheRecordFound):
    def acquire(
        self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0, **options: Any
    ) -> Immediate[Claimed | Blocked]:
        self.skew = max_clock_skew_seconds
        return super().acquire(record, now=now, **options)

    def seen(self, found: DataRecord, record: DataRecord, now: float) -> DataRecord | None:
        end = found.in_progress_expiry_timestamp
        return found if end is None else found.replace(in_progress_expiry_timestamp=end + int(self.skew * 1000))


@breaks("instants_are_moved_to_the_clock_that_judges")
class KeepsTheCallersInstants(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, *, now: float, **options: Any) -> Immediate[Claimed | Blocked]:
        return super().acquire(record, now=self.clock(), **options)


@breaks(
    "a_claim_counts_in_its_last_second_and_has_expired_after_it",
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "a_claim_that_must_not_be_taken_over_holds_until_it_expires",
    "a_claim_without_owner_is_never_ours",
    "a_completed_record_counts_in_its_last_second_and_has_expired_after_it",
    "a_lease_holds_in_its_last_millisecond_and_lapses_after_it",
    "a_renewal_that_arrives_after_its_successor_moves_nothing_back",
    "acquire_is_blocked_by_a_live_claim",
    "acquire_is_blocked_by_a_result",
    "one_of_many_concurrent_claims_is_granted",
    "renew_holds_a_claim_that_lapsed_and_that_nobody_took",
    "renew_moves_the_lease_and_the_expiry",
)
class AnswersNoRecordThatBlocks(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        answer = super().acquire(record, **options).answer
        return Immediate(answer if isinstance(answer, Claimed) else Blocked(record, answer.now))


@breaks("blocked_tells_how_long_the_claim_still_holds")
class JudgesByOneClockAndSaysAnother(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        answer = super().acquire(record, **options).answer
        return Immediate(answer if isinstance(answer, Claimed) else Blocked(answer.record, self.clock() - 60))


@breaks("acquire_claims_an_absent_key")
class SaysTakenOverOfAnAbsentKey(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        was_absent = record.idempotency_key not in self._records
        answer = super().acquire(record, **options).answer
        return Immediate(Claimed(answer.record, taken_over=True) if was_absent else answer)


@breaks("keys_are_kept_apart")
class FoldsTheCaseOfKeys(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        return super().acquire(record.replace(idempotency_key=record.idempotency_key.lower()), **options)

    def get(self, key: str) -> Immediate[DataRecord | None]:
        return super().get(key.lower())


# --- Claims that are stored wrongly ---------------------------------------------------------------------------------


class ChangesTheClaimStored(MemoryPersistenceLayer):
    """Stores a new claim as `changed` pretends it to be, and answers it as it should be."""

    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        raise NotImplementedError

    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        key = record.idempotency_key
        found = self._records.get(key)
        answer = super().acquire(record, **options)
        if isinstance(answer.answer, Claimed) and answer.answer.record is not found:
            claim = self._records[key] = self.changed(answer.answer.record, found)
            return Immediate(Claimed(claim, answer.answer.taken_over))
        return answer


@breaks("the_fence_grows_over_release", "the_first_fence_is_at_least_the_time_of_the_claim")
class CountsFencesAnewForEachRecord(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim.replace(fence=1 if found is None else found.fence + 1)


@breaks("the_fence_grows_over_release")
class CountsFencesByTheClockAlone(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        self._last_fence = 0
        return super().release(record)


@breaks("the_fence_grows_over_expiry", "the_fence_grows_over_take_over")
class KeepsTheFenceOnTakeOver(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim if found is None else claim.replace(fence=found.fence)


@breaks("claiming_after_expiry_leaves_nothing_of_the_record_found")
class LeavesTheOldResult(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim if found is None else claim.replace(response_data=found.response_data)


@breaks("claiming_after_expiry_leaves_nothing_of_the_record_found")
class LeavesTheOldOutcome(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim if found is None else claim.replace(outcome=found.outcome)


@breaks("claiming_after_expiry_leaves_nothing_of_the_record_found", "taking_over_leaves_nothing_of_the_record_found")
class LeavesTheOldHash(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim if found is None else claim.replace(payload_hash=claim.payload_hash or found.payload_hash)


@breaks("claiming_after_expiry_leaves_nothing_of_the_record_found", "taking_over_leaves_nothing_of_the_record_found")
class LeavesTheOldNote(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim if found is None else claim.replace(note=claim.note or found.note)


@breaks("the_note_of_a_claim_stays_as_it_is_through_renewal_and_completion")
class DropsTheNote(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim.replace(note=None)


@breaks("taking_over_leaves_nothing_of_the_record_found")
class LeavesTheOldLease(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        old = None if found is None else found.in_progress_expiry_timestamp
        return claim.replace(in_progress_expiry_timestamp=claim.in_progress_expiry_timestamp or old)


@breaks("acquire_claims_an_absent_key")
class DropsTheHash(ChangesTheClaimStored):
    def changed(self, claim: DataRecord, found: DataRecord | None) -> DataRecord:
        return claim.replace(payload_hash="")


@breaks(
    "a_cancelled_operation_leaves_the_layer_usable",
    "a_layer_may_be_opened_and_closed_repeatedly_and_used_afterwards",
    "acquire_answers_the_claim_as_stored",
    "acquire_finds_our_own_claim_again_as_it_was_stored",
    "acquire_is_blocked_by_a_live_claim",
    "another_event_loop_may_use_the_layer",
    "complete_leaves_a_claim_that_took_ours_over_alone",
    "complete_leaves_a_foreign_claim_alone",
    "get_may_find_a_record_that_has_expired",
    "one_of_many_claims_from_many_event_loops_is_granted",
    "one_of_many_concurrent_claims_is_granted",
    "release_leaves_a_foreign_claim_alone",
    "renew_answers_the_claim_as_stored_and_changes_nothing_but_its_instants",
    "renew_leaves_a_foreign_claim_alone",
    "renew_never_moves_a_claim_back",
    "the_fence_grows_over_expiry",
    "the_fence_grows_over_release",
    "the_fence_grows_over_take_over",
    "the_first_fence_is_at_least_the_time_of_the_claim",
)
class AnswersTheClaimAsProposed(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        found = self._records.get(record.idempotency_key)
        answer = super().acquire(record, **options).answer
        is_new = isinstance(answer, Claimed) and answer.record is not found
        return Immediate(Claimed(record) if is_new else answer)


# --- Completions ----------------------------------------------------------------------------------------------------


@breaks(
    "complete_leaves_a_claim_that_took_ours_over_alone",
    "complete_leaves_a_claim_without_owner_alone",
    "complete_leaves_a_foreign_claim_alone",
    "complete_leaves_a_foreign_outcome_alone",
    "complete_leaves_another_outcome_of_ours_alone",
    "complete_stores_the_outcome_where_a_foreign_record_has_expired",
)
class CompletesUnconditionally(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        self._records[record.idempotency_key] = record
        return Immediate(True)


@breaks(
    "complete_leaves_a_claim_that_took_ours_over_alone",
    "complete_leaves_a_claim_without_owner_alone",
    "complete_leaves_a_foreign_claim_alone",
    "complete_stores_the_outcome_where_a_foreign_record_has_expired",
)
class CompletesAnyClaim(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.status is RecordStatus.INPROGRESS:
            del self._records[record.idempotency_key]
        return super().complete(record, now=now)


@breaks("complete_leaves_a_foreign_claim_alone")
class CompletesOverALapsedClaim(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and lifecycle.is_lapsed(found, now=now):
            del self._records[record.idempotency_key]
        return super().complete(record, now=now)


@breaks("complete_stores_the_outcome_after_a_lapse_that_nobody_used")
class CompletesOnlyWhileTheLeaseLasts(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and lifecycle.is_lapsed(found, now=now):
            return Immediate(False)
        return super().complete(record, now=now)


@breaks("complete_leaves_a_claim_without_owner_alone")
class CompletesClaimsWithoutOwner(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.owner is None and record.owner is None:
            del self._records[record.idempotency_key]
        return super().complete(record, now=now)


@breaks("complete_stores_the_outcome_where_no_record_is")
class CompletesOnlyWhereARecordIs(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        if record.idempotency_key not in self._records:
            return Immediate(False)
        return super().complete(record, now=now)


@breaks("complete_stores_the_outcome_where_a_foreign_record_has_expired")
class CompletesNotWhereARecordHasExpired(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        return Immediate(_complete_as_of(self, record, 0.0, now))


@breaks("complete_stores_the_outcome_where_a_foreign_record_has_expired")
class CompletesWhereARecordExpiresThisSecond(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        return Immediate(_complete_as_of(self, record, now + 1, now))


def _complete_as_of(layer: MemoryPersistenceLayer, record: DataRecord, judged_now: float, now: float) -> bool:
    decision = lifecycle.complete(layer.records().get(record.idempotency_key), record, now=judged_now)
    if decision is lifecycle.Completion.STORE:
        layer._records[record.idempotency_key] = record
    return decision is not lifecycle.Completion.REFUSED


@breaks("the_note_of_a_claim_stays_as_it_is_through_renewal_and_completion")
class CompletesWithoutTheNote(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        return super().complete(record.replace(note=None), now=now)


@breaks("complete_leaves_another_outcome_of_ours_alone")
class OverwritesItsFirstOutcome(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.owner == record.owner is not None:
            del self._records[record.idempotency_key]
        return super().complete(record, now=now)


@breaks("complete_leaves_another_outcome_of_ours_alone")
class TakesAnyOutcomeOfOursForTheSame(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        is_ours = found is not None and found.owner == record.owner and found.status is RecordStatus.COMPLETED
        return Immediate(True) if is_ours else super().complete(record, now=now)


@breaks("complete_leaves_a_foreign_outcome_alone", "complete_leaves_another_outcome_of_ours_alone")
class TakesAForeignOutcomeForOurs(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        is_same = found is not None and found.response_data == record.response_data
        return Immediate(True) if is_same else super().complete(record, now=now)


@breaks("complete_may_be_repeated")
class RefusesToRepeatACompletion(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.status is RecordStatus.COMPLETED and not lifecycle.is_expired(found, now=now):
            return Immediate(False)
        return super().complete(record, now=now)


class ChangesTheOutcomeStored(MemoryPersistenceLayer):
    """Stores a completed record as `changed` pretends it to be."""

    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        raise NotImplementedError

    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        answer = super().complete(record, now=now)
        if self._records[record.idempotency_key] is not found:
            self._records[record.idempotency_key] = self.changed(record, found)
        return answer


@breaks("complete_stores_every_text_as_it_is")
class ParsesResults(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        text = record.response_data or ""
        return record.replace(response_data=str(float(text)) if text.isdigit() else text)


@breaks("complete_stores_every_text_as_it_is")
class DropsEmptyResults(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record.replace(response_data=None if record.response_data in {"null", "[]"} else record.response_data)


@breaks("complete_stores_the_kind_of_the_outcome")
class DropsTheKindOfTheOutcome(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record.replace(outcome=None)


@breaks("complete_stores_the_outcome_over_our_claim")
class DropsTheHashOnCompletion(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record.replace(payload_hash="")


@breaks("complete_stores_the_outcome_over_our_claim")
class DropsTheFenceOnCompletion(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record.replace(fence=0)


@breaks(
    "complete_may_be_repeated",
    "complete_stores_the_kind_of_the_outcome",
    "complete_stores_the_outcome_over_our_claim",
    "complete_stores_the_outcome_where_a_foreign_record_has_expired",
    "complete_stores_the_outcome_where_no_record_is",
)
class DropsTheOwnerOnCompletion(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record.replace(owner=None)


@breaks("complete_stores_the_outcome_over_our_claim")
class KeepsTheLeaseOnCompletion(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        end = None if found is None else found.in_progress_expiry_timestamp
        return record.replace(in_progress_expiry_timestamp=end)


@breaks("a_completed_record_counts_in_its_last_second_and_has_expired_after_it")
class KeepsTheExpiryOfTheClaim(ChangesTheOutcomeStored):
    def changed(self, record: DataRecord, found: DataRecord | None) -> DataRecord:
        return record if found is None else record.replace(expiry_timestamp=found.expiry_timestamp)


# --- Renewals -------------------------------------------------------------------------------------------------------


def _renew(layer: MemoryPersistenceLayer, found: DataRecord | None, record: DataRecord) -> Immediate[DataRecord | None]:
    base = record if found is None else found
    renewed = layer._records[record.idempotency_key] = base.replace(
        expiry_timestamp=record.expiry_timestamp,
        in_progress_expiry_timestamp=record.in_progress_expiry_timestamp,
        lease_expiry_timestamp=record.lease_expiry_timestamp,
    )
    return Immediate(renewed)


@breaks(
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "a_renewal_that_arrives_after_its_successor_moves_nothing_back",
    "renew_leaves_a_foreign_claim_alone",
    "renew_never_moves_a_claim_back",
)
class RenewsAnybodysClaim(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_claim = found is not None and found.owner is not None and found.status is RecordStatus.INPROGRESS
        return _renew(self, found, record) if is_claim else super().renew(record, now=now)


@breaks("renew_leaves_a_claim_without_owner_alone")
class RenewsClaimsWithoutOwner(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_ownerless = found is not None and found.owner is record.owner is None
        return _renew(self, found, record) if is_ownerless else super().renew(record, now=now)


@breaks("renew_leaves_an_outcome_alone")
class RenewsItsResult(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_result = found is not None and found.owner == record.owner and found.status is RecordStatus.COMPLETED
        return _renew(self, found, record) if is_result else super().renew(record, now=now)


@breaks("renew_does_not_bring_a_claim_back")
class RenewsWhatIsGone(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        return _renew(self, None, record) if found is None else super().renew(record, now=now)


@breaks("renew_holds_a_claim_that_lapsed_and_that_nobody_took")
class RenewsOnlyWhileTheLeaseLasts(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_lapsed = found is not None and lifecycle.is_lapsed(found, now=now)
        return Immediate(None) if is_lapsed else super().renew(record, now=now)


@breaks("renew_moves_the_lease_and_the_expiry", "renew_never_moves_a_claim_back")
class RenewsTheLeaseButNotTheExpiry(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        same = record if found is None else record.replace(expiry_timestamp=found.expiry_timestamp)
        return super().renew(same, now=now)


@breaks(
    "renew_can_turn_a_lease_into_doubt_and_back",
    "renew_holds_a_claim_that_lapsed_and_that_nobody_took",
    "renew_moves_the_lease_and_the_expiry",
    "renew_never_moves_a_claim_back",
)
class RenewsTheExpiryButNotTheLease(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        end = None if found is None else found.in_progress_expiry_timestamp
        same = record if end is None else record.replace(in_progress_expiry_timestamp=end)
        return super().renew(same, now=now)


@breaks(
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "renew_can_turn_a_lease_into_doubt_and_back",
    "renew_never_moves_a_claim_back",
)
class RenewsWithoutRemovingAnInstant(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        old = None if found is None else found.lease_expiry_timestamp
        return super().renew(record.replace(lease_expiry_timestamp=record.lease_expiry_timestamp or old), now=now)


@breaks("a_renewal_that_arrives_after_its_successor_moves_nothing_back", "renew_never_moves_a_claim_back")
class RenewsToEarlierInstantsAsCallersSendThem(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_back = found is not None and lifecycle.held_until(record) < lifecycle.held_until(found)
        is_ours = lifecycle.is_held_by(found, record.owner) and found is not None and not lifecycle.is_given_up(found)
        if is_ours and is_back and not lifecycle.is_given_up(record):
            return _renew(self, found, record)
        return super().renew(record, now=now)


@breaks("renew_never_moves_a_claim_back")
class ShortensTheClaim(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        if found is not None and lifecycle.is_held_by(found, record.owner) and not lifecycle.is_given_up(found):
            return _renew(self, found, lifecycle.shifted(record, seconds=self.clock() - now))
        return super().renew(record, now=now)


@breaks("a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more")
class RenewsWhatWasGivenUp(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_given_up = found is not None and lifecycle.is_given_up(found)
        return _renew(self, found, record) if is_given_up else super().renew(record, now=now)


@breaks("a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more")
class GivesUpOnlyOnce(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        is_given_up = found is not None and lifecycle.is_given_up(found)
        return Immediate(None) if is_given_up else super().renew(record, now=now)


@breaks("a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more")
class MovesTheMarkOfBeingGivenUp(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        if lifecycle.is_given_up(record):
            found = self._records.get(record.idempotency_key)
            return _renew(self, found, record.replace(lease_expiry_timestamp=milliseconds(self.clock() - now)))
        return super().renew(record, now=now)


@breaks("the_note_of_a_claim_stays_as_it_is_through_renewal_and_completion")
class RenewsTheNoteToo(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        renewed = super().renew(record, now=now).answer
        if renewed is not None:
            renewed = self._records[record.idempotency_key] = renewed.replace(note=record.note)
        return Immediate(renewed)


@breaks("renew_answers_the_claim_as_stored_and_changes_nothing_but_its_instants")
class RenewsTheHashToo(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        renewed = super().renew(record, now=now).answer
        if renewed is not None:
            renewed = self._records[record.idempotency_key] = renewed.replace(payload_hash=record.payload_hash)
        return Immediate(renewed)


@breaks(
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "a_renewal_that_arrives_after_its_successor_moves_nothing_back",
    "renew_answers_the_claim_as_stored_and_changes_nothing_but_its_instants",
    "renew_never_moves_a_claim_back",
    "the_note_of_a_claim_stays_as_it_is_through_renewal_and_completion",
)
class AnswersTheRenewalAsProposed(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        return Immediate(None if super().renew(record, now=now).answer is None else record)


@breaks(
    "a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more",
    "a_renewal_that_arrives_after_its_successor_moves_nothing_back",
    "renew_can_turn_a_lease_into_doubt_and_back",
    "renew_holds_a_claim_that_lapsed_and_that_nobody_took",
    "renew_moves_the_lease_and_the_expiry",
)
class NeverRenews(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        found = self._records.get(record.idempotency_key)
        return Immediate(found if lifecycle.is_held_by(found, record.owner) else None)


# --- Releases -------------------------------------------------------------------------------------------------------


@breaks("release_leaves_a_foreign_claim_alone")
class ReleasesAnybodysClaim(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        is_claim = found is not None and found.owner is not None and found.status is RecordStatus.INPROGRESS
        return Immediate(self._records.pop(record.idempotency_key, None) is not None if is_claim else False)


@breaks("release_leaves_a_claim_without_owner_alone")
class ReleasesClaimsWithoutOwner(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.owner is record.owner is None:
            del self._records[record.idempotency_key]
            return Immediate(True)
        return super().release(record)


@breaks("release_leaves_an_outcome_alone")
class ReleasesItsResult(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        if found is not None and found.owner == record.owner is not None:
            del self._records[record.idempotency_key]
            return Immediate(True)
        return super().release(record)


@breaks("release_says_that_there_is_nothing_to_release")
class SaysReleasedWhereNothingIs(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        is_absent = record.idempotency_key not in self._records
        return Immediate(super().release(record).answer or is_absent)


@breaks("release_deletes_our_claim")
class ReleasesOnlyWhileTheLeaseLasts(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        found = self._records.get(record.idempotency_key)
        is_lapsed = found is not None and lifecycle.is_lapsed(found, now=self.clock())
        return Immediate(False) if is_lapsed else super().release(record)


# --- Look-ups, and the layer as an object ---------------------------------------------------------------------------


@breaks(
    "forget_drops_any_record",
    "get_finds_nothing_under_an_unknown_key",
    "release_deletes_our_claim",
    "renew_does_not_bring_a_claim_back",
)
class InventsARecord(MemoryPersistenceLayer):
    def get(self, key: str) -> Immediate[DataRecord | None]:
        found = super().get(key).answer
        return Immediate(found or DataRecord(idempotency_key=key, status=RecordStatus.COMPLETED))


@breaks("get_may_find_a_record_that_has_expired")
class ChangesExpiredRecordsOnGet(MemoryPersistenceLayer):
    def get(self, key: str) -> Immediate[DataRecord | None]:
        found = super().get(key).answer
        is_expired = found is not None and lifecycle.is_expired(found, now=self.clock())
        return Immediate(found.replace(payload_hash="expired") if found is not None and is_expired else found)


@breaks("forget_drops_any_record")
class ForgetsNoResult(MemoryPersistenceLayer):
    def forget(self, key: str) -> Immediate[None]:
        found = self._records.get(key)
        is_result = found is not None and found.status is RecordStatus.COMPLETED
        return Immediate(None) if is_result else super().forget(key)


@breaks("forget_drops_any_record")
class ForgetsOnlyWhatIsThere(MemoryPersistenceLayer):
    def forget(self, key: str) -> Immediate[None]:
        del self._records[key]
        return Immediate(None)


@breaks("a_layer_may_be_opened_and_closed_repeatedly_and_used_afterwards")
class LosesItsRecordsOnClose(MemoryPersistenceLayer):
    async def aclose(self) -> None:
        self._records.clear()


@breaks("a_layer_may_be_opened_and_closed_repeatedly_and_used_afterwards", "a_layer_is_an_async_context_manager")
class OpensOnlyOnce(MemoryPersistenceLayer):
    is_open = False

    async def open(self) -> None:
        if self.is_open:
            raise RuntimeError("open already")
        self.is_open = True


@breaks("a_layer_is_an_async_context_manager")
class HidesErrors(MemoryPersistenceLayer):
    async def __aexit__(self, *exc_info: object) -> bool:  # type: ignore[override]
        return True


@breaks("another_event_loop_may_use_the_layer", "one_of_many_claims_from_many_event_loops_is_granted")
class BelongsToOneEventLoop(MemoryPersistenceLayer):
    loop: asyncio.AbstractEventLoop | None = None

    def _check(self) -> None:
        self.loop = self.loop or asyncio.get_running_loop()
        if self.loop is not asyncio.get_running_loop():
            raise RuntimeError("attached to a different loop")

    def acquire(self, record: DataRecord, **options: Any) -> Immediate[Claimed | Blocked]:
        self._check()
        return super().acquire(record, **options)

    def get(self, key: str) -> Immediate[DataRecord | None]:
        self._check()
        return super().get(key)


@breaks("a_layer_is_hashable_and_weakly_referencable_by_identity")
class CannotBeHashed(MemoryPersistenceLayer):
    __hash__ = None  # type: ignore[assignment]


@breaks("a_layer_is_hashable_and_weakly_referencable_by_identity")
class EqualsEveryOtherLayer(MemoryPersistenceLayer):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualsEveryOtherLayer)

    def __hash__(self) -> int:
        return 0


@breaks("a_cancelled_operation_leaves_the_layer_usable")
class StaysLockedWhenCancelled(MemoryPersistenceLayer):
    is_locked = False

    async def acquire(self, record: DataRecord, **options: Any) -> Claimed | Blocked:  # type: ignore[override]
        while self.is_locked:  # noqa: ASYNC110 - the fault is that it never ends
            await asyncio.sleep(0)
        self.is_locked = True
        await asyncio.sleep(0)
        answer = await super().acquire(record, **options)
        self.is_locked = False
        return answer


@breaks("a_cancelled_operation_leaves_the_layer_usable")
class ForgetsAClaimWhenCancelled(MemoryPersistenceLayer):
    async def acquire(self, record: DataRecord, **options: Any) -> Claimed | Blocked:  # type: ignore[override]
        answer = await super().acquire(record, **options)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._records[record.idempotency_key] = answer.record.replace(owner=None)
            raise
        return answer


# --- The runner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", CONTROLS.layers, ids=lambda broken: broken.__name__)
def test_exactly_the_tests_of_the_broken_promise_fail(broken: type[MemoryPersistenceLayer]) -> None:
    assert CONTROLS.failures_of(broken) == CONTROLS.layers[broken]


def test_the_unbroken_layer_passes() -> None:
    assert CONTROLS.failures_of(MemoryPersistenceLayer) == set()


def test_every_test_of_the_suite_is_seen_to_fail() -> None:
    assert set().union(*CONTROLS.layers.values()) == set(CONTROLS.tests)
