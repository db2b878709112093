"""The contract of `aidem.persistence.PersistenceLayer` as tests: one per sentence, a section for each operation."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
from anyio import to_thread

from aidem._rules.lifecycle import GIVEN_UP, Blocked, Claimed, lease_end
from aidem._rules.record import OutcomeKind
from aidem.testing._clock import FakeClock
from aidem.testing._trial import (
    KEPT_SECONDS,
    LEASE_SECONDS,
    Trial,
    claim_of,
    completed_of,
    kinds_of_instants,
    timeless,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aidem._rules.record import DataRecord
    from aidem.persistence import PersistenceLayer

CONCURRENT_CLAIMS: Final = 20
MAX_SECONDS_PER_OPERATION: Final = 10

TEXTS: Final = (
    "null",
    "[]",
    "{}",
    '""',
    "9007199254740993",  # 2**53 + 1: a store that parses JSON rounds it
    "1234567890123456789",
    "1.0",
    '{"b": 1, "a":  2}',
    '"Zürich, 東京, 🐙, \\u00e9, \\u0000"',
    "aidem:unavailable",
    '"' + "long " * 20_000 + '"',
)

NOTES: Final = ("order 7, host api-1", '{"status": "COMPLETED"}, "\\u0000', "Zürich, 東京, 🐙")


class PersistenceLayerConformance:
    """Tests that a layer keeps the contract: subclass it in a test module, and make your layer in `make_layer`.

        class TestMyLayer(PersistenceLayerConformance):
            async def make_layer(self, clock):
                return MyLayer(clock=clock)

    It needs pytest and the pytest plugin of anyio. Every test uses its own key, so tests can share a store. For
    detailed messages of failed assertions, call `pytest.register_assert_rewrite("aidem.testing")` in `conftest.py`.

    Attributes:
        adds_clock_skew: Whether the layer uses the clocks of its callers, and so adds `max_clock_skew_seconds`.
            Default: False.
        clock_tolerance_seconds: Maximum difference in seconds between `clock` and the clock of the store. Default: 0,
            for a layer that uses `clock`. For a store with its own clock, which goes on during a test, set it to at
            least 1 and less than 2, and override `advance` so that real time passes, too.
    """

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.anyio]

    adds_clock_skew: ClassVar[bool] = False
    clock_tolerance_seconds: ClassVar[float] = 0.0

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        """Return a new layer, which uses the clock if it can; the suite closes it."""
        raise NotImplementedError(f"{type(self).__name__} must make its layer: override async def make_layer")

    async def advance(self, clock: FakeClock, seconds: float) -> None:
        """Let time pass, for the clock and for the store."""
        clock.advance(seconds)

    async def store_ownerless(self, layer: PersistenceLayer, claim: DataRecord, *, now: float) -> None:
        """Store a claim without an owner, as another library does; override it if `acquire` refuses to."""
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

    # --- acquire, if the key is absent, expired or lapsed: claimed ----------------------------------------------------

    async def test_acquire_claims_an_absent_key(self, trial: Trial) -> None:
        """Store the claim as it was proposed."""
        proposed = trial.claim(payload_hash="hash")
        answer = await trial.acquire(proposed)
        assert isinstance(answer, Claimed)
        assert not answer.taken_over
        assert timeless(answer.record) == timeless(proposed)

    async def test_acquire_answers_the_claim_as_stored(self, trial: Trial) -> None:
        """With its fence, and its instants by the clock of the store."""
        assert await trial.claimed(trial.claim()) == await trial.stored()

    async def test_the_first_fence_is_at_least_the_time_of_the_claim(self, trial: Trial) -> None:
        """In milliseconds, by the clock that the instants come from."""
        claimed = await trial.claimed(trial.claim())
        assert claimed.fence >= (lease_end(claimed) or 0) - LEASE_SECONDS * 1000

    async def test_a_lease_holds_in_its_last_millisecond_and_lapses_after_it(self, trial: Trial) -> None:
        """Lapsed: the end of the lease lies before now, in milliseconds."""
        await trial.claimed(trial.claim("theirs"))
        await trial.wait_until_lease_ends()
        await trial.blocked(trial.claim())
        await trial.wait_a_moment()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_a_claim_counts_in_its_last_second_and_has_expired_after_it(self, trial: Trial) -> None:
        """Expired: the expiry lies before now, floored to seconds."""
        await trial.claimed(trial.claim("theirs", lease_seconds=None))
        await trial.wait_until_expiry()
        await trial.blocked(trial.claim())
        await trial.wait_a_moment()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_a_completed_record_counts_in_its_last_second_and_has_expired_after_it(self, trial: Trial) -> None:
        """The window counts from completion."""
        claimed = await trial.claimed(trial.claim("theirs"))
        await trial.wait(1)
        await trial.completed(claimed)
        await trial.wait_until_expiry()
        await trial.blocked(trial.claim())
        await trial.wait_a_moment()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_a_claim_that_has_expired_is_absent_even_while_its_lease_lasts(self, trial: Trial) -> None:
        """Expiry comes first."""
        await trial.claimed(trial.claim("theirs", lease_seconds=10 * KEPT_SECONDS))
        await trial.outlast_expiry()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_a_claim_that_must_not_be_taken_over_holds_until_it_expires(self, trial: Trial) -> None:
        """The end of its lease only makes it in doubt."""
        await trial.claimed(trial.claim("theirs", may_be_taken_over=False))
        await trial.wait_until_expiry()
        await trial.blocked(trial.claim())
        await trial.wait_a_moment()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_taking_over_leaves_nothing_of_the_record_found(self, trial: Trial) -> None:
        """Neither its validation hash nor its note nor its lease."""
        await trial.claimed(trial.claim("theirs", payload_hash="theirs", note="theirs"))
        await trial.outlast_lease()
        proposed = trial.claim(may_be_taken_over=False)
        await trial.claimed(proposed)
        assert timeless(await trial.stored()) == timeless(proposed)
        assert kinds_of_instants(await trial.stored()) == kinds_of_instants(proposed)

    async def test_claiming_after_expiry_leaves_nothing_of_the_record_found(self, trial: Trial) -> None:
        """Neither a result nor the kind of an outcome nor a validation hash nor a note."""
        theirs = await trial.claimed(trial.claim("theirs", payload_hash="theirs", note="theirs"))
        record = completed_of(theirs, now=trial.clock(), response_data="aidem:lost", outcome=OutcomeKind.UNAVAILABLE)
        assert await trial.layer.complete(record, now=trial.clock())
        await trial.outlast_expiry()
        proposed = trial.claim()
        await trial.claimed(proposed)
        assert timeless(await trial.stored()) == timeless(proposed)
        assert kinds_of_instants(await trial.stored()) == kinds_of_instants(proposed)

    async def test_the_fence_grows_over_take_over(self, trial: Trial) -> None:
        """By one, at least."""
        first = await trial.claimed(trial.claim("theirs"))
        await trial.outlast_lease()
        assert (await trial.claimed(trial.claim())).fence > first.fence

    async def test_the_fence_grows_over_release(self, trial: Trial) -> None:
        """Although no record is left that could tell, and within one millisecond of the clock."""
        fences = list[int]()
        for owner in ("first", "second", "third"):
            claimed = await trial.claimed(trial.claim(owner))
            fences.append(claimed.fence)
            assert await trial.release(claimed)
        assert fences == sorted(set(fences))

    async def test_the_fence_grows_over_expiry(self, trial: Trial) -> None:
        """Of a claim as of a result."""
        fences = list[int]()
        for owner in ("first", "second", "third"):
            claimed = await trial.claimed(trial.claim(owner))
            fences.append(claimed.fence)
            if owner == "second":
                await trial.completed(claimed)
            await trial.outlast_expiry()
        assert fences == sorted(set(fences))

    # --- acquire, if a live record is there: claimed as found if it is ours, otherwise blocked ------------------------

    async def test_acquire_is_blocked_by_a_live_claim(self, trial: Trial) -> None:
        """With the claim found, which stays."""
        theirs = await trial.claimed(trial.claim("theirs", payload_hash="theirs"))
        assert await trial.blocked(trial.claim()) == theirs

    async def test_acquire_is_blocked_by_a_result(self, trial: Trial) -> None:
        """With the result, also where it is our own."""
        completed = await trial.completed(await trial.claimed(trial.claim()))
        assert await trial.blocked(trial.claim("theirs")) == completed
        assert await trial.blocked(trial.claim()) == completed

    async def test_blocked_tells_how_long_the_claim_still_holds(self, trial: Trial) -> None:
        """The time of the judgement and the instants found are of one clock."""
        await trial.claimed(trial.claim("theirs"))
        answer = await trial.acquire(trial.claim())
        assert isinstance(answer, Blocked)
        now = trial.clock() if answer.now is None else answer.now
        remaining_seconds = (lease_end(answer.record) or 0) / 1000 - now
        assert abs(remaining_seconds - LEASE_SECONDS) <= 0.001 + trial.tolerance_seconds

    async def test_acquire_finds_our_own_claim_again_as_it_was_stored(self, trial: Trial) -> None:
        """The reply to an earlier try was lost."""
        first = await trial.claimed(trial.claim(payload_hash="first"))
        answer = await trial.acquire(trial.claim(payload_hash="again", kept_seconds=2 * KEPT_SECONDS))
        assert answer == Claimed(first)
        assert await trial.stored() == first

    async def test_a_claim_without_owner_is_never_ours(self, trial: Trial) -> None:
        """Not even for a caller without owner; it lapses like any other."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        await trial.blocked(trial.claim())
        await trial.blocked(trial.claim(None))
        await trial.outlast_lease()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_one_of_many_concurrent_claims_is_granted(self, trial: Trial) -> None:
        """And all others are blocked by it."""
        answers = await _claim_at_once(trial, "task")
        granted = [answer.record for answer in answers if isinstance(answer, Claimed)]
        assert granted == [await trial.stored()]
        assert {answer.record for answer in answers} == set(granted)

    async def test_one_of_many_claims_from_many_event_loops_is_granted(self, trial: Trial) -> None:
        """One instance serves any number of threads and event loops."""
        threads = (to_thread.run_sync(_claim_on_a_loop_of_its_own, trial, f"thread {number}") for number in range(4))
        rounds = await asyncio.gather(*threads)
        answers = [answer for answers in rounds for answer in answers]
        assert [answer.record for answer in answers if isinstance(answer, Claimed)] == [await trial.stored()]

    async def test_clock_skew_is_added_to_a_foreign_lease_where_callers_judge(self, trial: Trial) -> None:
        """And changes nothing where the store has a clock."""
        await trial.claimed(trial.claim("theirs", kept_seconds=3 * KEPT_SECONDS))
        await trial.outlast_lease()
        answer = await trial.acquire(trial.claim("early"), max_clock_skew_seconds=LEASE_SECONDS)
        assert isinstance(answer, Blocked) == self.adds_clock_skew
        await trial.outlast_lease()
        assert isinstance(await trial.acquire(trial.claim(), max_clock_skew_seconds=LEASE_SECONDS), Claimed)

    async def test_instants_are_moved_to_the_clock_that_judges(self, trial: Trial) -> None:
        """A caller whose clock is ahead holds its claim no longer than others, unless callers judge."""
        ahead = trial.clock() + 3600
        await trial.layer.acquire(claim_of(trial.key, now=ahead, owner="theirs"), now=ahead)
        await trial.outlast_lease()
        assert isinstance(await trial.acquire(trial.claim()), Blocked) == self.adds_clock_skew

    async def test_keys_are_kept_apart(self, trial: Trial) -> None:
        """Also where one begins with the other, or differs in case."""
        keys = [trial.key, f"{trial.key} ", f"{trial.key}#", trial.key.upper(), f"{trial.key}é"]
        for key in keys:
            answer = await trial.layer.acquire(claim_of(key, now=trial.clock(), owner=key), now=trial.clock())
            assert isinstance(answer, Claimed)
        await trial.layer.forget(keys[0])
        owners = [record and record.owner for record in [await trial.layer.get(key) for key in keys]]
        assert owners == [None, *keys[1:]]

    # --- complete: over our claim, or if there is no record -----------------------------------------------------------

    async def test_complete_stores_the_outcome_over_our_claim(self, trial: Trial) -> None:
        """With the fence, the owner and the hash of the claim, and without its lease."""
        claimed = await trial.claimed(trial.claim(payload_hash="hash"))
        stored = await trial.completed(claimed)
        assert timeless(stored) == timeless(completed_of(claimed, now=trial.clock()))
        assert stored.fence == claimed.fence
        assert lease_end(stored) is None

    async def test_complete_stores_every_text_as_it_is(self, trial: Trial) -> None:
        """Character by character."""
        for number, text in enumerate(TEXTS):
            key = f"{trial.key}/{number}"
            claimed = await trial.layer.acquire(claim_of(key, now=trial.clock()), now=trial.clock())
            record = completed_of(claimed.record, now=trial.clock(), response_data=text)
            assert await trial.layer.complete(record, now=trial.clock())
            stored = await trial.layer.get(key)
            assert stored is not None
            assert stored.response_data == text

    async def test_the_note_of_a_claim_stays_as_it_is_through_renewal_and_completion(self, trial: Trial) -> None:
        """Character by character."""
        for number, note in enumerate(NOTES):
            claim = claim_of(f"{trial.key}/{number}", now=trial.clock(), note=note)
            claimed = (await trial.acquire(claim)).record
            assert claimed.note == note
            later = claim_of(claim.idempotency_key, now=trial.clock(), kept_seconds=2 * KEPT_SECONDS)
            renewed = await trial.renew(later)
            assert renewed is not None
            assert renewed.note == note
            assert await trial.complete(claimed)
            stored = await trial.layer.get(claim.idempotency_key)
            assert stored is not None
            assert stored.note == note

    async def test_complete_stores_the_kind_of_the_outcome(self, trial: Trial) -> None:
        """Beside its text."""
        for kind in OutcomeKind:
            key = f"{trial.key}/{kind}"
            claimed = await trial.layer.acquire(claim_of(key, now=trial.clock()), now=trial.clock())
            record = completed_of(claimed.record, now=trial.clock(), response_data=f"aidem:{kind}", outcome=kind)
            assert await trial.layer.complete(record, now=trial.clock())
            assert timeless(await trial.layer.get(key)) == timeless(record)

    async def test_complete_stores_the_outcome_after_a_lapse_that_nobody_used(self, trial: Trial) -> None:
        """The claim is still ours."""
        claimed = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        assert (await trial.completed(claimed)).response_data is not None

    async def test_complete_stores_the_outcome_where_no_record_is(self, trial: Trial) -> None:
        """Whether it was purged, evicted or dropped."""
        claimed = await trial.claimed(trial.claim())
        await trial.layer.forget(trial.key)
        assert timeless(await trial.completed(claimed)) == timeless(completed_of(claimed, now=trial.clock()))

    async def test_complete_stores_the_outcome_where_a_foreign_record_has_expired(self, trial: Trial) -> None:
        """It counts as absent."""
        await trial.claimed(trial.claim("theirs", lease_seconds=None))
        ours = trial.claim()
        await trial.wait_until_expiry()
        assert not await trial.complete(ours)
        await trial.wait_a_moment()
        assert (await trial.completed(ours)).owner == "ours"

    async def test_complete_leaves_a_foreign_claim_alone(self, trial: Trial) -> None:
        """Also one that has lapsed."""
        theirs = await trial.claimed(trial.claim("theirs"))
        assert not await trial.complete(trial.claim())
        await trial.outlast_lease()
        assert not await trial.complete(trial.claim())
        assert await trial.stored() == theirs

    async def test_complete_leaves_a_claim_that_took_ours_over_alone(self, trial: Trial) -> None:
        """The loser of a lease stores nothing."""
        ours = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        theirs = await trial.claimed(trial.claim("theirs"))
        assert not await trial.complete(ours)
        assert await trial.stored() == theirs

    async def test_complete_leaves_a_foreign_outcome_alone(self, trial: Trial) -> None:
        """Also one with the same text."""
        theirs = await trial.completed(await trial.claimed(trial.claim("theirs")))
        assert not await trial.complete(trial.claim())
        assert await trial.stored() == theirs

    async def test_complete_leaves_a_claim_without_owner_alone(self, trial: Trial) -> None:
        """Also for a caller without owner."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        found = await trial.stored()
        assert not await trial.complete(trial.claim())
        assert not await trial.complete(trial.claim(None))
        assert await trial.stored() == found

    async def test_complete_may_be_repeated(self, trial: Trial) -> None:
        """The reply to an earlier try was lost."""
        claimed = await trial.claimed(trial.claim())
        stored = await trial.completed(claimed)
        assert await trial.complete(claimed)
        assert await trial.stored() == stored

    async def test_complete_leaves_another_outcome_of_ours_alone(self, trial: Trial) -> None:
        """Another text, or another kind: the first one counts."""
        claimed = await trial.claimed(trial.claim())
        stored = await trial.completed(claimed)
        assert not await trial.complete(claimed, '{"paid": false}')
        other_kind = stored.replace(outcome=OutcomeKind.UNAVAILABLE)
        assert not await trial.layer.complete(other_kind, now=trial.clock())
        assert await trial.stored() == stored

    # --- renew: only while the claim is ours --------------------------------------------------------------------------

    async def test_renew_moves_the_lease_and_the_expiry(self, trial: Trial) -> None:
        """To those of the record handed in."""
        claimed = await trial.claimed(trial.claim())
        await trial.wait(LEASE_SECONDS / 2)
        renewed = await trial.renew(trial.claim(lease_seconds=KEPT_SECONDS, kept_seconds=2 * KEPT_SECONDS))
        assert renewed is not None
        assert (lease_end(renewed) or 0) > (lease_end(claimed) or 0)
        assert (renewed.expiry_timestamp or 0) > (claimed.expiry_timestamp or 0)
        await trial.outlast_lease()
        await trial.blocked(trial.claim("theirs"))
        await trial.outlast_lease()
        assert (await trial.claimed(trial.claim("theirs"))).owner == "theirs"

    async def test_renew_answers_the_claim_as_stored_and_changes_nothing_but_its_instants(self, trial: Trial) -> None:
        """Fence, owner and hash stay."""
        claimed = await trial.claimed(trial.claim(payload_hash="hash"))
        renewed = await trial.renew(trial.claim(payload_hash="other", kept_seconds=2 * KEPT_SECONDS))
        assert renewed is not None
        assert renewed == await trial.stored()
        assert timeless(renewed) == timeless(claimed)
        assert renewed.fence == claimed.fence

    async def test_renew_can_turn_a_lease_into_doubt_and_back(self, trial: Trial) -> None:
        """Each instant is set, or removed."""
        kinds: tuple[dict[str, Any], ...] = ({}, {"may_be_taken_over": False}, {}, {"lease_seconds": None})
        for options in kinds:
            await trial.claimed(trial.claim())
            await trial.wait(LEASE_SECONDS / 4)
            proposed = trial.claim(**options)
            await trial.renew(proposed)
            assert kinds_of_instants(await trial.stored()) == kinds_of_instants(proposed)

    async def test_renew_never_moves_a_claim_back(self, trial: Trial) -> None:
        """With a lease of either kind, or without one: it is answered as stored, and nothing changes."""
        kinds: tuple[dict[str, Any], ...] = (
            {"lease_seconds": KEPT_SECONDS},
            {"lease_seconds": KEPT_SECONDS, "may_be_taken_over": False},
            {"lease_seconds": None, "kept_seconds": 2 * KEPT_SECONDS},
        )
        for options in kinds:
            claimed = await trial.claimed(trial.claim(**options))
            for may_be_taken_over in (True, False):
                shorter = trial.claim(lease_seconds=1, may_be_taken_over=may_be_taken_over)
                assert await trial.renew(shorter) == claimed
            assert await trial.renew(trial.claim(lease_seconds=None, kept_seconds=1)) == claimed
            assert await trial.stored() == claimed
            await trial.layer.forget(trial.key)

    async def test_a_renewal_that_arrives_after_its_successor_moves_nothing_back(self, trial: Trial) -> None:
        """Once or twice; a layer that has a clock of its own may count from there."""
        late, sent_at = await trial.claimed(trial.claim()), trial.clock()
        await trial.wait(LEASE_SECONDS / 2)
        renewed = await trial.renew(trial.claim())
        assert renewed is not None
        for _ in range(2):
            assert await trial.layer.renew(late, now=sent_at) == await trial.stored()
            assert (lease_end(await trial.stored() or late) or 0) >= (lease_end(renewed) or 0)
        await trial.wait(LEASE_SECONDS - 0.001 - trial.tolerance_seconds)
        await trial.blocked(trial.claim("theirs"))

    async def test_a_claim_that_is_given_up_is_in_doubt_at_once_and_not_renewed_any_more(self, trial: Trial) -> None:
        """Not by a renewal that was sent before; giving up may be repeated, and counts from no clock."""
        claimed = await trial.claimed(trial.claim(may_be_taken_over=False, payload_hash="hash"))
        given_up = claimed.replace(lease_expiry_timestamp=GIVEN_UP)
        for _ in range(2):
            answer = await trial.layer.renew(given_up, now=trial.clock() - 1)
            assert answer is not None
            assert answer.lease_expiry_timestamp == GIVEN_UP
            assert timeless(answer) == timeless(claimed)
            assert await trial.stored() == answer
        stored = await trial.stored()
        assert await trial.renew(trial.claim(may_be_taken_over=False, kept_seconds=2 * KEPT_SECONDS)) is None
        assert await trial.renew(trial.claim(lease_seconds=None, kept_seconds=2 * KEPT_SECONDS)) is None
        await trial.blocked(trial.claim("theirs"))
        assert await trial.stored() == stored
        assert await trial.release(claimed)

    async def test_renew_holds_a_claim_that_lapsed_and_that_nobody_took(self, trial: Trial) -> None:
        """It is still ours."""
        await trial.claimed(trial.claim())
        await trial.outlast_lease()
        assert await trial.renew(trial.claim()) is not None
        await trial.blocked(trial.claim("theirs"))

    async def test_renew_leaves_a_foreign_claim_alone(self, trial: Trial) -> None:
        """Also one that took ours over."""
        ours = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        theirs = await trial.claimed(trial.claim("theirs"))
        assert await trial.renew(ours) is None
        assert await trial.stored() == theirs

    async def test_renew_leaves_an_outcome_alone(self, trial: Trial) -> None:
        """Also our own."""
        claimed = await trial.claimed(trial.claim())
        stored = await trial.completed(claimed)
        assert await trial.renew(claimed) is None
        assert await trial.stored() == stored

    async def test_renew_leaves_a_claim_without_owner_alone(self, trial: Trial) -> None:
        """Also for a caller without owner."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        found = await trial.stored()
        assert await trial.renew(trial.claim(None, kept_seconds=2 * KEPT_SECONDS)) is None
        assert await trial.stored() == found

    async def test_renew_does_not_bring_a_claim_back(self, trial: Trial) -> None:
        """What was released or dropped is not ours any more."""
        claimed = await trial.claimed(trial.claim())
        assert await trial.release(claimed)
        assert await trial.renew(claimed) is None
        assert await trial.stored() is None
        claimed = await trial.claimed(trial.claim())
        await trial.layer.forget(trial.key)
        assert await trial.renew(claimed) is None
        assert await trial.stored() is None

    # --- release: only while the claim is ours ------------------------------------------------------------------------

    async def test_release_deletes_our_claim(self, trial: Trial) -> None:
        """Also one that lapsed and that nobody took; the next caller may have the key."""
        for outlast in (False, True):
            claimed = await trial.claimed(trial.claim())
            if outlast:
                await trial.outlast_lease()
            assert await trial.release(claimed)
            assert await trial.stored() is None
        assert (await trial.claimed(trial.claim("theirs"))).owner == "theirs"

    async def test_release_leaves_a_foreign_claim_alone(self, trial: Trial) -> None:
        """Also one that took ours over."""
        ours = await trial.claimed(trial.claim())
        await trial.outlast_lease()
        theirs = await trial.claimed(trial.claim("theirs"))
        assert not await trial.release(ours)
        assert await trial.stored() == theirs

    async def test_release_leaves_an_outcome_alone(self, trial: Trial) -> None:
        """Also our own."""
        claimed = await trial.claimed(trial.claim())
        stored = await trial.completed(claimed)
        assert not await trial.release(claimed)
        assert await trial.stored() == stored

    async def test_release_leaves_a_claim_without_owner_alone(self, trial: Trial) -> None:
        """Also for a caller without owner."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        found = await trial.stored()
        assert not await trial.release(trial.claim(None))
        assert await trial.stored() == found

    async def test_release_says_that_there_is_nothing_to_release(self, trial: Trial) -> None:
        """A second release among them."""
        claimed = await trial.claimed(trial.claim())
        assert await trial.release(claimed)
        assert not await trial.release(claimed)

    # --- get ----------------------------------------------------------------------------------------------------------

    async def test_get_finds_nothing_under_an_unknown_key(self, trial: Trial) -> None:
        """None: there is none."""
        assert await trial.stored() is None

    async def test_get_may_find_a_record_that_has_expired(self, trial: Trial) -> None:
        """As stored, or not at all where the store has purged it."""
        claimed = await trial.claimed(trial.claim())
        await trial.outlast_expiry()
        assert await trial.stored() in {claimed, None}

    # --- forget -------------------------------------------------------------------------------------------------------

    async def test_forget_drops_any_record(self, trial: Trial) -> None:
        """A claim, an outcome, or none."""
        await trial.claimed(trial.claim("theirs"))
        await trial.layer.forget(trial.key)
        assert await trial.stored() is None
        await trial.completed(await trial.claimed(trial.claim()))
        await trial.layer.forget(trial.key)
        await trial.layer.forget(trial.key)
        assert await trial.stored() is None

    # --- The layer as an object: opened, closed, shared ---------------------------------------------------------------

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
            async with trial.layer:
                raise ZeroDivisionError

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


async def _claim_at_once(trial: Trial, name: str) -> list[Claimed | Blocked]:
    """Ask for a claim from many tasks of this loop at once."""
    claims = (trial.claim(f"{name} {number}") for number in range(CONCURRENT_CLAIMS))
    return await asyncio.gather(*(trial.acquire(claim) for claim in claims))


def _claim_on_a_loop_of_its_own(trial: Trial, name: str) -> list[Claimed | Blocked]:
    return asyncio.run(_claim_at_once(trial, name))
