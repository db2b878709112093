"""What the contract says of `complete`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aidem._rules.lifecycle import lease_end
from aidem._rules.record import OutcomeKind
from aidem.testing._base import LayerTests
from aidem.testing._trial import claim_of, completed_of, timeless

if TYPE_CHECKING:
    from aidem.testing._trial import Trial


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


class CompleteTests(LayerTests):
    """Over our claim, or where no record is."""

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
