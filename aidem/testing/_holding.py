"""What the contract says of `renew` and `release`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aidem._rules.lifecycle import GIVEN_UP, lease_end
from aidem.testing._base import LayerTests
from aidem.testing._trial import KEPT_SECONDS, LEASE_SECONDS, kinds_of_instants, timeless

if TYPE_CHECKING:
    from aidem.testing._trial import Trial


class HoldingTests(LayerTests):
    """Only while the claim is ours."""

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
