"""What the contract says of `acquire` where the key is to be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem._rules.lifecycle import Claimed, lease_end
from aidem._rules.record import OutcomeKind
from aidem.testing._base import LayerTests
from aidem.testing._trial import KEPT_SECONDS, LEASE_SECONDS, completed_of, kinds_of_instants, timeless

if TYPE_CHECKING:
    from aidem.testing._trial import Trial


class AcquireTests(LayerTests):
    """Absent, expired, lapsed: claimed."""

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
        """Neither its validation hash nor its lease."""
        await trial.claimed(trial.claim("theirs", payload_hash="theirs"))
        await trial.outlast_lease()
        proposed = trial.claim(may_be_taken_over=False)
        await trial.claimed(proposed)
        assert timeless(await trial.stored()) == timeless(proposed)
        assert kinds_of_instants(await trial.stored()) == kinds_of_instants(proposed)

    async def test_claiming_after_expiry_leaves_nothing_of_the_record_found(self, trial: Trial) -> None:
        """Neither a result nor the kind of an outcome nor a validation hash."""
        theirs = await trial.claimed(trial.claim("theirs", payload_hash="theirs"))
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
