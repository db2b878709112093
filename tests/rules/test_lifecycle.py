"""The algorithm: each rule at its boundaries, then laws that hold for all records."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion, LeaseTerms, NextStep, RecordState
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus

NOW = 1_800_000_000.5
NOW_S = 1_800_000_000
NOW_MS = 1_800_000_000_500
HASH = "hash"


def claim(**fields: object) -> DataRecord:
    """Return a claim of theirs that neither lapses nor expires."""
    return DataRecord(idempotency_key="key", status=RecordStatus.INPROGRESS, owner="theirs", fence=7).replace(**fields)


def result(**fields: object) -> DataRecord:
    """Return a result of theirs that never expires."""
    return claim(status=RecordStatus.COMPLETED, response_data="1").replace(**fields)


PROPOSED = claim(
    owner="ours",
    fence=0,
    expiry_timestamp=NOW_S + 60,
    in_progress_expiry_timestamp=NOW_MS + 30_000,
    lease_expiry_timestamp=NOW_MS + 31_000,
    payload_hash=HASH,
    sort_key="sort",
    note="note",
)
OLD = result(
    expiry_timestamp=NOW_S - 1,
    in_progress_expiry_timestamp=1,
    lease_expiry_timestamp=1,
    outcome=OutcomeKind.EXCEPTION,
    payload_hash="old",
    sort_key="old",
    note="old",
)

# --- What a record means at an instant ------------------------------------------------------------------------------


@pytest.mark.parametrize(("expiry", "expected"), [(None, False), (NOW_S - 1, True), (NOW_S, False), (NOW_S + 1, False)])
@pytest.mark.parametrize("now", [NOW_S, NOW, NOW_S + 0.999])
def test_a_record_is_expired_when_its_expiry_lies_before_the_second(
    expiry: int | None, expected: bool, now: float
) -> None:
    for record in (claim(expiry_timestamp=expiry), result(expiry_timestamp=expiry)):
        assert lifecycle.is_expired(record, now=now) is expected
        assert lifecycle.status_of(record, now=now) is (RecordStatus.EXPIRED if expected else record.status)


@pytest.mark.parametrize(("end", "expected"), [(None, False), (NOW_MS - 1, True), (NOW_MS, False), (NOW_MS + 1, False)])
def test_a_claim_is_lapsed_when_its_lease_ended_before_the_millisecond(end: int | None, expected: bool) -> None:
    assert lifecycle.is_lapsed(claim(in_progress_expiry_timestamp=end), now=NOW) is expected
    assert not lifecycle.is_lapsed(result(in_progress_expiry_timestamp=end), now=NOW)
    assert not lifecycle.is_lapsed(claim(lease_expiry_timestamp=end), now=NOW)


@pytest.mark.parametrize(("end", "expected"), [(NOW_MS - 2001, True), (NOW_MS - 2000, False)])
def test_clock_skew_prolongs_a_lease(end: int, expected: bool) -> None:
    record = claim(in_progress_expiry_timestamp=end)
    assert lifecycle.is_lapsed(record, now=NOW, max_clock_skew_seconds=2) is expected
    answer = lifecycle.acquire(record, PROPOSED, now=NOW, max_clock_skew_seconds=2)
    assert isinstance(answer, Claimed) is expected


@pytest.mark.parametrize(("end", "expected"), [(None, False), (NOW_MS - 1, True), (NOW_MS, False), (NOW_MS + 1, False)])
def test_a_claim_is_in_doubt_when_a_lease_that_nobody_may_take_over_has_ended(end: int | None, expected: bool) -> None:
    assert lifecycle.is_in_doubt(claim(lease_expiry_timestamp=end), now=NOW) is expected
    assert not lifecycle.is_in_doubt(result(lease_expiry_timestamp=end), now=NOW)
    both = claim(lease_expiry_timestamp=end, in_progress_expiry_timestamp=NOW_MS)
    assert not lifecycle.is_in_doubt(both, now=NOW)


@pytest.mark.parametrize(
    ("record", "owner", "expected"),
    [
        (claim(owner="ours"), "ours", True),
        (claim(), "ours", False),
        (result(owner="ours"), "ours", False),
        (claim(owner=None), None, False),
        (claim(owner=None), "ours", False),
        (claim(), None, False),
        (None, "ours", False),
        (None, None, False),
    ],
)
def test_a_claim_is_held_by_its_owner(record: DataRecord | None, owner: str | None, expected: bool) -> None:
    assert lifecycle.is_held_by(record, owner) is expected


@pytest.mark.parametrize(
    ("in_progress", "lease", "expected"), [(1, None, 1), (None, 2, 2), (1, 2, 1), (0, 2, 0), (None, None, None)]
)
def test_a_lease_ends_when_it_lapses_or_becomes_in_doubt(
    in_progress: int | None, lease: int | None, expected: int | None
) -> None:
    record = claim(in_progress_expiry_timestamp=in_progress, lease_expiry_timestamp=lease)
    assert lifecycle.lease_end(record) == expected


@pytest.mark.parametrize(
    ("record", "seconds"),
    [
        (claim(), None),
        (claim(lease_expiry_timestamp=NOW_MS + 2_000), None),  # in doubt then, and nobody may take it over
        (claim(in_progress_expiry_timestamp=NOW_MS + 2_000), 2.0),
        (claim(in_progress_expiry_timestamp=NOW_MS + 2_000, expiry_timestamp=NOW_S + 60), 2.0),
        (claim(expiry_timestamp=NOW_S + 60), 60.5),
        (claim(in_progress_expiry_timestamp=NOW_MS + 90_000, expiry_timestamp=NOW_S + 60), 60.5),
        (claim(in_progress_expiry_timestamp=NOW_MS - 2_000), -2.0),
    ],
)
def test_a_claim_keeps_others_from_its_key_until_it_lapses_or_expires(
    record: DataRecord, seconds: float | None
) -> None:
    assert lifecycle.blocks_for_seconds(record, now=NOW) == (None if seconds is None else pytest.approx(seconds))
    if seconds is not None:
        after = NOW + seconds + 0.001
        assert lifecycle.is_lapsed(record, now=after) or lifecycle.is_expired(record, now=after)


# --- Acquire --------------------------------------------------------------------------------------------------------


def test_a_key_without_record_is_claimed_as_proposed() -> None:
    assert lifecycle.acquire(None, PROPOSED, now=NOW) == Claimed(PROPOSED.replace(fence=NOW_MS), taken_over=False)


def test_the_fence_of_a_key_without_record_is_higher_than_the_last_one() -> None:
    for last, expected in [(NOW_MS - 2, NOW_MS), (NOW_MS - 1, NOW_MS), (NOW_MS, NOW_MS + 1), (NOW_MS + 9, NOW_MS + 10)]:
        answer = lifecycle.acquire(None, PROPOSED, now=NOW, last_fence=last)
        assert answer.record.fence == expected


def test_a_store_that_has_given_out_no_fence_begins_with_one_at_the_latest() -> None:
    assert lifecycle.acquire(None, PROPOSED, now=0.0).record.fence == 1


def test_an_expired_record_is_replaced_and_nothing_of_it_is_left() -> None:
    assert lifecycle.acquire(OLD, PROPOSED, now=NOW) == Claimed(PROPOSED.replace(fence=8), taken_over=False)


def test_an_expired_claim_of_ours_is_claimed_anew() -> None:
    found = claim(owner="ours", expiry_timestamp=NOW_S - 1)
    assert lifecycle.acquire(found, PROPOSED, now=NOW) == Claimed(PROPOSED.replace(fence=8), taken_over=False)


def test_a_lapsed_claim_is_taken_over_and_nothing_of_it_is_left() -> None:
    found = OLD.replace(status=RecordStatus.INPROGRESS, expiry_timestamp=None, in_progress_expiry_timestamp=NOW_MS - 1)
    assert lifecycle.acquire(found, PROPOSED, now=NOW) == Claimed(PROPOSED.replace(fence=8), taken_over=True)


@pytest.mark.parametrize("found", [OLD, claim(in_progress_expiry_timestamp=1)])
def test_the_fence_is_the_one_found_plus_one_and_higher_than_the_last_one(found: DataRecord) -> None:
    for last, expected in [(0, 8), (6, 8), (7, 8), (8, 9), (99, 100)]:
        assert lifecycle.acquire(found, PROPOSED, now=NOW, last_fence=last).record.fence == expected


@pytest.mark.parametrize("found", [OLD, claim(in_progress_expiry_timestamp=1)])
def test_a_fence_found_by_another_library_counts_as_the_time(found: DataRecord) -> None:
    assert lifecycle.acquire(found.replace(fence=0), PROPOSED, now=NOW).record.fence == NOW_MS + 1


def test_our_own_claim_is_claimed_as_found() -> None:
    found = claim(owner="ours", payload_hash="found")
    assert lifecycle.acquire(found, PROPOSED, now=NOW) == Claimed(found, taken_over=False)


@pytest.mark.parametrize(
    "found",
    [
        claim(),
        claim(owner=None),
        claim(in_progress_expiry_timestamp=NOW_MS),
        claim(lease_expiry_timestamp=1),
        claim(expiry_timestamp=NOW_S),
        result(),
        result(owner="ours"),
        result(in_progress_expiry_timestamp=1),
    ],
)
def test_everything_else_blocks(found: DataRecord) -> None:
    assert lifecycle.acquire(found, PROPOSED, now=NOW) == Blocked(found, NOW)


# --- Take over, to resolve ------------------------------------------------------------------------------------------

IN_DOUBT = claim(lease_expiry_timestamp=NOW_MS - 1, expiry_timestamp=NOW_S, payload_hash="old", note="old")
TAKEN = PROPOSED.replace(fence=8)


@pytest.mark.parametrize(
    "stored",
    [
        IN_DOUBT,
        IN_DOUBT.replace(lease_expiry_timestamp=lifecycle.GIVEN_UP),
        claim(in_progress_expiry_timestamp=NOW_MS - 1),
        claim(in_progress_expiry_timestamp=NOW_MS - 1, lease_expiry_timestamp=NOW_MS + 1),
    ],
)
def test_a_claim_whose_lease_has_passed_is_taken_over_and_nothing_of_it_is_left(stored: DataRecord) -> None:
    assert lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW) == TAKEN


@pytest.mark.parametrize(
    "stored",
    [claim(), claim(lease_expiry_timestamp=NOW_MS), claim(in_progress_expiry_timestamp=NOW_MS)],
)
def test_a_claim_whose_lease_has_not_passed_is_taken_over_by_force_alone(stored: DataRecord) -> None:
    assert lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW) is None
    assert lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW, force=True) == TAKEN


@pytest.mark.parametrize(
    "stored",
    [
        None,
        claim(owner="others", lease_expiry_timestamp=1),
        claim(owner=None, lease_expiry_timestamp=1),
        claim(fence=8, lease_expiry_timestamp=1),
        claim(expiry_timestamp=NOW_S - 1, lease_expiry_timestamp=1),
        claim(owner="ours", expiry_timestamp=NOW_S - 1, lease_expiry_timestamp=1),
        result(lease_expiry_timestamp=1),
        result(owner="ours", lease_expiry_timestamp=1),
    ],
)
def test_any_other_record_than_the_claim_found_is_not_taken_over(stored: DataRecord | None) -> None:
    for force in (False, True):
        assert lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW, force=force) is None


def test_our_own_claim_is_not_taken_over_once_more() -> None:
    stored = claim(owner="ours", fence=8, lease_expiry_timestamp=1)
    for force in (False, True):
        assert lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW, force=force) is stored


@pytest.mark.parametrize(("end", "expected"), [(NOW_MS - 2001, True), (NOW_MS - 2000, False), (0, True)])
def test_clock_skew_prolongs_the_lease_of_a_claim_in_doubt(end: int, expected: bool) -> None:
    stored = claim(lease_expiry_timestamp=end)
    taken = lifecycle.taken_over(stored, claim(), PROPOSED, now=NOW, max_clock_skew_seconds=2)
    assert (taken is not None) is expected


def test_the_fence_of_a_claim_that_takes_over_is_higher_than_the_one_found_and_the_last_one() -> None:
    stored = claim(owner=None, fence=0, in_progress_expiry_timestamp=1)
    taken = lifecycle.taken_over(stored, stored, PROPOSED, now=NOW)
    assert taken == PROPOSED.replace(fence=NOW_MS + 1)
    later = lifecycle.taken_over(stored, stored, PROPOSED, now=NOW, last_fence=NOW_MS + 5)
    assert later == PROPOSED.replace(fence=NOW_MS + 6)


# --- What operators see and hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "state"),
    [
        (claim(), RecordState.RUNNING),
        (claim(in_progress_expiry_timestamp=NOW_MS), RecordState.RUNNING),
        (claim(lease_expiry_timestamp=NOW_MS), RecordState.RUNNING),
        (claim(in_progress_expiry_timestamp=NOW_MS - 1), RecordState.LAPSED),
        (claim(lease_expiry_timestamp=NOW_MS - 1), RecordState.IN_DOUBT),
        (claim(lease_expiry_timestamp=0), RecordState.IN_DOUBT),
        (result(expiry_timestamp=NOW_S), RecordState.COMPLETED),
        (result(expiry_timestamp=NOW_S - 1), RecordState.EXPIRED),
        (claim(lease_expiry_timestamp=0, expiry_timestamp=NOW_S - 1), RecordState.EXPIRED),
    ],
)
def test_a_record_has_a_state_for_operators(record: DataRecord, state: RecordState) -> None:
    assert lifecycle.state_of(record, now=NOW) is state


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        (claim(in_progress_expiry_timestamp=1), (NOW_MS + 5000, None)),
        (claim(in_progress_expiry_timestamp=1, lease_expiry_timestamp=1), (NOW_MS + 5000, None)),
        (claim(lease_expiry_timestamp=0), (None, NOW_MS + 5000)),
        (claim(), (None, None)),
    ],
)
def test_an_operator_holds_a_claim_of_the_kind_found(found: DataRecord, ends: tuple[int | None, int | None]) -> None:
    for expiry, expected in ((None, None), (NOW_S, NOW_S + 6), (NOW_S + 7, NOW_S + 7)):
        held = lifecycle.held_by_operator(
            found.replace(expiry_timestamp=expiry, note="note"), owner="ours", held_seconds=5, now=NOW
        )
        assert held == found.replace(
            owner="ours",
            note="note",
            expiry_timestamp=expected,
            in_progress_expiry_timestamp=ends[0],
            lease_expiry_timestamp=ends[1],
        )


# --- Complete -------------------------------------------------------------------------------------------------------

COMPLETED = result(owner="ours", response_data="2", payload_hash=HASH)


@pytest.mark.parametrize(
    "found",
    [
        None,
        claim(owner="ours"),
        claim(owner="ours", in_progress_expiry_timestamp=1),
        claim(expiry_timestamp=NOW_S - 1),
        result(expiry_timestamp=NOW_S - 1),
    ],
)
def test_an_outcome_is_stored_over_our_claim_or_nothing(found: DataRecord | None) -> None:
    assert lifecycle.complete(found, COMPLETED, now=NOW) is Completion.STORE


@pytest.mark.parametrize("outcome", [None, *OutcomeKind])
def test_the_same_outcome_of_ours_is_stored_already(outcome: OutcomeKind | None) -> None:
    record = COMPLETED.replace(outcome=outcome)
    found = record.replace(expiry_timestamp=NOW_S, fence=1)
    assert lifecycle.complete(found, record, now=NOW) is Completion.ALREADY_STORED


@pytest.mark.parametrize(
    "found",
    [
        claim(),
        claim(in_progress_expiry_timestamp=1),
        claim(expiry_timestamp=NOW_S),
        claim(response_data="2"),
        result(response_data="2"),
        COMPLETED.replace(response_data="3"),
        COMPLETED.replace(response_data=None),
        COMPLETED.replace(outcome=OutcomeKind.UNAVAILABLE),
        COMPLETED.replace(owner=None),
    ],
)
def test_any_other_record_refuses_an_outcome(found: DataRecord) -> None:
    assert lifecycle.complete(found, COMPLETED, now=NOW) is Completion.REFUSED


@pytest.mark.parametrize("status", [RecordStatus.INPROGRESS, RecordStatus.COMPLETED])
def test_a_record_without_owner_refuses_an_outcome_without_owner(status: RecordStatus) -> None:
    record = COMPLETED.replace(owner=None)
    assert lifecycle.complete(record.replace(status=status), record, now=NOW) is Completion.REFUSED


# --- Renew ----------------------------------------------------------------------------------------------------------


def test_a_renewed_claim_has_the_new_instants_and_keeps_everything_else() -> None:
    found = claim(owner="ours", payload_hash="found", expiry_timestamp=1, in_progress_expiry_timestamp=2)
    expected = found.replace(
        expiry_timestamp=NOW_S + 60,
        in_progress_expiry_timestamp=NOW_MS + 30_000,
        lease_expiry_timestamp=NOW_MS + 31_000,
    )
    assert lifecycle.renewed(found, PROPOSED) == expected


@pytest.mark.parametrize(
    ("held", "until"),
    [
        ({"expiry_timestamp": 4}, 5000),  # to the end of its second
        ({"expiry_timestamp": 4, "lease_expiry_timestamp": 3000}, 3000),
        ({"expiry_timestamp": 4, "in_progress_expiry_timestamp": 2000}, 2000),
        ({"in_progress_expiry_timestamp": 2000, "lease_expiry_timestamp": 3000}, 2000),
        ({}, inf),
    ],
)
def test_a_renewal_that_would_move_a_claim_back_changes_nothing(held: dict[str, int], until: float) -> None:
    found = claim(owner="ours", **held)
    assert lifecycle.held_until(found) == until
    for renewal in (
        claim(in_progress_expiry_timestamp=1999),
        claim(lease_expiry_timestamp=1),
        claim(expiry_timestamp=0),
    ):
        assert lifecycle.renewed(found, renewal.replace(owner="ours")) is found
    assert lifecycle.renewed(found, found) == found
    later = claim(owner="ours", expiry_timestamp=None)
    assert lifecycle.renewed(found, later) == later


def test_giving_a_claim_up_is_final() -> None:
    held = claim(owner="ours", expiry_timestamp=NOW_S + 60, lease_expiry_timestamp=NOW_MS + 30_000)
    given_up = lifecycle.abandoned(held)
    assert lifecycle.renewed(held, given_up) == given_up
    assert lifecycle.renewed(given_up, given_up) == given_up
    for renewal in (held, held.replace(lease_expiry_timestamp=None), PROPOSED):
        assert lifecycle.renewed(given_up, renewal) is None


@pytest.mark.parametrize("found", [None, claim(), claim(owner=None), result(owner="ours")])
def test_what_is_not_ours_is_not_renewed(found: DataRecord | None) -> None:
    assert lifecycle.renewed(found, PROPOSED) is None


# --- The records a call proposes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lease", "expected"),
    [
        (LeaseTerms(expires_after_seconds=60, lease_seconds=None, may_be_taken_over=True), (NOW_S + 60, None, None)),
        (LeaseTerms(expires_after_seconds=60, lease_seconds=None, may_be_taken_over=False), (NOW_S + 60, None, None)),
        (LeaseTerms(expires_after_seconds=60.5, lease_seconds=None, may_be_taken_over=True), (NOW_S + 61, None, None)),
        (
            LeaseTerms(expires_after_seconds=60, lease_seconds=30, may_be_taken_over=True),
            (NOW_S + 60, NOW_MS + 30_000, None),
        ),
        (
            LeaseTerms(expires_after_seconds=60, lease_seconds=30, may_be_taken_over=False),
            (NOW_S + 60, None, NOW_MS + 30_000),
        ),
        # A lease that outlasts the record prolongs it, up to the full second in which it ends.
        (
            LeaseTerms(expires_after_seconds=1, lease_seconds=9.5, may_be_taken_over=True),
            (NOW_S + 10, NOW_MS + 9500, None),
        ),
        (
            LeaseTerms(expires_after_seconds=1, lease_seconds=9.501, may_be_taken_over=True),
            (NOW_S + 11, NOW_MS + 9501, None),
        ),
        (
            LeaseTerms(expires_after_seconds=1, lease_seconds=9.4, may_be_taken_over=True),
            (NOW_S + 10, NOW_MS + 9400, None),
        ),
        (
            LeaseTerms(expires_after_seconds=60, lease_seconds=30, may_be_taken_over=True, max_clock_skew_seconds=10),
            (NOW_S + 60, NOW_MS + 30_000, None),
        ),
        (
            LeaseTerms(expires_after_seconds=35, lease_seconds=30, may_be_taken_over=False, max_clock_skew_seconds=10),
            (NOW_S + 41, None, NOW_MS + 30_000),
        ),
    ],
)
def test_the_instants_of_a_lease(lease: LeaseTerms, expected: tuple[int, int | None, int | None]) -> None:
    assert lease.instants(now=NOW) == expected
    expiry, in_progress_expiry, lease_expiry = expected
    assert lifecycle.claim("key", owner="ours", payload_hash=HASH, lease=lease, now=NOW) == DataRecord(
        idempotency_key="key",
        status=RecordStatus.INPROGRESS,
        expiry_timestamp=expiry,
        in_progress_expiry_timestamp=in_progress_expiry,
        lease_expiry_timestamp=lease_expiry,
        payload_hash=HASH,
        owner="ours",
    )
    assert lifecycle.renewal(PROPOSED, lease=lease, now=NOW) == PROPOSED.replace(
        expiry_timestamp=expiry, in_progress_expiry_timestamp=in_progress_expiry, lease_expiry_timestamp=lease_expiry
    )


def test_an_abandoned_claim_is_in_doubt_at_once() -> None:
    held = claim(expiry_timestamp=NOW_S + 60, lease_expiry_timestamp=NOW_MS + 30_000)
    abandoned = lifecycle.abandoned(held)
    assert abandoned == held.replace(lease_expiry_timestamp=lifecycle.GIVEN_UP)
    assert lifecycle.is_in_doubt(abandoned, now=NOW)
    assert lifecycle.shifted(abandoned, seconds=5).lease_expiry_timestamp == lifecycle.GIVEN_UP


@pytest.mark.parametrize("outcome", [None, OutcomeKind.EXCEPTION])
def test_a_completed_record_keeps_what_names_its_claim(outcome: OutcomeKind | None) -> None:
    record = lifecycle.completed(
        PROPOSED.replace(fence=5), response_data="[]", outcome=outcome, expires_after_seconds=60.5, now=NOW
    )
    assert record == DataRecord(
        idempotency_key="key",
        status=RecordStatus.COMPLETED,
        expiry_timestamp=NOW_S + 61,
        response_data="[]",
        outcome=outcome,
        payload_hash=HASH,
        sort_key="sort",
        owner="ours",
        fence=5,
        note="note",
    )


@pytest.mark.parametrize(
    ("seconds", "expiry", "instants"),
    [
        (0.0009, 0, 0),
        (-0.0009, 0, 0),
        (0.001, 1, 1),
        (-0.001, 0, -1),
        (1.0, 1, 1000),
        (1.0015, 2, 1001),
        (-1.0, -1, -1000),
        (-1.999, -1, -1999),
        (3600.25, 3601, 3600_250),
    ],
)
def test_a_shifted_record_has_later_instants(seconds: float, expiry: int, instants: int) -> None:
    assert lifecycle.shifted(PROPOSED, seconds=seconds) == PROPOSED.replace(
        expiry_timestamp=NOW_S + 60 + expiry,
        in_progress_expiry_timestamp=NOW_MS + 30_000 + instants,
        lease_expiry_timestamp=NOW_MS + 31_000 + instants,
    )


@pytest.mark.parametrize(("seconds", "expiry"), [(0.004, 0), (0.499, 0), (0.5, 1), (-0.4, 0), (3600.25, 3600)])
def test_the_expiry_of_a_claim_taken_over_is_shifted_to_the_nearest_second(seconds: float, expiry: int) -> None:
    shifted = lifecycle.shifted(PROPOSED, seconds=seconds, to_nearest_second=True)
    assert shifted.expiry_timestamp == NOW_S + 60 + expiry


def test_instants_that_are_not_set_are_not_shifted() -> None:
    assert lifecycle.shifted(claim(), seconds=10) == claim()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(NOW, NOW_MS), (1.9990234375, 1999), (0.0009765625, 0), (0.0, 0), (2.0, 2000)]
)
def test_milliseconds_are_floored(seconds: float, expected: int) -> None:
    assert lifecycle.milliseconds(seconds) == expected


# --- What a call does about the record that blocks it ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (result(), NextStep.REPLAY),
        (result(payload_hash=HASH), NextStep.REPLAY),
        (result(payload_hash="other"), NextStep.MISMATCH),
        (claim(), NextStep.WAIT),
        (claim(payload_hash=HASH), NextStep.WAIT),
        (claim(payload_hash="other"), NextStep.MISMATCH),
        (claim(lease_expiry_timestamp=NOW_MS), NextStep.WAIT),
        (claim(lease_expiry_timestamp=NOW_MS - 1), NextStep.IN_DOUBT),
        (claim(lease_expiry_timestamp=NOW_MS - 1, payload_hash="other"), NextStep.MISMATCH),
        (claim(in_progress_expiry_timestamp=NOW_MS - 1), NextStep.WAIT),
    ],
)
def test_what_a_call_does_about_a_live_record(record: DataRecord, expected: NextStep) -> None:
    assert lifecycle.next_step(record, payload_hash=HASH, now=NOW) is expected


@pytest.mark.parametrize(
    ("stored", "sent", "expected"),
    [("a", "a", False), ("a", "b", True), ("", "b", False), ("a", "", False), ("", "", False)],
)
def test_a_side_without_hash_is_not_compared(stored: str, sent: str, expected: bool) -> None:
    assert lifecycle.differs(claim(payload_hash=stored), sent) is expected


# --- Laws -----------------------------------------------------------------------------------------------------------

instants_ms = st.none() | st.integers(NOW_MS - 3000, NOW_MS + 3000)
instants_s = st.none() | st.integers(NOW_S - 3, NOW_S + 3)
nows = st.floats(NOW_S - 3, NOW_S + 3)
owners = st.sampled_from([None, "ours", "theirs"])
records = st.builds(
    DataRecord,
    idempotency_key=st.just("key"),
    status=st.sampled_from([RecordStatus.INPROGRESS, RecordStatus.COMPLETED]),
    expiry_timestamp=instants_s,
    in_progress_expiry_timestamp=instants_ms,
    lease_expiry_timestamp=instants_ms,
    response_data=st.sampled_from([None, "1", "2"]),
    outcome=st.sampled_from([None, *OutcomeKind]),
    payload_hash=st.sampled_from(["", HASH, "other"]),
    owner=owners,
    fence=st.integers(0, 3) | st.integers(NOW_MS - 3000, NOW_MS + 3000),
)
leases = st.builds(
    LeaseTerms,
    expires_after_seconds=st.floats(0.001, 100),
    lease_seconds=st.none() | st.floats(0.001, 100),
    may_be_taken_over=st.booleans(),
)


@given(found=st.none() | records, owner=owners, now=nows, last_fence=st.integers(0, NOW_MS + 3000))
def test_a_key_is_claimed_exactly_when_it_is_absent_expired_ours_or_lapsed(
    found: DataRecord | None, owner: str | None, now: float, last_fence: int
) -> None:
    answer = lifecycle.acquire(found, PROPOSED.replace(owner=owner), now=now, last_fence=last_fence)
    may_be_had = (
        found is None
        or lifecycle.is_expired(found, now=now)
        or lifecycle.is_held_by(found, owner)
        or lifecycle.is_lapsed(found, now=now)
    )
    assert isinstance(answer, Claimed) is may_be_had
    if answer.record is not found:
        assert answer.record.fence > max(last_fence, 0 if found is None else found.fence)


@given(found=records, now=nows, hash_=st.sampled_from(["", HASH]))
def test_nobody_waits_for_a_completed_record(found: DataRecord, now: float, hash_: str) -> None:
    step = lifecycle.next_step(found, payload_hash=hash_, now=now)
    is_completed = found.status is RecordStatus.COMPLETED
    assert (step in {NextStep.WAIT, NextStep.IN_DOUBT}) <= (not is_completed)
    assert (step is NextStep.REPLAY) <= is_completed


@given(found=records, record=records, now=nows)
def test_an_outcome_never_changes_a_live_record_that_is_not_ours(
    found: DataRecord, record: DataRecord, now: float
) -> None:
    is_live = not lifecycle.is_expired(found, now=now)
    if lifecycle.complete(found, record, now=now) is Completion.STORE and is_live:
        assert lifecycle.is_held_by(found, record.owner)
        assert found.owner == record.owner is not None


@given(found=records, lease=leases, now=nows)
def test_a_renewed_claim_is_held_and_neither_expired_nor_lapsed_nor_in_doubt(
    found: DataRecord, lease: LeaseTerms, now: float
) -> None:
    end, expiry = lifecycle.lease_end(found), found.expiry_timestamp
    assume(end is None or expiry is None or end <= expiry * 1000)  # as every claim is made
    assume(not lifecycle.is_given_up(found))
    renewed = lifecycle.renewed(found, lifecycle.renewal(found, lease=lease, now=now))
    assert (renewed is not None) == lifecycle.is_held_by(found, found.owner)
    if renewed is not None:
        assert lifecycle.is_held_by(renewed, found.owner)
        assert not lifecycle.is_expired(renewed, now=now)
        assert not lifecycle.is_lapsed(renewed, now=now)
        assert not lifecycle.is_in_doubt(renewed, now=now)
        assert renewed.fence == found.fence


@given(lease=leases, now=nows, shift_seconds=st.floats(-5, 5))
def test_a_lease_never_ends_after_its_record(lease: LeaseTerms, now: float, shift_seconds: float) -> None:
    made = lifecycle.claim("key", owner="ours", payload_hash="", lease=lease, now=now)
    for record in (made, lifecycle.shifted(made, seconds=shift_seconds)):
        end = lifecycle.lease_end(record)
        assert record.expiry_timestamp is not None
        assert end is None or end <= record.expiry_timestamp * 1000


@given(record=records, seconds=st.floats(-5, 5))
def test_shifting_keeps_the_length_of_a_lease_and_never_shortens_the_window(record: DataRecord, seconds: float) -> None:
    shifted = lifecycle.shifted(record, seconds=seconds)
    moved = lifecycle.milliseconds(abs(seconds)) * (1 if seconds > 0 else -1)
    instants: list[Callable[[DataRecord], int | None]] = [
        lambda record: record.in_progress_expiry_timestamp,
        lambda record: record.lease_expiry_timestamp,
    ]
    for instant in instants:
        before, after = instant(record), instant(shifted)
        assert after == (None if before is None else before + moved)
    if record.expiry_timestamp is not None:
        assert shifted.expiry_timestamp is not None
        assert 0 <= (shifted.expiry_timestamp - record.expiry_timestamp) * 1000 - moved < 1000
