"""The contract of `aidem.persistence.SupportsTakeOver` as tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

from aidem._rules.lifecycle import GIVEN_UP, lease_end
from aidem.persistence import SupportsTakeOver
from aidem.testing._conformance import PersistenceLayerConformance
from aidem.testing._trial import KEPT_SECONDS, LEASE_SECONDS, Trial, claim_of, kinds_of_instants, timeless

if TYPE_CHECKING:
    from aidem._rules.record import DataRecord

CONCURRENT: Final = 20
AHEAD_SECONDS: Final = 3600
ON_THE_WAY_SECONDS: Final = 0.1
KINDS: Final = (True, False)
"""Whether a claim may be taken over by `acquire` once its lease has passed."""


class TakeOverConformance(PersistenceLayerConformance):
    """Proves that a layer keeps the contract, `take_over` included; see `PersistenceLayerConformance`."""

    async def test_take_over_stores_the_claim_in_the_place_of_one_whose_lease_has_passed(self, trial: Trial) -> None:
        """Of either kind; nothing but the fence tells of the claim found."""
        for may_be_taken_over in KINDS:
            theirs = trial.claim(
                "theirs", may_be_taken_over=may_be_taken_over, kept_seconds=2 * KEPT_SECONDS, payload_hash="theirs"
            )
            found = await trial.claimed(theirs.replace(note="theirs"))
            await trial.outlast_lease()
            proposed = trial.claim(may_be_taken_over=not may_be_taken_over)
            taken = await _take_over(trial, found, proposed)
            assert taken is not None
            assert taken == await trial.stored()
            assert timeless(taken) == timeless(proposed)
            assert kinds_of_instants(taken) == kinds_of_instants(proposed)
            assert taken.fence > found.fence
            assert await trial.blocked(trial.claim("others")) == taken
            await trial.layer.forget(trial.key)

    async def test_take_over_waits_for_the_last_millisecond_of_the_lease(self, trial: Trial) -> None:
        """Of either kind."""
        for may_be_taken_over in KINDS:
            found = await trial.claimed(trial.claim("theirs", may_be_taken_over=may_be_taken_over))
            await trial.wait_until_lease_ends()
            await _refused(trial, found, trial.claim())
            await trial.wait_a_moment()
            assert await _take_over(trial, found, trial.claim()) is not None
            await trial.layer.forget(trial.key)

    async def test_take_over_takes_a_claim_that_was_given_up_at_once(self, trial: Trial) -> None:
        """Whatever the skew of clocks may be."""
        found = await trial.claimed(trial.claim("theirs", may_be_taken_over=False))
        given_up = await trial.renew(found.replace(lease_expiry_timestamp=GIVEN_UP))
        assert given_up is not None
        assert await _take_over(trial, given_up, trial.claim(), max_clock_skew_seconds=3600) is not None

    async def test_take_over_leaves_a_claim_without_a_lease_alone(self, trial: Trial) -> None:
        """It holds until it expires."""
        found = await trial.claimed(trial.claim("theirs", lease_seconds=None))
        await trial.wait_until_expiry()
        await _refused(trial, found, trial.claim())

    async def test_take_over_takes_a_claim_in_the_last_second_before_it_expires(self, trial: Trial) -> None:
        """Until then it counts."""
        found = await trial.claimed(trial.claim("theirs", may_be_taken_over=False))
        await trial.wait_until_expiry()
        assert await _take_over(trial, found, trial.claim()) is not None

    async def test_take_over_leaves_a_record_that_has_expired_alone(self, trial: Trial) -> None:
        """The key is to be acquired."""
        for may_be_taken_over in KINDS:
            found = await trial.claimed(trial.claim("theirs", may_be_taken_over=may_be_taken_over))
            await trial.outlast_expiry()
            await _refused(trial, found, trial.claim(), force=True)
            await trial.layer.forget(trial.key)

    async def test_take_over_leaves_an_outcome_alone(self, trial: Trial) -> None:
        """Also our own, and with force."""
        for owner in ("theirs", "ours"):
            found = await trial.claimed(trial.claim(owner))
            await trial.outlast_lease()
            await trial.completed(found)
            await _refused(trial, found, trial.claim(), force=True)
            await trial.layer.forget(trial.key)

    async def test_take_over_stores_nothing_where_no_record_is(self, trial: Trial) -> None:
        """The claim found was released or dropped."""
        found = await trial.claimed(trial.claim("theirs"))
        assert await trial.release(found)
        await _refused(trial, found, trial.claim(), force=True)

    async def test_take_over_leaves_another_claim_than_the_one_found_alone(self, trial: Trial) -> None:
        """Of another owner, or with another fence, although its lease has passed, and with force."""
        found = await trial.claimed(trial.claim("theirs"))
        await trial.outlast_lease()
        other = await trial.claimed(trial.claim("others"))
        await trial.outlast_lease()
        for mistaken in (found, found.replace(fence=other.fence), other.replace(fence=found.fence)):
            await _refused(trial, mistaken, trial.claim())
            await _refused(trial, mistaken, trial.claim(), force=True)
        await _refused(trial, other.replace(owner=None), trial.claim(), force=True)

    async def test_take_over_may_be_repeated(self, trial: Trial) -> None:
        """The reply to an earlier try was lost: our claim is answered as stored, renewed or lapsed meanwhile."""
        found = await trial.claimed(trial.claim("theirs"))
        await trial.outlast_lease()
        first = trial.claim(payload_hash="first", kept_seconds=3 * KEPT_SECONDS)
        taken = await _take_over(trial, found, first)
        again = trial.claim(payload_hash="again", kept_seconds=4 * KEPT_SECONDS)
        assert await _take_over(trial, found, again) == taken == await trial.stored()
        await trial.outlast_lease()
        assert await _take_over(trial, found, again) == taken == await trial.stored()

    async def test_a_take_over_that_arrives_late_takes_nothing(self, trial: Trial) -> None:
        """Ours was released, and the claim of somebody else has lapsed."""
        found = await trial.claimed(trial.claim("theirs"))
        await trial.outlast_lease()
        taken = await _take_over(trial, found, trial.claim())
        assert taken is not None
        assert await trial.release(taken)
        await _refused(trial, found, trial.claim())
        await trial.claimed(trial.claim("others"))
        await trial.outlast_lease()
        await _refused(trial, found, trial.claim())

    async def test_force_takes_over_a_claim_whose_lease_has_not_passed(self, trial: Trial) -> None:
        """Of either kind, or without a lease."""
        kinds: tuple[dict[str, Any], ...] = ({}, {"may_be_taken_over": False}, {"lease_seconds": None})
        for options in kinds:
            found = await trial.claimed(trial.claim("theirs", **options))
            await _refused(trial, found, trial.claim())
            taken = await _take_over(trial, found, trial.claim(), force=True)
            assert taken is not None
            assert taken == await trial.stored()
            assert (taken.owner, taken.fence > found.fence) == ("ours", True)
            await trial.layer.forget(trial.key)

    async def test_take_over_adds_clock_skew_to_the_lease_where_callers_judge(self, trial: Trial) -> None:
        """And nothing where the store has a clock."""
        for may_be_taken_over in KINDS:
            found = await trial.claimed(
                trial.claim("theirs", may_be_taken_over=may_be_taken_over, kept_seconds=3 * KEPT_SECONDS)
            )
            await trial.outlast_lease()
            early = await _take_over(trial, found, trial.claim("early"), max_clock_skew_seconds=LEASE_SECONDS)
            assert (early is None) == self.adds_clock_skew
            await trial.outlast_lease()
            late = await _take_over(trial, early or found, trial.claim(), max_clock_skew_seconds=LEASE_SECONDS)
            assert late is not None
            await trial.layer.forget(trial.key)

    async def test_take_over_counts_the_instants_from_the_clock_that_judges(self, trial: Trial) -> None:
        """A caller whose clock is ahead holds the claim no longer than others, unless callers judge."""
        found = await trial.claimed(trial.claim("theirs", kept_seconds=2 * AHEAD_SECONDS))
        await trial.outlast_lease()
        ahead = trial.clock() + AHEAD_SECONDS
        layer = cast("SupportsTakeOver", trial.layer)
        taken = await layer.take_over(found, claim_of(trial.key, now=ahead), now=ahead)
        assert taken is not None
        seconds_ahead = ((lease_end(taken) or 0) - (lease_end(trial.claim()) or 0)) / 1000
        assert abs(seconds_ahead - AHEAD_SECONDS * self.adds_clock_skew) <= 0.001 + trial.tolerance_seconds

    async def test_the_owner_of_a_claim_that_was_taken_over_finds_it_lost(self, trial: Trial) -> None:
        """With what it has sent late, too."""
        found = await trial.claimed(trial.claim("theirs", may_be_taken_over=False, kept_seconds=3 * KEPT_SECONDS))
        await trial.outlast_lease()
        taken = await _take_over(trial, found, trial.claim(may_be_taken_over=False))
        assert await trial.renew(trial.claim("theirs", may_be_taken_over=False)) is None
        assert not await trial.complete(found)
        assert not await trial.release(found)
        assert await trial.stored() == taken

    async def test_a_renewal_that_arrives_before_take_over_keeps_the_claim(self, trial: Trial) -> None:
        """The lease counts that is stored, not the one found."""
        for may_be_taken_over in KINDS:
            found = await trial.claimed(trial.claim("theirs", may_be_taken_over=may_be_taken_over))
            await trial.outlast_lease()
            assert await trial.renew(trial.claim("theirs", may_be_taken_over=may_be_taken_over)) is not None
            await _refused(trial, found, trial.claim())
            await trial.layer.forget(trial.key)

    async def test_take_over_takes_a_claim_without_owner(self, trial: Trial) -> None:
        """Another library has written it."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        found = await trial.stored()
        assert found is not None
        await _refused(trial, found, trial.claim())
        await trial.outlast_lease()
        await _refused(trial, found.replace(owner="theirs"), trial.claim())
        taken = await _take_over(trial, found, trial.claim())
        assert taken is not None
        assert taken == await trial.stored()

    async def test_one_of_many_concurrent_take_overs_is_granted(self, trial: Trial) -> None:
        """And the claim of that one is stored."""
        found = await trial.claimed(trial.claim("theirs", may_be_taken_over=False))
        await trial.outlast_lease()
        claims = (trial.claim(f"task {number}", may_be_taken_over=False) for number in range(CONCURRENT))
        answers = await asyncio.gather(*(_take_over(trial, found, claim) for claim in claims))
        assert [taken for taken in answers if taken is not None] == [await trial.stored()]

    async def test_force_can_put_a_claim_back_whose_lease_has_passed(self, trial: Trial) -> None:
        """With the end of the lease as it was found, so that it is known since when it is in doubt."""
        found = await trial.claimed(trial.claim("theirs", may_be_taken_over=False, kept_seconds=3 * KEPT_SECONDS))
        await trial.outlast_lease()
        ours = await _take_over(trial, found, trial.claim(may_be_taken_over=False))
        assert ours is not None
        restored = await _take_over(trial, ours, found.replace(owner="nobody"), force=True)
        assert restored is not None
        difference_seconds = ((lease_end(restored) or 0) - (lease_end(found) or 0)) / 1000
        assert abs(difference_seconds) <= 2 * trial.tolerance_seconds
        theirs = await _take_over(trial, restored, trial.claim())
        assert theirs is not None
        # The request takes a while: doubt would never expire, if that were rounded up to a second at every check.
        early = trial.clock() - ON_THE_WAY_SECONDS
        layer = cast("SupportsTakeOver", trial.layer)
        again = await layer.take_over(theirs, restored.replace(owner="nobody else"), now=early, force=True)
        assert again is not None
        later_seconds = (again.expiry_timestamp or 0) - (restored.expiry_timestamp or 0)
        assert abs(later_seconds) <= 2 * trial.tolerance_seconds


async def _take_over(trial: Trial, found: DataRecord, record: DataRecord, **options: Any) -> DataRecord | None:
    layer = trial.layer
    assert isinstance(layer, SupportsTakeOver), f"{type(layer).__name__} has no take_over"
    return await layer.take_over(found, record, now=trial.clock(), **options)


async def _refused(trial: Trial, found: DataRecord, record: DataRecord, **options: Any) -> None:
    """Ask for what must not be granted, and change nothing."""
    before = await trial.stored()
    assert await _take_over(trial, found, record, **options) is None
    assert await trial.stored() == before
